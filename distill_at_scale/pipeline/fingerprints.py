"""What each stage depends on: its own configuration and the contents that it reads, and nothing else.

Where data lies, the run folder, the cluster and the number of workers are left out, so a run resumes on another machine and
scores are shared by every selection made from them.
"""

from __future__ import annotations

from typing import Any

from distill_at_scale.config.fields import Section, result_values
from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.clip import decoders_for
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sources.class_subsets import class_list
from distill_at_scale.distillation import engine as distill
from distill_at_scale.models import pretrained
from distill_at_scale.pipeline.report import run_report
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO, build_criteria
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

METHODS = tuple(name for name, field in DistillSection.model_fields.items() if isinstance(field.default, Section))
OF_TRANSFORM = ("imbalance", "copies", "variance_classes")
OF_CLIPS = ("frames", "sampling", "stride", "decoder", "seek", "short", "time_limit", "max_seconds", "fold")
TRAINING = ("trials", "epochs", "share", "shards", "batch", "lr", "momentum", "weight_decay")  # of proxies only


def inputs(stage: str, config: Config, run: RunDir) -> StageInputs:
    """The inputs of a stage after ingest.

    Raises UserError where an earlier stage has not been run, or its output is no longer whole.
    """
    values, reads = {"score": score, "select": select, "distill": distillation, "evaluate": evaluation, "report": page}[
        stage
    ](config, run)
    content = {name: run.content(name) for name in reads}
    if stage == "report":
        content["page"] = str(run_report.VERSION)
    if stage == "score":
        content |= _weights(config, run) | _imported(config, run)
    if stage == "distill":
        content |= _teacher(config, run)
    return StageInputs(values, content)


def _weights(config: Config, run: RunDir) -> dict[str, str]:
    """Ready-made checkpoints by content; where they are gone, what the finished stage was made with."""
    try:
        found = pretrained.digests(config.score.weight_names)
    except UserError:
        record = run.record("score")
        if record is None:
            raise
        return {name: value for name, value in record["content"].items() if name.startswith("weights ")}
    return {f"weights {number}": value for number, value in enumerate(found.values())}


def _imported(config: Config, run: RunDir) -> dict[str, str]:
    """Scores made elsewhere by content; where the files are gone, what the finished stage was made with."""
    before, found = (run.record("score") or {"content": {}})["content"], {}
    for name, file in config.score.imported.items():
        key = f"imported {name}"
        try:
            found[key] = imported.digest_of(name, file)
        except UserError:
            if key not in before:
                raise
            found[key] = before[key]
    return found


def _teacher(config: Config, run: RunDir) -> dict[str, str]:
    """Ready-made weights of a teacher by content; where they are gone, what the finished stage was made with."""
    try:
        found = distill.method_class(config).network_options(config).get("teacher_weights")
    except UserError:
        record = run.record("distill")
        if record is None or "teacher weights" not in record["content"]:
            raise
        found = record["content"]["teacher weights"]
    return {"teacher weights": found} if found else {}


Dependence = tuple[dict[str, Any], tuple[str, ...]]  # configuration values, and the stages whose output is read


def data(config: Config) -> dict[str, Any]:
    """The configuration behind the prepared data; the seed counts only where it splits them or picks their frames."""
    values, section = _section(config, "data"), config.data
    if section.frames is None:
        values = {key: value for key, value in values.items() if key.removeprefix("data.") not in OF_CLIPS}
    else:
        values["data.decoder"] = list(decoders_for(section))
    if section.classes is not None:
        values["data.classes"] = class_list(section.classes)
    if section.transform == "none":
        values = {key: value for key, value in values.items() if key.removeprefix("data.") not in OF_TRANSFORM}
    drawn = section.holdout or (section.frames and section.sampling != "uniform") or section.transform != "none"
    return values | ({"run.seed": config.run.seed} if drawn else {})


def score(config: Config, run: RunDir) -> Dependence:
    """Without what only proxies or only Monte Carlo subsets depend on, where there are none."""
    trained = config.score.weights is None and bool(build_criteria(config.score))
    sampled = MONTE_CARLO in config.score.criteria
    unused = {"monte_carlo", *(() if trained else TRAINING)}
    values = {key: value for key, value in _section(config, "score").items() if key.split(".")[1] not in unused}
    if sampled:
        values |= result_values(config.score.monte_carlo, "score.monte_carlo.")
        values |= result_values(config.distill.dc, "distill.dc.") if config.score.monte_carlo.learn == "dc" else {}
    return values | ({"run.seed": config.run.seed} if trained or sampled else {}), ("ingest",)


def select(config: Config, run: RunDir) -> Dependence:
    resolved = {"criterion": config.criterion, "min_per_class": config.min_per_class, "seed": config.select_seed}
    return _section(config, "select") | {f"select.{key}": value for key, value in resolved.items()}, ("score",)


def networks(config: Config, run: RunDir) -> StageInputs:
    """Behind the experts or the teacher of a method: whatever decides their weights, and nothing else of the method."""
    options = distill.method_class(config).network_options(config)
    content = {name: run.content(name) for name in ("ingest", "select")}
    return StageInputs(options | {"distill.seed": config.distill_seed}, content)


def distillation(config: Config, run: RunDir) -> Dependence:
    method = config.distill.method
    own = getattr(config.distill, method, None)
    values = {k: v for k, v in _section(config, "distill").items() if k.split(".")[1] not in METHODS}
    values |= result_values(own, f"distill.{method}.") if own else {}
    values.pop(f"distill.{method}.teacher_weights", None)  # where they lie; what they are is in `_teacher`
    values |= {"distill.steps": distill.step_count(config), "distill.seed": config.distill_seed}
    return values | _runtime(config), ("ingest", "select")


def _runtime(config: Config) -> dict[str, Any]:
    """What runtime pruning depends on: nothing where there is none, and the thresholds' keys only where there are some."""
    rule = config.runtime.rule
    if rule == "none" or distill.method_class(config).no_runtime:
        return {"runtime.rule": "none"}
    of_effects = ("runtime.tail", "runtime.probes", "runtime.decay")
    return {k: v for k, v in result_values(config.runtime, "runtime.").items() if rule == "ite" or k not in of_effects}


def evaluation(config: Config, run: RunDir) -> Dependence:
    shared = {f"distill.{key}": getattr(config.distill, key) for key in ("ipc", "width", "depth")}
    return _section(config, "evaluate") | shared | {"run.seed": config.run.seed}, ("ingest", "select", "distill")


def page(config: Config, run: RunDir) -> Dependence:
    evaluated = run.record("evaluate") is not None or PreparedDataset(run / "prepared").has_test()
    return {}, ("ingest", "score", "select", "distill", *(("evaluate",) if evaluated else ()))


def _section(config: Config, name: str) -> dict[str, Any]:
    return result_values(getattr(config, name), f"{name}.")

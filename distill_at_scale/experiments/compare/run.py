"""The command `compare`: checks, sets, the teacher, networks, results.

A network is a unit of work. Its row is kept in `networks.jsonl` under a key of all that decides it, so the same command trains
only the networks that are missing, also after runs, baselines or networks were added.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import file_digest, publish, resume_log, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import UNPRUNED
from distill_at_scale.distillation.methods.pca import PCA
from distill_at_scale.distillation.soft_labels import TEACHER
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.experiments.compare import external, results, sets
from distill_at_scale.experiments.compare.runs import FinishedRun, open_runs
from distill_at_scale.experiments.compare.sets import Entry
from distill_at_scale.experiments.compare.units import FULL, RANDOM, Compare, Job, recipe, teacher_config
from distill_at_scale.models import precision
from distill_at_scale.models.spec import builder
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor, Task, Unit
from distill_at_scale.pipeline.report import comparison
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.object_store import is_remote
from distill_at_scale.storage.stage_record import StageInputs

LOG, FACTS = "networks.jsonl", "compare.json"
VERSION = 1  # of what a row holds


@dataclass(frozen=True)
class Plan:
    """All that is known before anything is trained."""

    config: Config  # of the first run, with its precisions resolved and the networks of the comparison
    runs: Sequence[FinishedRun]
    folder: Path
    entries: Sequence[Entry]
    protocols: Mapping[tuple[str, bool], TrainingProtocol]  # by labels and augmentation
    left_out: Sequence[str]
    teacher: StageInputs | None  # what decides its weights; None if all labels are hard

    @property
    def epochs(self) -> int:
        return next(iter(self.protocols.values())).epochs

    @property
    def networks(self) -> Path:
        """The folder of the teacher."""
        return self.folder / "networks" / (self.teacher.fingerprint[:16] if self.teacher else "")


def run(configs: Sequence[Config], display: Display, connect: Callable[[], Executor]) -> Path:
    """Compare finished runs; returns the page. The first configuration decides data, networks, recipes and folder.

    Raises UserError, before anything is trained, for runs that cannot be compared, for sets from elsewhere that do not fit, and
    for wrong names.
    """
    runs = open_runs(configs)
    with runs[0].dir.lock():
        plan = make_plan(runs, display)
        units, log = _units(plan), plan.folder / LOG
        rows = {row["key"]: row for row in resume_log(log, display.say)}
        missing = {key: unit for key, unit in units.items() if key not in rows}
        known = f"{len(units) - len(missing):,} of them trained before"
        display.say(f"compare: {len(units):,} networks on {len(plan.entries)} sets, {known}")
        if missing:
            executor = connect()
            try:
                if plan.teacher:
                    _train_teacher(plan, executor, display)
                _train(plan, executor, display, missing, rows, log)
            finally:
                executor.close()
        return _finish(plan, [rows[key] for key in units], display)


def make_plan(runs: Sequence[FinishedRun], display: Display) -> Plan:
    """Check everything, write the tensors of all sets, and decide the entries. Says which baselines are left out."""
    first, data, left_out = runs[0], runs[0].data, list[str]()
    config, counts, normalization = _checked(first), data.counts("train"), normalization_of(data)
    section = config.compare
    augments = {"both": (True, False), "with": (True,), "without": (False,)}[section.augment]
    protocols: dict[tuple[str, bool], TrainingProtocol] = {
        (labels, augment): recipe(config, first.synthetic.protocol, labels, augment)
        for labels in section.labels
        for augment in (augments if data.kind != "tensors" else (False,))
    }
    if is_remote(section.dir or ""):
        raise UserError(f"compare.dir = {section.dir} is in an object store; name a folder of this machine")
    folder = Path(section.dir.removeprefix("file://")).expanduser() if section.dir else first.dir / "compare"
    files = folder / "sets"
    files.mkdir(parents=True, exist_ok=True)

    entries = list[Entry]()  # sets: of the runs, from elsewhere, and tiles
    for run in runs:
        cost = run.selection_seconds() + run.seconds("distill")
        entries.append(sets.tensors_of(run.synthetic, normalization).entry(run.name, "distilled", cost, files))
    for name, path in section.external.items():
        if name in [run.name for run in runs]:
            raise UserError(f"compare.external: a run has the name {name!r}, too; give the set another name")
        entries.append(external.load(name, path, data, normalization).entry(name, "external", None, files))
    compared = list(entries)
    if PCA.section_name in section.baselines:
        try:
            crop, factor = PCA.protocol(config).crop, config.distill.pca.factor
            for ipc in sorted({max(1, one.stored // len(counts)) for one in compared}):
                tiled = sets.tiles(first.dir / "manifest.parquet", data, normalization, ipc, factor, crop)
                entries.append(tiled.entry(f"pca, {ipc} per class", "tiles", first.selection_seconds(), files))
        except UserError as error:
            left_out.append(f"pca: {error}")

    # real samples, at random or in an order
    wanted = [name for name in section.baselines if name not in (RANDOM, PCA.section_name)]
    orders, missing = sets.orders(first.dir / "scores.parquet", wanted, counts)
    drawn: dict[str, Path | None] = {RANDOM: None} if RANDOM in section.baselines else {}
    for name, order in orders.items():
        drawn[name] = file = files / f"order-{name}.safetensors"
        safetensors_io.save(file, order)
    teacher = _teacher_inputs(config, first) if any(labels != "hard" for labels in section.labels) else None
    plan = Plan(config, runs, folder, entries, protocols, [*missing, *left_out], teacher)
    entries += sets.baselines(compared, drawn, data, section, plan.epochs, first.seconds("score"))
    if section.full_seeds:
        entries.append(Entry(FULL, "full", data.stored_bytes, sum(counts), sum(counts), cost=0.0))
    for line in plan.left_out:
        display.say(f"  left out: {line}")
    if any(run.config.evaluate.split == "held_out" for run in runs):
        display.say("  all networks are tested on the test split; a comparison does not read evaluate.split")
    return plan


def _checked(first: FinishedRun) -> Config:
    """The configuration of the first run with its precisions resolved and the networks of the comparison.

    Raises UserError for names and keys that do not fit the data.
    """
    config = precision.resolved(first.config)
    section = config.compare
    for key, names in (("networks", section.networks), ("teacher.teacher_network", [section.teacher.teacher_network])):
        for name in names:
            builder(f"compare.{key}", name)
    Augmentation(section.teacher.teacher_augment)  # raises UserError for an unknown family
    if "soft" in section.labels and first.data.kind == "tensors":
        raise UserError("compare.labels: soft needs a teacher of images or clips, and the data are arrays; use hard")
    networks, seeds = section.networks or config.evaluate.networks, section.seeds or config.evaluate.seeds
    evaluate = config.evaluate.model_copy(update={"networks": networks, "seeds": seeds})
    config = config.model_copy(update={"evaluate": evaluate})
    try:
        validate.check_networks(config, first.data)
    except UserError as error:
        raise UserError(str(error).replace("evaluate.networks", "compare.networks or evaluate.networks")) from None
    return config


def _units(plan: Plan) -> dict[str, Unit]:
    """All networks by the key of what decides each; entries of the same samples share them."""
    config, first, units = plan.config, plan.runs[0], dict[str, Unit]()
    shared = {
        "width": config.distill.width, "depth": config.distill.depth, "seed": config.run.seed, "version": VERSION,
        "precision": config.evaluate.precision, "data": first.dir.content("ingest"),
    }  # fmt: skip
    of_teacher, teacher = config.compare.teacher, plan.teacher.fingerprint if plan.teacher else ""
    for entry in plan.entries:
        content = file_digest(entry.file) if entry.file else None
        for (labels, augment), protocol in plan.protocols.items():
            seeds, decides = config.evaluate.seeds, dict[str, Any](file=content)
            if entry.kind == "full":  # with hard labels, and with augmentation where that is compared
                if labels != "hard" or augment != max(other for _, other in plan.protocols):
                    continue
                protocol, seeds = replace(protocol, epochs=config.evaluate.bound_epochs), config.compare.full_seeds
            if entry.crop is not None and augment and labels != "views":
                protocol = replace(protocol, crop=entry.crop)
            labelled = [of_teacher.top_k, min(of_teacher.label_epochs, protocol.epochs)]
            if labels == "views" and labelled != [None, protocol.epochs]:  # of every epoch and class
                decides["views"] = labelled
            decides |= {"protocol": asdict(protocol), "teacher": teacher if entry.needs_teacher(labels) else ""}
            for network, seed in itertools.product(config.evaluate.networks, range(seeds)):
                job = Job(entry.name, entry.per_class.get(labels, 0), labels, augment, network, seed)
                key = digest({**shared, **decides, "job": asdict(job)})
                units[key] = Unit((job, protocol), inputs=(entry.file,) if entry.file else ())
    return units


def _teacher_inputs(config: Config, first: FinishedRun) -> StageInputs:
    """What decides the teacher's weights."""
    config = teacher_config(config)
    options = engine.method_class(config).network_options(config)
    values = {**options, "distill.seed": config.distill_seed, "distill.precision": config.distill.precision}
    stages = ("ingest", "select") if config.select.held_out else ("ingest",)  # it is not trained on what is held out
    return StageInputs(values, {stage: first.dir.content(stage) for stage in stages})


def _train_teacher(plan: Plan, executor: Executor, display: Display) -> None:
    """Train the teacher on the whole training split, or resume; its seconds are kept beside it."""
    config, first, folder = teacher_config(plan.config), plan.runs[0], plan.networks
    if (folder / FACTS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    every, began = folder / "manifest.parquet", time.perf_counter()
    kept = controls.write_manifest(first.dir / "manifest.parquet", every, first.data, UNPRUNED, 0)["kept"]
    paths = DistillPaths(first.dir / "prepared", every, folder, folder / "unused.jsonl", folder)
    samples = engine.method_class(config).network_epochs(config) * kept
    with display.meter("teacher", samples or 1, "samples" if samples else "networks") as meter:
        tasks.make_networks(executor, config, paths, [TEACHER], samples, meter.advance)
    write_json(folder / FACTS, {"seconds": round(time.perf_counter() - began, 3)})


def _train(
    plan: Plan, executor: Executor, display: Display, missing: dict[str, Unit], rows: dict[str, Any], log: Path
) -> None:
    """Train and test the missing networks; each row is logged when it is there."""
    keys = {unit.work[0]: key for key, unit in missing.items()}
    paths = {"prepared": plan.runs[0].dir / "prepared", "networks": plan.networks}
    with display.meter("compare", len(missing), "networks") as meter:

        def done(row: dict[str, Any]) -> None:
            job = Job(**{key: row[key] for key in Job.__dataclass_fields__})
            row = {"key": keys[job], **row}
            rows[row["key"]] = row
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            meter.advance(1, f"{job}: {row['top1']:.1%}")

        units = list(missing.values())
        executor.run(Task(Compare, plan.config, paths, units, total=len(_units(plan))), done)


def _finish(plan: Plan, rows: Sequence[dict[str, Any]], display: Display) -> Path:
    """Write the table, the facts and the page; print the leaderboard."""
    config, data, groups = plan.config, plan.runs[0].data, results.group(rows)
    counts, teacher = data.counts("train"), dict[str, Any]()
    if plan.teacher and (plan.networks / FACTS).exists():
        teacher = json.loads((plan.networks / FACTS).read_text(encoding="utf-8"))
        teacher["network"] = config.compare.teacher.teacher_network
    lines = results.table(plan.entries, groups, counts, config.compare, plan.epochs, teacher.get("seconds", 0.0))
    with publish(plan.folder / "compare.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(lines, results.SCHEMA), temporary)
    scores = results.robust_scores(plan.entries, groups, len(counts), config.evaluate.networks)
    of_sets = [one for one in scores if one["entry"] in [run.name for run in plan.runs]]
    needs = {
        "lrs": "the label-robust score needs hard labels, compare.full_seeds and the baseline random with the budget images",
        "ars": "the augmentation-robust score needs compare.augment=both and the baseline random with the budget images",
    }
    facts = {
        "data": last_name(config.data.path or "") or config.data.source,
        "runs": [{"name": r.name, "folder": r.dir.named, "method": r.synthetic.card["method"]} for r in plan.runs],
        "networks": config.evaluate.networks,
        "recipes": [
            {**asdict(one), "labels": labels, "augmented": augment} for (labels, augment), one in plan.protocols.items()
        ],
        "bound_epochs": config.evaluate.bound_epochs,
        "teacher": teacher or None,
        "tested": sum(data.counts("test")),
        "rows": lines,
        "scores": scores,
        "left_out": [*plan.left_out, *(why for key, why in needs.items() if all(one[key] is None for one in of_sets))],
        "settings": config.compare.model_dump(),
    }
    write_json(plan.folder / FACTS, facts)
    page = comparison.write(plan.folder / "compare.html", facts)
    display.console.print(comparison.terminal_table(facts))
    for name in ("compare.html", "compare.parquet"):
        display.say(f"  {plan.folder / name}")
    return page

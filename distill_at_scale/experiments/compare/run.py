"""The command `compare`: checks, sets, the teacher, networks, results.

A network is a unit of work. Its row is kept in `networks.jsonl` under a key of all that decides it, so the same command trains
only the networks that are missing, also after runs, baselines or networks were added.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import file_digest, publish, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared import manifest
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
from distill_at_scale.experiments.compare.sets import Entry, SetTensors
from distill_at_scale.experiments.compare.units import FULL, RANDOM, Compare, Job, recipe, teacher_config
from distill_at_scale.models import precision
from distill_at_scale.models.spec import builder
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor, Task, Unit
from distill_at_scale.pipeline.report import comparison
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.pruning.selection.ranking import RANDOM as RANDOM_SELECTION
from distill_at_scale.storage.filesystem import last_name
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

    @property
    def epochs(self) -> int:
        return next(iter(self.protocols.values())).epochs


def run(configs: Sequence[Config], display: Display, connect: Callable[[], Executor]) -> Path:
    """Compare finished runs; returns the page. The first configuration decides data, networks, recipes and folder.

    Raises UserError, before anything is trained, for runs that cannot be compared, for sets from elsewhere that do not fit, and
    for wrong names.
    """
    runs = open_runs(configs)
    first = runs[0]
    with first.dir.lock():
        plan = make_plan(runs, display)
        units = _units(plan)
        log = plan.folder / LOG
        rows = {row["key"]: row for row in _rows(log) if row["key"] in units}
        missing = {key: unit for key, unit in units.items() if key not in rows}
        display.say(
            f"compare: {len(units):,} networks on {len(plan.entries)} sets, {len(rows):,} of them trained before"
        )
        teacher = (
            json.loads(path.read_text(encoding="utf-8")) if (path := _teacher_folder(plan) / FACTS).exists() else {}
        )
        if missing:
            executor = connect()
            try:
                if any(labels != "hard" for labels, _ in plan.protocols):
                    teacher = _train_teacher(plan, executor, display)
                _train(plan, executor, display, missing, rows, log)
            finally:
                executor.close()
        return _finish(plan, [rows[key] for key in units], teacher, display)


def make_plan(runs: Sequence[FinishedRun], display: Display) -> Plan:
    """Check everything, write the tensors of all sets, and decide the entries. Says which baselines are left out."""
    first = runs[0]
    config, data = precision.resolved(first.config), first.data
    section, of_set = config.compare, first.synthetic.protocol
    for key, names in (("networks", section.networks), ("teacher.teacher_network", [section.teacher.teacher_network])):
        for name in names:
            builder(f"compare.{key}", name)
    changes = {
        "networks": section.networks or config.evaluate.networks,
        "seeds": section.seeds or config.evaluate.seeds,
    }
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})
    try:
        validate.check_networks(config, data)
    except UserError as error:
        raise UserError(str(error).replace("evaluate.networks", "compare.networks or evaluate.networks")) from None
    wanted = {"both": (True, False), "with": (True,), "without": (False,)}[section.augment]
    wanted = (False,) if data.kind == "tensors" else wanted
    protocols: dict[tuple[str, bool], TrainingProtocol] = {
        (labels, augment): recipe(config, of_set, labels, augment) for labels in section.labels for augment in wanted
    }
    Augmentation(section.teacher.teacher_augment)  # raises UserError for an unknown family
    if "soft" in section.labels and data.kind == "tensors":
        raise UserError("compare.labels: soft needs a teacher of images or clips, and the data are arrays; use hard")
    normalization = normalization_of(data)
    folder = Path(section.dir).expanduser() if section.dir else first.dir / "compare"
    (folder / "sets").mkdir(parents=True, exist_ok=True)
    epochs, entries, taken = next(iter(protocols.values())).epochs, list[Entry](), {run.name for run in runs}
    tensors: list[tuple[str, Any, SetTensors, float | None]] = [
        (run.name, "distilled", sets.tensors_of(run.synthetic, normalization), _cost(run)) for run in runs
    ]
    crops = {run.name: run.synthetic.protocol.crop for run in runs}
    for name, path in section.external.items():
        if name in taken:
            raise UserError(f"compare.external: a run has the name {name!r}, too; give the set another name")
        tensors.append((name, "external", external.load(name, path, data, normalization), None))
    ordered = [name for name in section.baselines if name not in (RANDOM, PCA.section_name)]
    orders, left_out = sets.orders(first.dir / "scores.parquet", ordered, data.counts("train"))
    if PCA.section_name in section.baselines:
        ipcs, factor = (
            {max(1, one.stored // len(data.class_names)) for _, _, one, _ in tensors},
            config.distill.pca.factor,
        )
        try:
            crop = PCA.protocol(config).crop
            for ipc in sorted(ipcs):
                name, where = f"pca, {ipc} per class", first.dir / "manifest.parquet"
                tiled = sets.tiles(where, data, normalization, ipc, factor)
                tensors.append((name, "tiles", tiled, first.seconds("score", "select")))
                crops[name] = crop
        except UserError as error:
            left_out.append(f"pca: {error}")
    for name, kind, one, cost in tensors:
        file = folder / "sets" / f"{digest(name)[:16]}.safetensors"
        one.save(file)
        size = math.prod(data.shape) * one.value_bytes
        soft = one.soft is not None
        made = Entry(
            name, kind, size, one.stored, len(one.labels), cost=cost, file=file, own_soft=soft, crop=crops.get(name)
        )
        entries.append(made)
    files: dict[str, Path | None] = {RANDOM: None} if RANDOM in section.baselines else {}
    for name, order in orders.items():
        files[name] = file = folder / "sets" / f"order-{name}.safetensors"
        safetensors_io.save(file, order)
    compared = [entry for entry in entries if entry.kind != "tiles"]
    entries += sets.baselines(compared, files, data, section, epochs, first.seconds("score"))
    if section.full_seeds:
        count = sum(data.counts("train"))
        entries.append(Entry(FULL, "full", data.stored_bytes, count, count, cost=0.0))
    for line in left_out:
        display.say(f"  left out: {line}")
    return Plan(config, runs, folder, entries, protocols, left_out)


def _cost(run: FinishedRun) -> float:
    """Seconds of scoring, if the selection needs the scores, of selection and of distillation."""
    facts = manifest.facts(run.dir / "manifest.parquet")
    scored = facts.get("criterion") != RANDOM_SELECTION and facts.get("kept", 0) < facts.get("of", 1)
    return run.seconds("select", "distill", *(("score",) if scored else ()))


def _units(plan: Plan) -> dict[str, Unit]:
    """All networks by the key of what decides each; entries of the same samples share them."""
    config, first = plan.config, plan.runs[0]
    sizes = {name: getattr(config.distill, name) for name in ("width", "depth")}
    shared = {
        **sizes,
        "seed": config.run.seed,
        "precision": config.evaluate.precision,
        "data": first.dir.content("ingest"),
    }
    contents = {entry.file: file_digest(entry.file) for entry in plan.entries if entry.file}
    teacher, units = _teacher_inputs(plan).fingerprint if config.compare.labels != ["hard"] else "", dict[str, Unit]()
    for entry in plan.entries:
        for (labels, augment), protocol in plan.protocols.items():
            seeds = config.evaluate.seeds
            if entry.kind == "full":  # with hard labels, and with augmentation where that is compared
                if labels != "hard" or augment != max(other for _, other in plan.protocols):
                    continue
                protocol, seeds = replace(protocol, epochs=config.evaluate.bound_epochs), config.compare.full_seeds
            if entry.crop is not None and augment and labels != "views":
                protocol = replace(protocol, crop=entry.crop)
            for network in config.evaluate.networks:
                for seed in range(seeds):
                    job = Job(entry.name, entry.per_class.get(labels, 0), labels, augment, network, seed)
                    of_teacher = teacher if labels == "views" or (labels == "soft" and not entry.own_soft) else ""
                    decides = {
                        "job": asdict(job),
                        "protocol": asdict(protocol),
                        "file": contents[entry.file] if entry.file else None,
                    }
                    key = digest({**shared, **decides, "teacher": of_teacher, "version": VERSION})
                    units[key] = Unit((job, protocol), inputs=(entry.file,) if entry.file else ())
    return units


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of finished networks; a line that an interruption cut short is left out."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _teacher_inputs(plan: Plan) -> StageInputs:
    """What decides the teacher's weights."""
    config, first = teacher_config(plan.config), plan.runs[0]
    options = engine.method_class(config).network_options(config)
    values = {**options, "distill.seed": config.distill_seed, "distill.precision": config.distill.precision}
    return StageInputs(values, {"ingest": first.dir.content("ingest")})


def _teacher_folder(plan: Plan) -> Path:
    return plan.folder / "networks" / _teacher_inputs(plan).fingerprint[:16]


def _train_teacher(plan: Plan, executor: Executor, display: Display) -> dict[str, Any]:
    """Train the teacher on the whole training split, or resume; its seconds are kept beside it."""
    config, first, folder = teacher_config(plan.config), plan.runs[0], _teacher_folder(plan)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FACTS).exists():
        return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    every, began = folder / "manifest.parquet", time.perf_counter()
    kept = controls.write_manifest(first.dir / "manifest.parquet", every, first.data, UNPRUNED, 0)["kept"]
    paths = DistillPaths(first.dir / "prepared", every, folder, folder / "unused.jsonl", folder)
    samples = engine.method_class(config).network_epochs(config) * kept
    with display.meter("teacher", samples or 1, "samples" if samples else "networks") as meter:
        tasks.make_networks(executor, config, paths, [TEACHER], samples, meter.advance)
    facts = {"seconds": round(time.perf_counter() - began, 3)}
    write_json(folder / FACTS, facts)
    return facts


def _train(
    plan: Plan, executor: Executor, display: Display, missing: dict[str, Unit], rows: dict[str, Any], log: Path
) -> None:
    """Train and test the missing networks; each row is logged when it is there."""
    keys = {unit.work[0]: key for key, unit in missing.items()}
    log.write_text("".join(json.dumps(row) + "\n" for row in _rows(log)), encoding="utf-8")  # without a line cut short
    paths = {"prepared": plan.runs[0].dir / "prepared", "networks": _teacher_folder(plan)}
    with display.meter("compare", len(missing), "networks") as meter:

        def done(row: dict[str, Any]) -> None:
            job = Job(**{key: row[key] for key in Job.__dataclass_fields__})
            row = {"key": keys[job], **row}
            rows[row["key"]] = row
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            meter.advance(1, f"{row['set']} {row['top1']:.3f}")

        units = list(missing.values())
        executor.run(Task(Compare, plan.config, paths, units, total=len(_units(plan))), done)


def _finish(plan: Plan, rows: Sequence[dict[str, Any]], teacher: dict[str, Any], display: Display) -> Path:
    """Write the table, the facts and the page; print the leaderboard."""
    config, data, groups = plan.config, plan.runs[0].data, results.group(rows)
    counts, seconds = data.counts("train"), float(teacher.get("seconds", 0.0))
    lines = results.table(plan.entries, groups, counts, config.compare, plan.epochs, seconds)
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
        "runs": [
            {"name": one.name, "folder": one.dir.named, "method": one.synthetic.card["method"]} for one in plan.runs
        ],
        "networks": config.evaluate.networks,
        "recipes": [
            {**asdict(one), "labels": labels, "augmented": augment} for (labels, augment), one in plan.protocols.items()
        ],
        "bound_epochs": config.evaluate.bound_epochs,
        "teacher": {**teacher, "network": config.compare.teacher.teacher_network} if teacher else None,
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

"""The plan of a run: makes the estimates of all stages, says what does not fit, keeps plan.json, and prints the table.

A prediction made before a stage ran is kept, so that it can be compared with the time the stage took.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.environment import Machine, other_programs
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.evaluate import can_test
from distill_at_scale.pipeline.executors.layout import Layout
from distill_at_scale.pipeline.planning.dry_run import DryRun
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.storage.run_dir import STAGES

LOOK, QUIET = 1.0, 0.2  # seconds in which the load is measured; cores that other programs may use on an idle machine
USABLE = 0.95  # of the memory
UNITS = (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 48 * 3600.0), ("days", 86400.0, float("inf")))
GB = 1e9
SMALLER = {  # keys to lower if a stage does not fit in memory
    "ingest": "data.chunk or cluster.actors",
    "score": "score.batch, score.width or cluster.actors",
    "select": "the number of samples",
    "distill": "distill.ipc, distill.width or the method's real_batch, use more machines, or set distill.hold=shards",
    "evaluate": "distill.ipc or evaluate.networks",
}


@dataclass(frozen=True)
class RunPlan:
    stages: list[StageEstimate]
    problems: list[str]
    load: str = ""  # what other programs use

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.stages)

    @property
    def cost(self) -> float | None:
        costs = [one.cost for one in self.stages if one.cost is not None]
        return sum(costs) if costs else None

    def refuse(self) -> None:
        """Raise UserError with everything that does not fit, if anything does not."""
        if self.problems:
            raise UserError("this run does not fit here:\n  " + "\n  ".join(self.problems))


def make(
    config: Config, facts: PlannedDataset, machine: Machine, path: Path, records: Mapping[str, Mapping[str, Any]],
    advance: Callable[[str], None], prepared: PreparedDataset | None = None,
) -> RunPlan:  # fmt: skip
    """Measure, estimate, and publish the plan at `path`. What cannot fit by its size alone is not measured.

    Args:
        records: the records of finished stages, by name; predictions that were made before are kept.
        advance: called with the name of each stage after its measurement.
        prepared: the output of a finished ingest, whose samples are measured.

    Raises:
        UserError: too few samples or classes for the configuration. What does not fit is among the plan's problems instead.
    """
    engine.check_inputs(config, facts, facts.kept)
    earlier, used = read(path, config), other_programs(LOOK)
    layout = Layout(config, machine, used if used > QUIET else 0.0)
    load = f"other programs use {used:.1f} of {machine.cores} cores now: the times hold for this load"
    actual = {name: record["seconds"] for name, record in records.items() if not record.get("reused_from")}
    names = [name for name in STAGES if name != "evaluate" or can_test(config, facts)]
    stages, once = list[StageEstimate](), {"start", "load"}
    with closing(DryRun(config, facts, layout, prepared)) as measured:
        planner = Planner(config, facts, layout, measured)
        found = problems(config, layout, [planner.size(name) for name in names if name not in records])
        for name in [] if found else names:
            if name in records and name in earlier and earlier[name].before:
                stages.append(replace(earlier[name], actual=actual.get(name)))
            elif name != "ingest" or facts.listing is not None:  # a finished ingest has nothing left to measure
                one = replace(getattr(planner, name)(), actual=actual.get(name), before=name not in actual)
                if name not in records:  # in the first stage of all, and in the first that trains
                    trains = one.parts.keys() & {"proxies", "steps"}
                    one = one.later(RAY * measured.start, "start") if "start" in once and not layout.local else one
                    one = one.later(measured.load, "load") if "load" in once and trains else one
                    once -= {"start", "load"} if trains else {"start"}
                price = (config.cluster.price or 0.0) * (one.processes if layout.remote else 1)
                stages.append(replace(one, cost=one.seconds / 3600 * price if price else None))
            advance(name)
    found = found or problems(config, layout, [one for one in stages if one.actual is None])
    plan = RunPlan(stages, found, load if used > QUIET else "")
    rows = {one.stage: asdict(one) | {"seconds": one.seconds, "off": one.off} for one in stages}
    total = {"seconds": plan.seconds, "cost": plan.cost}
    values = {"configuration": identity(config), "machine": asdict(machine), "stages": rows, "total": total}
    write_json(path, values | {"problems": plan.problems, "load": plan.load})
    return plan


def identity(config: Config) -> str:
    """A hash of everything in a configuration that decides the predictions."""
    values = config.model_dump()
    run = values.pop("run")
    return digest([values, run["seed"]])


def read(path: Path, config: Config) -> dict[str, StageEstimate]:
    """The stages of an earlier plan of the same configuration; empty if there is none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["configuration"] == identity(config):
            keys = StageEstimate.__dataclass_fields__
            return {name: StageEstimate(**{key: one[key] for key in keys}) for name, one in stored["stages"].items()}
    return {}


def problems(config: Config, layout: Layout, stages: Sequence[StageEstimate]) -> list[str]:
    """What does not fit, each with the key to change."""
    machine, share, lines = layout.machine, config.cluster.gpus_per_worker, list[str]()
    if not layout.local and not layout.remote:
        for key, count in {
            "distill.workers": config.distill.min_workers,
            "score.workers": config.score.workers,
        }.items():
            if count > machine.cores:
                there = f"this machine has {machine.cores}; lower {key} to {machine.cores}"
                lines.append(f"{key} = {count} needs {count} cores, {there}")
        if share > machine.gpus:
            there = f"this machine has {machine.gpus} GPUs; lower it (0 runs on CPUs)"
            lines.append(f"cluster.gpus_per_worker = {share:g}, {there}")
        elif share * config.distill.min_workers > machine.gpus:
            lines.append(
                f"distill.workers = {config.distill.workers} with cluster.gpus_per_worker = {share:g} do not fit on "
                f"{machine.gpus} GPUs; lower distill.workers or cluster.gpus_per_worker"
            )
    kept, gpu_memory, needs = 0, machine.gpu_memory * min(1.0, share or 1.0), [(0, "")]
    for one in stages:
        lower, needed = SMALLER.get(one.stage, "the sizes"), f"{one.stage} needs about"
        if one.host * one.processes > USABLE * machine.memory and not layout.remote:
            each = f"{one.host / GB:.1f} GB of memory in each of {one.processes} processes"
            lines.append(f"{needed} {each}, this machine has {machine.memory / GB:.1f} GB; lower {lower}")
        if one.device and one.device > USABLE * gpu_memory:
            has = f"a worker has {gpu_memory / GB:.1f} GB"
            lines.append(f"{needed} {one.device / GB:.1f} GB of GPU memory, {has}; lower {lower}")
        needs.append((kept + one.disk + one.at_peak, one.stage))
        kept += one.disk
    if (peak := max(needs))[0] > machine.disk:
        most = f"the run needs about {peak[0] / GB:.1f} GB on the run folder's disk (most in {peak[1]})"
        there = (
            f"{machine.disk / GB:.1f} GB are free; set run.dir to another disk, lower data.size, or set data.store=jpeg"
        )
        lines.append(f"{most}, {there}")
    return lines


def table(config: Config, plan: RunPlan) -> Table:
    """One row per stage, and the total. A deviation in brackets is that of a prediction made after the stage ran."""
    done, priced = any(one.actual is not None for one in plan.stages), plan.cost is not None
    result = Table(title=f"plan: {config.distill.method}, {config.distill.ipc} per class")
    columns = ["stage", "expected", *(["actual", "off"] if done else []), "processes × memory", "GPU memory", "disk"]
    for name in [*columns, *(["cost"] if priced else [])]:
        result.add_column(name, justify="left" if name == "stage" else "right")
    for one in plan.stages:
        cells = [one.stage, f"{in_words(one.seconds)} ({in_words(one.low)} – {in_words(one.high)})"]
        if done:
            off = "" if one.off is None else f"{one.off:+.0%}" if one.before else f"({one.off:+.0%})"
            cells += ["" if one.actual is None else in_words(one.actual), off]
        cells += [f"{one.processes} × {_bytes(one.host)}", _bytes(one.device) if one.device else ""]
        cells += [_bytes(one.disk + one.at_peak), *([] if one.cost is None else [f"{one.cost:,.2f}"])]
        result.add_row(*cells)
    total = ["total", in_words(plan.seconds), *(["", ""] if done else []), "", "", ""]
    result.add_row(*total, *([] if plan.cost is None else [f"{plan.cost:,.2f}"]))
    return result


def remarks(plan: RunPlan) -> list[str]:
    """What other programs use, and the parts of each estimate, as lines."""
    lines = [f"  {plan.load}"] if plan.load else []
    for one in plan.stages:
        parts = ", ".join(f"{part} {in_words(seconds)}" for part, seconds in one.parts.items())
        lines.append(f"  {one.stage}: {'; '.join([parts, *one.notes])}")
    return lines


def in_words(seconds: float) -> str:
    """4.2 s, 3.1 min, 2.5 h or 1.8 days."""
    name, size, _ = next(unit for unit in UNITS if seconds < unit[2])
    return f"{seconds / size:,.1f} {name}"


def _bytes(size: float) -> str:
    name, unit = next(((n, u) for n, u in (("GiB", 2**30), ("MiB", 2**20)) if size >= u), ("KiB", 2**10))
    return f"{size / unit:,.{int(name == 'GiB')}f} {name}"

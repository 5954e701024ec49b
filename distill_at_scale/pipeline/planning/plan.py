"""The plan of a run: predictions per stage, what does not fit, advice, the file plan.json, and the table for people.

A prediction made before a stage ran is kept, so that it can be compared with the time the stage took.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.pipeline.planning.estimates import StageEstimate
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Machine

LONG = 7 * 24 * 3600.0  # seconds; a longer stage gets advice
USABLE = 0.95  # of the memory
METHOD_PARTS = ("steps", "start", "prepare")  # of each distillation; what other parts make is used again
MIB, GIB, GB = 2**20, 2**30, 1e9
SMALLER = {  # keys to lower if a stage does not fit in memory
    "ingest": "data.chunk or cluster.actors",
    "score": "score.batch, score.width or cluster.actors",
    "select": "the number of samples",
    "distill": "distill.ipc, distill.width or the method's real_batch, use more machines, or set distill.hold=shards",
    "evaluate": "distill.ipc or evaluate.networks",
}
FASTER = {
    "ingest": "raise cluster.actors on a machine with more cores",
    "score": "lower score.trials, score.epochs, score.share or score.width, or use GPUs (cluster.gpus_per_worker)",
    "distill": "lower distill.steps, select.keep or the method's real_batch, or use GPUs (cluster.gpus_per_worker)",
    "evaluate": "lower evaluate.seeds or evaluate.epochs",
}


@dataclass(frozen=True)
class PlanRow:
    """One stage: the prediction, its cost, and the seconds that the stage took if it has run."""

    estimate: StageEstimate
    cost: float | None
    actual: float | None = None
    before: bool = True  # whether the prediction was made before the stage ran

    @property
    def off(self) -> float | None:
        """predicted / actual - 1."""
        return None if not self.actual else self.estimate.seconds / self.actual - 1


@dataclass(frozen=True)
class RunPlan:
    rows: list[PlanRow]
    problems: list[str]
    advice: list[str]
    load: str = ""  # what other programs use, and the time without them

    @property
    def seconds(self) -> float:
        return sum(row.estimate.seconds for row in self.rows)

    @property
    def cost(self) -> float | None:
        costs = [row.cost for row in self.rows if row.cost is not None]
        return sum(costs) if costs else None

    def refuse(self) -> None:
        """Raise UserError with everything that does not fit, if anything does not."""
        if self.problems:
            raise UserError("this run does not fit here:\n  " + "\n  ".join(self.problems))


def problems(config: Config, layout: ClusterLayout, estimates: list[StageEstimate]) -> list[str]:
    """What does not fit, each with the key to change."""
    machine, share, lines = layout.machine, config.cluster.gpus_per_worker, list[str]()
    if not layout.local and not layout.remote:
        workers = {"distill.workers": config.distill.min_workers, "score.workers": config.score.workers}
        for key, count in workers.items():
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
    kept, peak, peak_stage = 0, 0, ""
    for estimate in estimates:
        smaller = SMALLER.get(estimate.stage, "the sizes")
        if estimate.host * estimate.processes > USABLE * machine.memory:
            lines.append(
                f"{estimate.stage} needs about {estimate.host / GB:.1f} GB of memory in each of {estimate.processes} "
                f"processes, this machine has {machine.memory / GB:.1f} GB; lower {smaller}"
            )
        gpu_memory = machine.gpu_memory * min(1.0, share or 1.0)
        if estimate.device and estimate.device > USABLE * gpu_memory:
            lines.append(
                f"{estimate.stage} needs about {estimate.device / GB:.1f} GB of GPU memory, a worker has "
                f"{gpu_memory / GB:.1f} GB; lower {smaller}"
            )
        needed = kept + estimate.disk + estimate.at_peak
        if needed > peak:
            peak, peak_stage = needed, estimate.stage
        kept += estimate.disk
    if peak > machine.disk:
        lines.append(
            f"the run needs about {peak / GB:.1f} GB on the run folder's disk (most in {peak_stage}), "
            f"{machine.disk / GB:.1f} GB are free; set run.dir to another disk, lower data.size, or set data.store=jpeg"
        )
    return lines


def advice(estimates: list[StageEstimate]) -> list[str]:
    """Stages that are possible but expensive, each with what to change."""
    lines = []
    for estimate in estimates:
        part, seconds = max(estimate.parts.items(), key=lambda item: item[1])
        if estimate.seconds > LONG:
            faster = FASTER.get(estimate.stage, "use more machines")
            lines.append(f"{estimate.stage} takes {in_words(estimate.seconds)} here, most of it for: {part}; {faster}")
        elif estimate.stage == "distill" and part not in METHOD_PARTS and 2 * seconds > estimate.seconds:
            again = "every run of this folder with the same networks uses the result again"
            lines.append(f"distill: {part} takes {in_words(seconds)}, longer than the steps; {again}")
    return lines


def combine(
    config: Config,
    layout: ClusterLayout,
    estimates: list[StageEstimate],
    earlier: Mapping[str, Any],
    actual: Mapping[str, float],
    load: str = "",
) -> RunPlan:
    """Predictions beside the seconds of finished stages; `earlier` is a plan of the same configuration, or empty."""
    rows = []
    for estimate in estimates:
        seconds = actual.get(estimate.stage)
        stored = earlier.get("stages", {}).get(estimate.stage)
        before = seconds is None or bool(stored and stored["before"])
        if seconds is not None and stored and stored["before"]:
            estimate = StageEstimate(**stored["estimate"])
        rows.append(PlanRow(estimate, estimate.cost(config.cluster.price), seconds, before))
    pending = [row.estimate for row in rows if row.actual is None]
    return RunPlan(rows, problems(config, layout, pending), advice(pending), load)


def identity(config: Config) -> str:
    """A hash of everything in a configuration that decides the predictions."""
    values = config.model_dump()
    run = values.pop("run")
    return digest([values | {"price": None}, run["seed"]])


def read(path: Path, config: Config) -> dict[str, Any]:
    """An earlier plan of the same configuration; empty if there is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if stored.get("configuration") == identity(config) else {}


def write(path: Path, config: Config, machine: Machine, plan: RunPlan) -> None:
    """Write plan.json: per stage the estimate, cost, actual seconds and deviation; totals, problems and advice."""
    stages = {
        row.estimate.stage: {
            "estimate": asdict(row.estimate),
            "seconds": round(row.estimate.seconds, 3),
            "range": [round(row.estimate.low, 3), round(row.estimate.high, 3)],
            "cost": row.cost,
            "actual_seconds": row.actual,
            "off": None if row.off is None else round(row.off, 3),
            "before": row.before,
        }
        for row in plan.rows
    }
    values = {
        "configuration": identity(config),
        "machine": asdict(machine),
        "stages": stages,
        "total": {"seconds": round(plan.seconds, 3), "cost": plan.cost},
        "problems": plan.problems,
        "advice": plan.advice,
        "load": plan.load,
    }
    write_json(path, values)


def table(config: Config, plan: RunPlan) -> Table:
    """One row per stage, and the total. A deviation in brackets is that of a prediction made after the stage ran."""
    done, priced = any(row.actual is not None for row in plan.rows), plan.cost is not None
    result = Table(title=f"plan: {config.distill.method}, {config.distill.ipc} per class")
    columns = ["stage", "expected", *(["actual", "off"] if done else []), "processes × memory", "GPU memory", "disk"]
    for name in [*columns, *(["cost"] if priced else [])]:
        result.add_column(name, justify="left" if name == "stage" else "right")
    for row in plan.rows:
        estimate = row.estimate
        cells = [estimate.stage, f"{in_words(estimate.seconds)} ({in_words(estimate.low)} – {in_words(estimate.high)})"]
        if done:
            off = "" if row.off is None else f"{row.off:+.0%}" if row.before else f"({row.off:+.0%})"
            cells += ["" if row.actual is None else in_words(row.actual), off]
        cells += [f"{estimate.processes} × {_bytes(estimate.host)}", _bytes(estimate.device) if estimate.device else ""]
        cells += [_bytes(estimate.disk + estimate.at_peak), *([] if row.cost is None else [f"{row.cost:,.2f}"])]
        result.add_row(*cells)
    total = ["total", in_words(plan.seconds), *(["", ""] if done else []), "", "", ""]
    result.add_row(*total, *([] if plan.cost is None else [f"{plan.cost:,.2f}"]))
    return result


def remarks(plan: RunPlan) -> list[str]:
    """The parts of each estimate as lines, then the advice."""
    lines = []
    for row in plan.rows:
        parts = ", ".join(f"{part} {in_words(seconds)}" for part, seconds in row.estimate.parts.items())
        lines.append(f"  {row.estimate.stage}: {'; '.join([parts, *row.estimate.notes])}")
    if plan.load:
        lines.insert(0, f"  {plan.load}")
    return lines + [f"  advice: {line}" for line in plan.advice]


def in_words(seconds: float) -> str:
    """4.2 s, 3.1 min, 2.5 h or 1.8 days."""
    for unit, size, limit in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 48 * 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def _bytes(size: float) -> str:
    if size >= GIB:
        return f"{size / GIB:,.1f} GiB"
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size / 1024:,.0f} KiB"

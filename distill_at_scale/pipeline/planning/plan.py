"""The plan as a whole: what cannot fit, with advice; the file plan.json; and predictions beside what stages really took.

A prediction that was made before a stage ran is kept, so that it can be judged afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.pipeline.planning.estimates import StageEstimate
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Machine

LONG = 7 * 24 * 3600.0  # seconds from which a stage is worth a word
USABLE = 0.95  # of the memory
MIB, GB = 2**20, 1e9
HOST_KEYS = {
    "ingest": "data.chunk or cluster.actors",
    "score": "score.batch, score.width or cluster.actors",
    "select": "the number of samples",
    "distill": "distill.ipc, distill.width or the method's real_batch, use more machines, or set distill.hold=shards",
    "evaluate": "distill.ipc or evaluate.networks",
}


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan: what was predicted, and what the stage took where it has been run."""

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

    @property
    def seconds(self) -> float:
        return sum(row.estimate.seconds for row in self.rows)

    @property
    def cost(self) -> float | None:
        costs = [row.cost for row in self.rows if row.cost is not None]
        return sum(costs) if costs else None

    def refuse(self) -> None:
        """Raises UserError with everything that cannot fit."""
        if self.problems:
            raise UserError("this run does not fit here:\n  " + "\n  ".join(self.problems))


def problems(config: Config, layout: ClusterLayout, estimates: list[StageEstimate]) -> list[str]:
    """What cannot fit, each with the key to change."""
    found = _workers(config, layout)
    for estimate in estimates:
        found += _memory(estimate, layout.machine, config)
    return found + _disk(estimates, layout.machine)


def _workers(config: Config, layout: ClusterLayout) -> list[str]:
    if layout.alone or layout.remote:
        return []
    cores, gpus, share = layout.machine.cores, layout.machine.gpus, config.cluster.gpus_per_worker
    wanted = {"distill.workers": config.distill.min_workers, "score.workers": config.score.workers}
    found = [f"{key} = {count} needs as many cores, this machine has {cores}; lower {key} to {cores}"
             for key, count in wanted.items() if count > cores]  # fmt: skip
    if share > gpus:
        found.append(f"cluster.gpus_per_worker = {share:g}, this machine has {gpus} GPUs; lower it (0 runs on CPUs)")
    elif share * config.distill.min_workers > gpus:
        found.append(f"distill.workers = {config.distill.workers} with cluster.gpus_per_worker = {share:g} do not fit on "
                     f"{gpus} GPUs; lower distill.workers or cluster.gpus_per_worker")  # fmt: skip
    return found


def _memory(estimate: StageEstimate, machine: Machine, config: Config) -> list[str]:
    together, found = estimate.host * estimate.processes, []
    if together > USABLE * machine.memory:
        found.append(
            f"{estimate.stage} needs about {estimate.host / GB:.1f} GB of memory in each of {estimate.processes} processes, "
            f"this machine has {machine.memory / GB:.1f} GB; lower {HOST_KEYS.get(estimate.stage, 'the sizes')}"
        )
    room = machine.gpu_memory * min(1.0, config.cluster.gpus_per_worker or 1.0)
    if estimate.device and estimate.device > USABLE * room:
        found.append(
            f"{estimate.stage} needs about {estimate.device / GB:.1f} GB of GPU memory, a worker has {room / GB:.1f} GB; lower "
            f"{HOST_KEYS.get(estimate.stage, 'the sizes')}"
        )
    return found


def _disk(estimates: list[StageEstimate], machine: Machine) -> list[str]:
    left, most, where = 0, 0, ""
    for estimate in estimates:
        now = left + estimate.disk + estimate.at_peak
        most, where = (now, estimate.stage) if now > most else (most, where)
        left += estimate.disk
    if most <= machine.disk:
        return []
    return [
        f"the run needs about {most / GB:.1f} GB on the run folder's disk (most in {where}), "
        f"{machine.disk / GB:.1f} GB are free; set run.dir to another disk, lower data.size, or set data.store=jpeg"
    ]


def advice(estimates: list[StageEstimate]) -> list[str]:
    """What is worth a second thought, without being impossible."""
    found = []
    for estimate in estimates:
        what, seconds = max(estimate.parts.items(), key=lambda part: part[1])
        if estimate.seconds > LONG:
            found.append(f"{estimate.stage} takes {in_words(estimate.seconds)} here, most of it for: {what}; "
                         f"{LONGER.get(estimate.stage, 'use more machines')}")  # fmt: skip
        elif (
            estimate.stage == "distill" and what not in ("steps", "start", "prepare") and seconds > estimate.seconds / 2
        ):
            found.append(f"distill: {what} takes {in_words(seconds)}, longer than the steps; they are kept and used again by "
                         "every run of this folder with the same networks")  # fmt: skip
    return found


LONGER = {
    "ingest": "raise cluster.actors on a machine with more cores",
    "score": "lower score.trials, score.epochs, score.share or score.width, or use GPUs (cluster.gpus_per_worker)",
    "distill": "lower distill.steps, select.keep or the method's real_batch, or use GPUs (cluster.gpus_per_worker)",
    "evaluate": "lower evaluate.seeds or evaluate.epochs",
}


def combine(
    config: Config,
    layout: ClusterLayout,
    estimates: list[StageEstimate],
    earlier: Mapping[str, Any],
    actual: Mapping[str, float],
) -> RunPlan:
    """Predictions with what finished stages took; `earlier` is a plan of the same configuration, or empty."""
    rows = []
    for estimate in estimates:
        took = actual.get(estimate.stage)
        stored = earlier.get("stages", {}).get(estimate.stage)
        before = took is None or bool(stored and stored["before"])
        if took is not None and stored and stored["before"]:
            estimate = StageEstimate(**stored["estimate"])
        rows.append(PlanRow(estimate, estimate.cost(config.cluster.price), took, before))
    waiting = [row.estimate for row in rows if row.actual is None]
    return RunPlan(rows, problems(config, layout, waiting), advice(waiting))


def identity(config: Config) -> str:
    """What a stored prediction must share with a configuration: all that decides its seconds."""
    values = config.model_dump()
    return digest([{k: v for k, v in values.items() if k != "run"} | {"price": None}, values["run"]["seed"]])


def read(path: Path, config: Config) -> dict[str, Any]:
    """An earlier plan of the same configuration; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("configuration") == identity(config) else {}


def write(path: Path, config: Config, machine: Machine, outcome: RunPlan) -> None:
    """plan.json: per stage the estimate, cost, actual seconds and how far off; totals, problems and advice."""
    stages = {
        row.estimate.stage: {
            "estimate": asdict(row.estimate),
            "seconds": round(row.estimate.seconds, 3),
            "cost": row.cost,
            "actual_seconds": row.actual,
            "off": None if row.off is None else round(row.off, 3),
            "before": row.before,
        }
        for row in outcome.rows
    }
    totals = {"seconds": round(outcome.seconds, 3), "cost": outcome.cost}
    write_json(path, {"configuration": identity(config), "machine": asdict(machine), "stages": stages, "total": totals,
                      "problems": outcome.problems, "advice": outcome.advice})  # fmt: skip


def in_words(seconds: float) -> str:
    """Such as 4.2 s, 3.1 min, 2.5 h or 1.8 days."""
    for unit, size, most in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 48 * 3600.0)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"

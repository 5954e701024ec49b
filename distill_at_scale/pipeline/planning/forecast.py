"""A whole plan: every stage's estimate in order, and the table that says it.

Stages that were finished are estimated again only where no earlier prediction is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_at_scale.config.load import Config
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.evaluate import jobs, need_test_split
from distill_at_scale.pipeline.planning import plan as outcome
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Machine
from distill_at_scale.pipeline.planning.plan import RunPlan, in_words

Advance = Callable[[str], None]  # called with each stage when it has been measured
MIB, GIB = 2**20, 2**30


def make(
    config: Config,
    facts: Facts,
    machine: Machine,
    path: Path,
    records: Mapping[str, Mapping[str, Any]],
    advance: Advance,
) -> RunPlan:
    """Measure, estimate, and publish the plan at `path`; `records` are those of finished stages.

    Raises UserError for what no stage could do (too few samples or classes); what does not fit is among its problems.
    """
    distill.check(config, facts, facts.kept)
    layout, earlier = ClusterLayout(config, machine), outcome.read(path, config)
    estimates: list[StageEstimate] = []
    for stage in _stages(facts):
        estimates += _estimate(stage, Planner(config, facts, layout), earlier, records)
        advance(stage)
    if config.select.keep == "auto":
        need_test_split(facts)
        estimates = _with_search(estimates, config, layout)
    estimates = _with_ray(estimates, layout, records)
    actual = {stage: record["seconds"] for stage, record in records.items() if not record.get("reused_from")}
    found = outcome.combine(config, layout, estimates, earlier, actual)
    outcome.write(path, config, machine, found)
    return found


def _stages(facts: Facts) -> list[str]:
    return ["ingest", "score", "select", "distill", *(["evaluate"] if facts.has_test() else []), "report"]


def _estimate(
    stage: str, planner: Planner, earlier: Mapping[str, Any], records: Mapping[str, Any]
) -> list[StageEstimate]:
    """An estimate; of a finished stage the stored one, and of a finished ingest without one none."""
    stored = earlier.get("stages", {}).get(stage)
    if stage in records and stored:
        return [StageEstimate(**stored["estimate"])]
    if stage == "ingest" and planner.facts.listing is None:
        return []
    return [getattr(planner, stage)()]


def _with_ray(estimates: list[StageEstimate], layout: ClusterLayout, records: Mapping[str, Any]) -> list[StageEstimate]:
    """Ray's own start, once per command, in the first stage that needs it."""
    if layout.alone:
        return estimates
    for k, estimate in enumerate(estimates):
        if estimate.stage not in records and "start" in estimate.parts:
            parts = {**estimate.parts, "start": estimate.parts["start"] + RAY}
            return [*estimates[:k], StageEstimate(**{**vars(estimate), "parts": parts}), *estimates[k + 1 :]]
    return estimates


def _with_search(estimates: list[StageEstimate], config: Config, layout: ClusterLayout) -> list[StageEstimate]:
    """Of select.keep: auto the short distillations, one actor each, before the selection; as if everything were kept."""
    auto, by_stage = config.select.auto, {estimate.stage: estimate for estimate in estimates}
    made, tested, steps = by_stage["distill"], by_stage["evaluate"], distill.step_count(config)
    short = (auto.steps or max(1, steps // 4)) / steps
    each = made.processes * (made.parts["steps"] * short + made.parts["prepare"])
    each += auto.evaluations * tested.processes * tested.parts["train and test"] / len(jobs(config))
    count = max(3, auto.seeds) + auto.points * auto.seeds
    chosen = by_stage["select"]
    note = f"select.keep: auto tries up to {count} short distillations; the stages after it are planned as if all were kept"
    parts = {**chosen.parts, "search": count * each / layout.actors().side_by_side}
    found = replace(chosen, parts=parts, notes=[*chosen.notes, note])
    return [found if estimate is chosen else estimate for estimate in estimates]


def table(config: Config, found: RunPlan) -> Table:
    """The plan for people: one row per stage, and the total."""
    done = any(row.actual is not None for row in found.rows)
    shown = Table(title=f"plan: {config.distill.method}, {config.distill.ipc} per class")
    columns = ["stage", "expected", *(["actual", "off"] if done else []), "processes × memory", "GPU memory", "disk"]
    for name in [*columns, *(["cost"] if found.cost is not None else [])]:
        shown.add_column(name, justify="left" if name == "stage" else "right")
    for row in found.rows:
        cells = [row.estimate.stage, in_words(row.estimate.seconds)]
        cells += [_actual(row.actual), _off(row)] if done else []
        cells += _sizes(row.estimate) + ([] if row.cost is None else [f"{row.cost:,.2f}"])
        shown.add_row(*cells)
    total = ["in all", in_words(found.seconds), *(["", ""] if done else []), "", "", ""]
    shown.add_row(*total, *([] if found.cost is None else [f"{found.cost:,.2f}"]))
    return shown


def remarks(found: RunPlan) -> list[str]:
    """What the estimates consist of, as lines, then advice."""
    lines = []
    for row in found.rows:
        parts = ", ".join(f"{what} {in_words(seconds)}" for what, seconds in row.estimate.parts.items())
        lines.append(f"  {row.estimate.stage}: {'; '.join([parts, *row.estimate.notes])}")
    return lines + [f"  advice: {line}" for line in found.advice]


def _actual(seconds: float | None) -> str:
    return "" if seconds is None else in_words(seconds)


def _off(row: outcome.PlanRow) -> str:
    """How far off; in brackets where the prediction was made afterwards."""
    if row.off is None:
        return ""
    return f"{row.off:+.0%}" if row.before else f"({row.off:+.0%})"


def _sizes(estimate: StageEstimate) -> list[str]:
    device = _bytes(estimate.device) if estimate.device else ""
    return [f"{estimate.processes} × {_bytes(estimate.host)}", device, _bytes(estimate.disk + estimate.at_peak)]


def _bytes(size: float) -> str:
    if size >= GIB:
        return f"{size / GIB:,.1f} GiB"
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size / 1024:,.0f} KiB"

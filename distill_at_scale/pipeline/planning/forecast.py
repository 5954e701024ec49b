"""Makes the plan of a run: measures, estimates every stage in order, and publishes plan.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.evaluate import jobs, require_test_split
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.dry_run import first_step
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate, later
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Load, Machine
from distill_at_scale.pipeline.planning.measurements import Measurements
from distill_at_scale.pipeline.planning.plan import RunPlan
from distill_at_scale.pipeline.stages import controls

LOOK = 0.5  # seconds in which the load is measured
QUIET = 0.2  # cores that other programs may use on an idle machine


def make(
    config: Config,
    facts: Facts,
    machine: Machine,
    path: Path,
    records: Mapping[str, Mapping[str, Any]],
    advance: Callable[[str], None],
    prepared: PreparedDataset | None = None,
) -> RunPlan:
    """Measure, estimate, and publish the plan at `path`.

    Args:
        records: the records of finished stages, by name; their stored predictions are kept.
        advance: called with the name of each stage after its measurement.
        prepared: the output of a finished ingest, whose samples are measured.

    Raises:
        UserError: too few samples or classes for the configuration. What does not fit is among the plan's problems instead.
    """
    engine.check_inputs(config, facts, facts.kept)
    if config.select.keep == "auto":
        require_test_split(facts)
    load, earlier = Load(), plans.read(path, config)
    time.sleep(LOOK)
    busy = load.others if load.others > QUIET else 0.0
    layout = ClusterLayout(config, machine, busy)
    loading = first_step()
    planner = Planner(config, facts, layout, Measurements(config, facts, layout, prepared))
    alone = replace(planner, layout=ClusterLayout(config, machine), without=busy)
    estimates, without = list[StageEstimate](), list[StageEstimate]()
    try:
        for stage in ["ingest", "score", "select", "distill", *(["evaluate"] if facts.has_test() else []), "report"]:
            stored = earlier.get("stages", {}).get(stage)
            if stage in records and stored:
                estimates.append(StageEstimate(**stored["estimate"]))
            elif stage != "ingest" or facts.listing is not None:  # a finished ingest has nothing left to measure
                estimates.append(getattr(planner, stage)())
                without.append(getattr(alone, stage)() if busy else estimates[-1])
            advance(stage)
    finally:
        planner.measured.close()
    if config.select.keep == "auto":
        estimates = _with_search(estimates, config, facts, layout)
    # once per command, in the first stage that needs it: Ray's start, or in this process the loading of torch
    part, seconds, having = ("start", RAY, "") if not layout.local else ("load", loading, "proxies steps")
    for place, estimate in enumerate(estimates):
        if estimate.stage not in records and (not having or estimate.parts.keys() & set(having.split())):
            estimates[place] = later(estimate, seconds, part)
            break
    actual = {stage: record["seconds"] for stage, record in records.items() if not record.get("reused_from")}
    used = f"other programs use {busy:.1f} of {machine.cores} cores now"
    remark = f"{used}: the times hold for this load; on an idle machine about "
    remark = remark + plans.in_words(sum(one.seconds for one in without)) if busy else ""
    plan = plans.combine(config, layout, estimates, earlier, actual, remark)
    plans.write(path, config, machine, plan)
    return plan


def _with_search(
    estimates: list[StageEstimate], config: Config, facts: Facts, layout: ClusterLayout
) -> list[StageEstimate]:
    """Add the short distillations of select.keep: auto, one actor each, to the selection; all samples count as kept."""
    auto, by_stage = config.select.auto, {estimate.stage: estimate for estimate in estimates}
    distill, evaluate, steps = by_stage["distill"], by_stage["evaluate"], engine.step_count(config)
    short = (auto.steps or max(1, steps // 4)) / steps
    seconds = distill.processes * (distill.parts["steps"] * short + distill.parts["prepare"])
    networks = len(jobs(config, controls.applicable(config, sum(facts.kept), facts.train)))
    seconds += auto.evaluations * evaluate.processes * evaluate.parts["train and test"] / networks
    count = max(3, auto.seeds) + auto.points * auto.seeds
    select = by_stage["select"]
    note = f"select.keep: auto tries up to {count} short distillations; later stages are planned as if all samples were kept"
    longer = replace(
        later(select, count * seconds / layout.actors().side_by_side, "search"), notes=[*select.notes, note]
    )
    return [longer if estimate is select else estimate for estimate in estimates]

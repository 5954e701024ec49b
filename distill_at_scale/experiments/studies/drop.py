"""The drop test: a share of every class dropped at random, the least useful first, and the most useful first.

With criterion loss these are the paper's first experiment: dropping the largest losses does no harm or helps, dropping the
smallest hurts. Left out: other shares (study interaction).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import RANDOM, STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.experiments.studies.comparison import (
    Difference,
    accuracies,
    criterion_of,
    difference,
    in_points,
    sample_size,
    spread,
)
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import share as percent

NAME = "drop"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "least useful": {"select.order": "useful"},
    "most useful": {"select.order": "useless"},
    "random": {"select.order": "useful", **RANDOM},
}
ROLES = {"unpruned": "unpruned", "random": "random", "least useful": "ours", "most useful": "other"}


def study(context: StudyContext) -> Finding:
    share = context.config.studies.drop.drop
    found = _tried(context, share)
    gaps = {way: difference(found[way], found["unpruned"]) for way in WAYS}
    name, useful = criterion_of(context)
    said = {way: _named(way, useful) for way in WAYS}
    parts = [f"{said[way]} {in_points(gaps[way])} ({_effect(gaps[way])})" for way in WAYS]
    answer = (
        f"Dropping {percent(share)} by {name}, against {spread(found['unpruned'])} unpruned: " + "; ".join(parts) + "."
    )
    facts = {f"drop_{way.replace(' ', '_')}": gaps[way].mean for way in WAYS}
    notes = [
        f"{sample_size(len(found['random']), context.config.studies.evaluations)} each; intervals are 95 % t-intervals of the "
        "difference, paired by repetition."
    ]
    paper = _paper(gaps) if name == "loss" else ""
    return Finding(
        NAME, f"Drop {percent(share)}", answer, paper, _rows(found, gaps), [_plot(found, said)], facts, notes
    )


def _tried(context: StudyContext, share: float) -> dict[str, list[float]]:
    """Accuracies by way of dropping, and unpruned."""
    cut = {**STATIC, "select.scope": "class", "select.keep": round(1 - share, 10)}
    points = {"unpruned": context.repetitions(UNPRUNED)}
    points |= {way: context.repetitions({**cut, **overrides}) for way, overrides in WAYS.items()}
    outcomes = iter(context.points.run(list(itertools.chain(*points.values()))))
    return {way: accuracies([next(outcomes) for _ in part]) for way, part in points.items()}


def _named(way: str, useful: str) -> str:
    """What is dropped first."""
    if way == "random":
        return "at random"
    return f"{way} first (the {'largest' if (useful == 'low') == (way == 'least useful') else 'smallest'} scores)"


def _effect(gap: Difference) -> str:
    if gap.half is None:
        return "one repetition says nothing"
    return ("helps" if gap.mean > 0 else "hurts") if gap.clear else "no clear effect"


def _paper(gaps: Mapping[str, Difference]) -> str:
    large, small = gaps["least useful"], gaps["most useful"]
    harmless = "agrees" if not (large.clear and large.mean < 0) else "disagrees: it hurts here"
    hurts = "agrees" if small.clear and small.mean < 0 else "is not seen here"
    return (
        f"The paper (CIFAR-10, DC): large losses dropped first do no harm or help ({harmless}); small losses dropped first "
        f"hurt ({hurts})."
    )


def _rows(found: Mapping[str, Sequence[float]], gaps: Mapping[str, Difference]) -> list[dict[str, Any]]:
    rows = []
    for way, values in found.items():
        (mean, std), gap = mean_and_std(values), gaps.get(way)
        rows.append({"dropped": "nothing" if gap is None else way, "mean": mean, "std": std, "n": len(values),
                     "difference": gap.mean if gap else None, "half_interval": gap.half if gap else None})  # fmt: skip
    return rows


def _plot(found: Mapping[str, Sequence[float]], said: Mapping[str, str]) -> Plot:
    series = []
    for way, values in found.items():
        mean, std = mean_and_std(values)
        role: Any = ROLES[way]
        series.append(
            Series(said.get(way, way), ["nothing" if way == "unpruned" else way], [mean], [std], "bars", role)
        )
    return Plot("Accuracy after a share was dropped", "dropped first", "top-1", series,
                [("unpruned", mean_and_std(found["unpruned"])[0])])  # fmt: skip

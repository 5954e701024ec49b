"""The drop test: drops a share of each class at random, the least useful first, and the most useful first.

With criterion loss this is the paper's first experiment: dropping the largest losses does no harm or helps, dropping the
smallest hurts. Not covered: other shares (study interaction).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from distill_at_scale.experiments.statistics import summary
from distill_at_scale.experiments.studies.base import RANDOM, STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.experiments.studies.comparison import (
    Difference,
    accuracy_series,
    criterion_of,
    difference,
    in_points,
    sample_size,
    spread,
)
from distill_at_scale.pipeline.report.plot_spec import Plot
from distill_at_scale.pipeline.report.text import share as percent

WAYS: Mapping[str, Mapping[str, Any]] = {
    "least useful": {"select.order": "useful"},
    "most useful": {"select.order": "useless"},
    "random": {"select.order": "useful", **RANDOM},
}
ROLES: Mapping[str, Literal["ours", "random", "unpruned", "other"]] = {
    "unpruned": "unpruned", "random": "random", "least useful": "ours", "most useful": "other",
}  # fmt: skip


def study(context: StudyContext) -> Finding:
    share = context.config.studies.drop.drop
    drop = {**STATIC, "select.scope": "class", "select.keep": round(1 - share, 10)}
    results = context.run([UNPRUNED, *({**drop, **overrides} for overrides in WAYS.values())])
    unpruned, by_way = results[0], dict(zip(("unpruned", *WAYS), results, strict=True))
    gaps = {way: difference(by_way[way].accuracies, unpruned.accuracies) for way in WAYS}

    name, useful = criterion_of(context)
    largest, smallest = ("largest", "smallest") if useful == "low" else ("smallest", "largest")
    labels = {
        "least useful": f"least useful first (the {largest} scores)",
        "most useful": f"most useful first (the {smallest} scores)",
        "random": "at random",
    }
    parts = "; ".join(f"{labels[way]} {in_points(gaps[way])} ({_effect(gaps[way])})" for way in WAYS)
    rows, series = [], []
    for way, result in by_way.items():
        dropped, gap = "nothing" if way == "unpruned" else way, gaps.get(way)
        rows.append({"dropped": dropped, **summary(result.accuracies),
                     "difference": gap.mean if gap else None, "half_interval": gap.half if gap else None})  # fmt: skip
        series.append(accuracy_series(labels.get(way, way), [dropped], [result], "bars", ROLES[way]))
    levels = [("unpruned", unpruned.mean)]
    return Finding(
        "drop",
        f"Drop {percent(share)}",
        f"Dropping {percent(share)} by {name}, against {spread(unpruned.accuracies)} unpruned: {parts}.",
        _paper(gaps) if name == "loss" else "",
        rows,
        [Plot("Accuracy after a share was dropped", "dropped first", "top-1", series, levels)],
        {f"drop_{way.replace(' ', '_')}": gaps[way].mean for way in WAYS},
        [
            f"{sample_size(len(unpruned.outcomes), context.config.studies.evaluations)} each; intervals are 95 % t-intervals "
            "of the difference, paired by repetition."
        ],
    )


def _effect(gap: Difference) -> str:
    if gap.half is None:
        return "one repetition says nothing"
    return {1: "helps", -1: "hurts", 0: "no clear effect"}[gap.sign]


def _paper(gaps: Mapping[str, Difference]) -> str:
    harmless = "agrees" if gaps["least useful"].sign >= 0 else "disagrees: it hurts here"
    hurts = "agrees" if gaps["most useful"].sign < 0 else "is not seen here"
    return (
        f"The paper (CIFAR-10, DC): large losses dropped first do no harm or help ({harmless}); small losses dropped first "
        f"hurt ({hurts})."
    )

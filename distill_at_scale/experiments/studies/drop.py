"""The drop test: drops a share of each class at random, the least useful first, and the most useful first.

With criterion loss this is the paper's first experiment: dropping the largest losses does no harm or helps, dropping the
smallest hurts. Not covered: other shares (study interaction).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_at_scale.core.statistics import summary
from distill_at_scale.experiments.studies import comparison
from distill_at_scale.experiments.studies.base import RANDOM, STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.pipeline.report.plot_spec import Plot, Role
from distill_at_scale.pipeline.report.text import share as percent

WAYS: Mapping[str, Mapping[str, Any]] = {
    "least useful": {"select.order": "useful"},
    "most useful": {"select.order": "useless"},
    "random": {"select.order": "useful", **RANDOM},
}
ROLES: Mapping[str, Role] = {"least useful": "ours", "most useful": "other", "random": "random"}
EFFECTS = {1: "helps", -1: "hurts", 0: "no clear effect"}


def study(context: StudyContext) -> Finding:
    share = context.config.studies.drop.drop
    drop = {**STATIC, "select.scope": "class", "select.keep": round(1 - share, 10)}
    unpruned, *dropped = context.run([UNPRUNED, *({**drop, **overrides} for overrides in WAYS.values())])
    name, useful = comparison.criterion_of(context)
    largest, smallest = ("largest", "smallest") if useful == "low" else ("smallest", "largest")
    labels = {
        "least useful": f"least useful first (the {largest} scores)",
        "most useful": f"most useful first (the {smallest} scores)",
        "random": "at random",
    }
    rows = [{"dropped": "nothing", **summary(unpruned.accuracies), "difference": None, "half_interval": None}]
    series = [comparison.accuracy_series("unpruned", ["nothing"], [unpruned], "bars", "unpruned")]
    parts, gaps = [], {}
    for way, group in zip(WAYS, dropped, strict=True):
        gap = gaps[way] = comparison.difference(group.accuracies, unpruned.accuracies)
        effect = "one repetition says nothing" if gap.half is None else EFFECTS[gap.sign]
        parts.append(f"{labels[way]} {comparison.in_points(gap)} ({effect})")
        rows.append({"dropped": way, **summary(group.accuracies), "difference": gap.mean, "half_interval": gap.half})
        series.append(comparison.accuracy_series(labels[way], [way], [group], "bars", ROLES[way]))
    harmless = "agrees" if gaps["least useful"].sign >= 0 else "disagrees: it hurts here"
    hurts = "agrees" if gaps["most useful"].sign < 0 else "is not seen here"
    paper = (
        f"The paper (CIFAR-10, DC): large losses dropped first do no harm or help ({harmless}); small losses dropped first "
        f"hurt ({hurts})."
    )
    base, n = comparison.spread(unpruned.accuracies), len(unpruned.outcomes)
    answer = f"Dropping {percent(share)} by {name}, against {base} unpruned: {'; '.join(parts)}."
    levels = [("unpruned", unpruned.mean)]
    plot = Plot("Accuracy after a share was dropped", "dropped first", "top-1", series, levels)
    facts = {f"drop_{way.replace(' ', '_')}": gap.mean for way, gap in gaps.items()}
    note = (
        f"{comparison.sample_size(n, context.config.studies.evaluations)} each; intervals are 95 % t-intervals of the "
        "difference, paired by repetition."
    )
    paper = paper if name == "loss" else ""
    return Finding("drop", f"Drop {percent(share)}", answer, paper, rows, [plot], facts, [note])

"""Whether a criterion can be trusted on this data: each class cut into strata by score, and a distillation from each.

Were the criterion right, the most useful stratum would give the best set and the least useful one the worst: Spearman's
correlation of the stratum's number with accuracy, over all sample_size, is negative. Left out: strata over all classes at once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.experiments.studies.comparison import (
    SIGNIFICANT,
    accuracies,
    criterion_of,
    rank_correlation,
    sample_size,
    spread,
)
from distill_at_scale.pipeline.report.plot_spec import Plot, Series

NAME = "stratified"
ANSWERS = {
    "trustworthy": "is trustworthy on this data: the more useful a stratum by score, the better its set",
    "reversed": "is reversed on this data: strata that it calls less useful give better sets",
    "nothing": "shows nothing on this data: accuracy does not follow the strata",
}


def study(context: StudyContext) -> Finding:
    strata = _strata(context, context.config.studies.stratified.strata)
    whole = accuracies(context.points.run(context.repetitions(UNPRUNED)))
    pairs = [(k, value) for k, outcomes in enumerate(strata) for value in accuracies(outcomes)]
    rho, p = rank_correlation([float(k) for k, _ in pairs], [value for _, value in pairs])
    name, useful = criterion_of(context)
    verdict = "nothing" if p >= SIGNIFICANT else "trustworthy" if rho < 0 else "reversed"
    means, signed = [statistics.fmean(accuracies(o)) for o in strata], f"{rho:+.2f}".replace("-", "−")
    answer = (
        f"The criterion {name} {ANSWERS[verdict]} (Spearman {signed}, p = {p:.2g}, {len(pairs)} distillations; "
        f"{spread(accuracies(strata[0]))} from the most useful of {len(strata)} strata, "
        f"{spread(accuracies(strata[-1]))} from the least; the best is stratum {means.index(max(means)) + 1})."
    )
    facts = {"spearman": rho, "p": p, "verdict": verdict, "best_stratum": means.index(max(means)) + 1}
    return Finding(
        NAME, "Stratified validation", answer, _paper(name, useful, verdict), _rows(strata, whole),
        [_plot(strata, whole)], facts, _notes(context, strata, means),
    )  # fmt: skip


def _strata(context: StudyContext, count: int) -> list[list[Outcome]]:
    """Outcomes by stratum, the most useful first."""
    points = []
    for k in range(count):
        cut = {
            "select.order": "stratum",
            "select.scope": "class",
            "select.keep": 1 / count,
            "select.stratum_start": k / count,
        }
        points.append(context.repetitions({**STATIC, **cut}))
    context.say(f"  {count} strata, each distilled {len(points[0])} times")
    found = iter(context.points.run(list(itertools.chain(*points))))
    return [[next(found) for _ in part] for part in points]


def _paper(name: str, useful: str, verdict: str) -> str:
    if name != "loss" or useful != "low":
        return ""
    agrees = {
        "trustworthy": "this agrees",
        "reversed": "here it is the other way round",
        "nothing": "here it does not show",
    }
    return f"The paper: a low loss means a high utility; {agrees[verdict]}."


def _rows(strata: Sequence[Sequence[Outcome]], whole: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for k, outcomes in enumerate(strata):
        mean, std = mean_and_std(accuracies(outcomes))
        rows.append({"set": f"stratum {k + 1}", "kept": outcomes[0].kept, "mean": mean, "std": std, "n": len(outcomes)})
    mean, std = mean_and_std(whole)
    return [*rows, {"set": "unpruned", "kept": strata[0][0].of, "mean": mean, "std": std, "n": len(whole)}]


def _plot(strata: Sequence[Sequence[Outcome]], whole: Sequence[float]) -> Plot:
    figures = [mean_and_std(accuracies(outcomes)) for outcomes in strata]
    names = [str(k + 1) for k in range(len(strata))]
    series = Series("stratum", names, [m for m, _ in figures], [s for _, s in figures], "bars", "ours")
    return Plot("Accuracy from one stratum of the scores", "stratum, the most useful first", "top-1", [series],
                [("unpruned", statistics.fmean(whole))])  # fmt: skip


def _notes(context: StudyContext, strata: Sequence[Sequence[Outcome]], means: Sequence[float]) -> list[str]:
    notes = [f"{sample_size(len(strata[0]), context.config.studies.evaluations)} per stratum."]
    best = means.index(max(means))
    if best not in (0, len(means) - 1):
        notes.append(
            f"The best is stratum {best + 1} of {len(means)}, neither end: a rank correlation sees only part of that."
        )
    if min(strata[0][0].kept_per_class) <= context.config.min_per_class:
        notes.append("Strata are as small as min_per_class, so neighbouring ones may share samples; take fewer strata.")
    return notes

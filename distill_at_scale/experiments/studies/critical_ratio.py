"""How few samples suffice: the smallest keep rate that is not worse than the unpruned set, and random selection there.

Under the criterion, order, scope and runtime pruning of the configuration; the search is that of `bisection.py`. Left out:
rates below `studies.critical_ratio.lowest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import RANDOM, Finding, StudyContext
from distill_at_scale.experiments.studies.bisection import Search, SearchResult
from distill_at_scale.experiments.studies.comparison import (
    accuracies,
    class_names,
    difference,
    in_points,
    sample_size,
    spread,
)
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import count
from distill_at_scale.pipeline.report.text import share as percent

NAME = "critical_ratio"
CIFAR10 = {"frog", "truck", "ship", "horse", "cat", "deer"}
PAPER = "The paper (CIFAR-10, DC, one image per class, low loss): 0.04 % (20 images) suffice, 28.4 ± 0.2 % against 28.6 ± 0.2 %"


def check(context: StudyContext) -> None:
    """Raises UserError where the configuration keeps a stratum: that has no smallest rate."""
    if context.config.select.order == "stratum":
        raise UserError(
            "the study critical_ratio needs select.order other than stratum; give useful, useless, low or high"
        )


def study(context: StudyContext) -> Finding:
    check(context)
    section = context.config.studies.critical_ratio
    found = Search(context, section.tolerance, section.lowest, section.points, context.config.studies.seeds).run()
    random = _random(context, found)
    return Finding(
        NAME, "Critical ratio", _answer(context, found, random), _paper(context, found), _rows(found, random),
        [_plot(found, random)], _facts(found), _notes(context, found),
    )  # fmt: skip


def _random(context: StudyContext, found: SearchResult) -> list[Outcome]:
    """Random selection at the rate that was found."""
    overrides = {**RANDOM, "select.order": "useful", "select.scope": "class", "select.per_class": None}
    return context.points.run(context.repetitions({**overrides, "select.keep": found.smallest.keep}))


def _answer(context: StudyContext, found: SearchResult, random: Sequence[Outcome]) -> str:
    best, level = found.smallest, found.level
    if best.keep == 1:
        return (
            f"No keep rate that was tried (from {percent(found.rates[0].keep)} on) is as good as the unpruned set, "
            f"{spread(level.accuracies)}, within {count(level.tolerance, 'standard deviation')}."
        )
    gap = difference(best.accuracies, accuracies(random))
    side = "better than" if gap.clear and gap.mean > 0 else "worse than" if gap.clear else "not clearly different from"
    return (
        f"{best.kept} of {best.outcomes[0].of} samples ({_each(best.outcomes[0])} per class, {percent(best.reached)}) suffice: "
        f"{spread(best.accuracies)} against {spread(level.accuracies)} unpruned; confidence "
        f"{percent(round(best.confidence, 2))} that they are not below it by more than "
        f"{count(level.tolerance, 'deviation')} ({100 * level.tolerance * level.std:.1f} points). "
        f"They are {side} as many random ones ({spread(accuracies(random))}, {in_points(gap)})."
    )


def _each(outcome: Outcome) -> str:
    low, high = min(outcome.kept_per_class), max(outcome.kept_per_class)
    return str(low) if low == high else f"{low} to {high}"


def _paper(context: StudyContext, found: SearchResult) -> str:
    distill, first = context.config.distill, found.smallest.outcomes[0]
    names = set(class_names(context, len(first.kept_per_class)))
    if not (distill.method == "dc" and distill.ipc == 1 and first.of == 50_000 and names >= CIFAR10):
        return ""
    agrees = (
        "this agrees" if found.smallest.reached <= 0.0004 * 1.5 else f"here it takes {percent(found.smallest.reached)}"
    )
    return f"{PAPER}; {agrees}."


def _rows(found: SearchResult, random: Sequence[Outcome]) -> list[dict[str, Any]]:
    rows = []
    for rate in found.rates:
        name = "unpruned" if rate.keep == 1 else "ours"
        rows.append(
            _row(name, rate.keep, rate.outcomes) | {"sufficient": rate.sufficient, "confidence": rate.confidence}
        )
    values = accuracies(random)
    sufficient = mean_and_std(values)[0] >= found.level.least
    last = {"sufficient": sufficient, "confidence": found.level.confidence(values)}
    return [*rows, _row("random", found.smallest.keep, random) | last]


def _row(name: str, keep: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    mean, std = mean_and_std(accuracies(outcomes))
    return {"set": name, "keep": keep, "kept": outcomes[0].kept, "of": outcomes[0].of, "mean": mean, "std": std,
            "n": len(outcomes)}  # fmt: skip


def _plot(found: SearchResult, random: Sequence[Outcome]) -> Plot:
    mean, std = mean_and_std(accuracies(random))
    ours = [mean_and_std(rate.accuracies) for rate in found.rates]
    series = [
        Series("selected", [r.reached for r in found.rates], [m for m, _ in ours], [s for _, s in ours], role="ours"),
        Series("random", [random[0].kept / random[0].of], [mean], [std], "points", "random"),
    ]
    levels = [("unpruned", found.level.mean), ("still sufficient", found.level.least)]
    marks = [("smallest sufficient", found.smallest.reached)]
    return Plot(
        "Accuracy against the share kept", "kept of the training set", "top-1", series, levels, marks, log_x=True
    )


def _facts(found: SearchResult) -> dict[str, Any]:
    best = found.smallest
    return {
        "critical_keep": best.keep,
        "critical_kept": best.kept,
        "critical_kept_per_class": list(best.outcomes[0].kept_per_class),
        "confidence": best.confidence,
        "unbroken_keep": found.unbroken.keep,
        "unpruned": found.level.mean,
        "unpruned_std": found.level.std,
    }


def _notes(context: StudyContext, found: SearchResult) -> list[str]:
    notes = [
        f"{sample_size(len(found.smallest.outcomes), context.config.studies.evaluations)} per rate, "
        f"{len(found.level.accuracies)} unpruned; standard deviations are over distillations, the confidence is by Welch's t.",
        "Rates are chosen by accuracy on the test split, which is a little kinder to the chosen one than to new data.",
    ]
    if found.near_chance:
        notes.append(
            "Even the unpruned set is near chance, so any rate seems to suffice; distil longer (studies.steps)."
        )
    if found.exceptions:
        rates = ", ".join(percent(rate.keep) for rate in found.exceptions)
        notes.append(
            f"Accuracy is not monotone in the rate: {percent(found.smallest.keep)} was sufficient although {rates} was not; "
            f"from {percent(found.unbroken.keep)} on every rate that was tried is."
        )
    if found.limited(context.config.min_per_class):
        notes.append(
            f"min_per_class = {context.config.min_per_class} decided how many were kept, not the rate; "
            "lower select.min_per_class or distill.ipc to look below."
        )
    if context.config.runtime.rule != "none":
        notes.append(
            f"Pruned distillations also prune at run time ({context.config.runtime.rule}); the unpruned ones do not."
        )
    return notes

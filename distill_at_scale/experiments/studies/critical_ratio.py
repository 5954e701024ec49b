"""How few samples suffice? The smallest keep rate that is not worse than the unpruned set, and random selection there.

Uses the configured criterion, order, scope and runtime pruning, and the search of `bisection.py`. Not covered: rates below
`studies.critical_ratio.lowest`.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.statistics import summary
from distill_at_scale.distillation.summary import TESTED
from distill_at_scale.experiments.studies import comparison
from distill_at_scale.experiments.studies.base import RANDOM, Finding, Repetitions, StudyContext
from distill_at_scale.experiments.studies.bisection import Search, SearchResult
from distill_at_scale.pipeline.report.plot_spec import Plot
from distill_at_scale.pipeline.report.text import count
from distill_at_scale.pipeline.report.text import share as percent

CIFAR10 = {"frog", "truck", "ship", "horse", "cat", "deer"}
PAPER = "The paper (CIFAR-10, DC, one image per class, low loss): 0.04 % (20 images) suffice, 28.4 ± 0.2 % against 28.6 ± 0.2 %"


def check(context: StudyContext) -> None:
    """Raises UserError for select.order = stratum, for which a smallest rate has no meaning."""
    if context.config.select.order == "stratum":
        raise UserError(
            "the study critical_ratio needs select.order other than stratum; give useful, useless, low or high"
        )


def study(context: StudyContext) -> Finding:
    check(context)
    section = context.config.studies.critical_ratio
    result = Search(context, section.tolerance, section.lowest, section.points, context.config.studies.seeds).run()
    best, level = result.smallest, result.level
    overrides = {**RANDOM, "select.order": "useful", "select.scope": "class", "select.per_class": None}
    # keeping everything at random is the unpruned set again
    randoms = context.run([{**overrides, "select.keep": best.keep}] if best.keep < 1 else [])

    rows = [
        {"set": name, "keep": keep, "kept": group.kept, "of": group.of, **summary(group.accuracies),
         "sufficient": sufficient, "confidence": level.confidence(group.accuracies)}
        for name, keep, group, sufficient in (
            *(("unpruned" if rate.keep == 1 else "ours", rate.keep, rate, rate.sufficient) for rate in result.rates),
            *(("random", best.keep, random, random.mean >= level.least) for random in randoms),
        )
    ]  # fmt: skip
    series = [comparison.accuracy_series("selected", [rate.reached for rate in result.rates], result.rates)]
    series += [comparison.accuracy_series("random", [one.reached], [one], "points", "random") for one in randoms]
    levels = [("unpruned", level.mean), ("still sufficient", level.least)]
    marks = [("smallest sufficient", best.reached)]
    title, x_label = "Accuracy against the share kept", "kept of the training set"
    plot = Plot(title, x_label, "top-1", series, levels, marks, log_x=True)
    facts = {
        "critical_keep": best.keep, "critical_kept": best.kept, "critical_kept_per_class": list(best.kept_per_class),
        "confidence": best.confidence, "unbroken_keep": result.unbroken.keep,
        "unpruned": level.mean, "unpruned_std": level.std,
    }  # fmt: skip
    paper, distill = "", context.config.distill
    names = set(comparison.class_names(context, len(best.kept_per_class)))
    if distill.method == "dc" and distill.ipc == 1 and best.of == 50_000 and names >= CIFAR10:
        agrees = best.reached <= 0.0004 * 1.5
        paper = f"{PAPER}; {'this agrees' if agrees else f'here it takes {percent(best.reached)}'}."
    answer, notes = _answer(result, randoms), _notes(context, result)
    return Finding("critical_ratio", "Critical ratio", answer, paper, rows, [plot], facts, notes)


def _answer(result: SearchResult, randoms: Sequence[Repetitions]) -> str:
    best, level = result.smallest, result.level
    unpruned = comparison.spread(level.accuracies)
    if best.keep == 1:
        return (
            f"No keep rate that was tried (from {percent(result.rates[0].keep)} on) is as good as the unpruned set, "
            f"{unpruned}, within {count(level.tolerance, 'standard deviation')}."
        )
    (at_random,) = (random.accuracies for random in randoms)
    low, high = min(best.kept_per_class), max(best.kept_per_class)
    gap = comparison.difference(best.accuracies, at_random)
    side = {1: "better than", -1: "worse than", 0: "not clearly different from"}[gap.sign]
    return (
        f"{best.kept} of {best.of} samples ({low if low == high else f'{low} to {high}'} per class, "
        f"{percent(best.reached)}) suffice: {comparison.spread(best.accuracies)} against {unpruned} unpruned; confidence "
        f"{percent(round(best.confidence, 2))} that they are not below it by more than "
        f"{count(level.tolerance, 'deviation')} ({100 * level.tolerance * level.std:.1f} points). "
        f"They are {side} as many random ones ({comparison.spread(at_random)}, {comparison.in_points(gap)})."
    )


def _notes(context: StudyContext, result: SearchResult) -> list[str]:
    notes = [
        f"{comparison.sample_size(len(result.smallest.outcomes), context.config.studies.evaluations)} per rate, "
        f"{len(result.level.accuracies)} unpruned; standard deviations are over distillations, the confidence is by Welch's t.",
        f"Rates are chosen by accuracy on {TESTED[context.config.evaluate.split]}, which is a little kinder to the chosen one "
        "than to new data.",
    ]
    if result.near_chance:
        notes.append(
            "Even the unpruned set is near chance, so any rate seems to suffice; distil longer (studies.steps)."
        )
    if result.exceptions:
        rates = ", ".join(percent(rate.keep) for rate in result.exceptions)
        notes.append(
            f"Accuracy is not monotone in the rate: {percent(result.smallest.keep)} was sufficient although {rates} was not; "
            f"from {percent(result.unbroken.keep)} on every rate that was tried is."
        )
    if result.limited(context.config.min_per_class):
        notes.append(
            f"min_per_class = {context.config.min_per_class} decided how many were kept, not the rate; "
            "lower select.min_per_class or distill.ipc to look below."
        )
    if context.config.runtime.rule != "none":
        notes.append(
            f"Pruned distillations also prune at run time ({context.config.runtime.rule}); the unpruned ones do not."
        )
    return notes

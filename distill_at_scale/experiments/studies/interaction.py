"""Where does pruning break, and do the effects of samples add up? Accuracy against the share dropped, least useful first.

In the paper's additive model a sample has one effect, whatever else is kept. The first two drop rates give the cost per share
dropped, by least squares through the unpruned accuracy of each repetition; with constant costs the later rates lie on that
line. A gap that is clear over repetitions is an interaction (or an effect that grows with the rank). The break point is the
first rate from which on all means lie below the unpruned one by more than the tolerance; per class alike. Not covered: which
samples interact.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.studies import comparison
from distill_at_scale.experiments.studies.base import STATIC, UNPRUNED, Finding, Repetitions, StudyContext
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import count
from distill_at_scale.pipeline.report.text import share as percent

FIRST = 2  # rates behind the additive prediction


def check(context: StudyContext) -> None:
    """Raises UserError where the drop rates do not ascend within (0, 1)."""
    drops = list(context.config.studies.interaction.drops)
    if drops != sorted(set(drops)) or not 0 < drops[0] <= drops[-1] < 1:
        raise UserError(f"studies.interaction.drops = {drops}: give ascending shares between 0 and 1")


def study(context: StudyContext) -> Finding:
    check(context)
    section = context.config.studies.interaction
    drops = list(section.drops)
    drop = {**STATIC, "select.scope": "class", "select.order": "useful"}
    results = context.run([UNPRUNED, *({**drop, "select.keep": round(1 - share, 10)} for share in drops)])
    unpruned, *dropped = results
    level = comparison.Level(unpruned.accuracies, section.tolerance)
    break_drop = _break_point(drops, [group.mean for group in dropped], level.least)
    held = max((share for share in drops if break_drop is None or share < break_drop), default=0.0)
    classes = _class_breaks(context, results)
    rows = [{"drop": 0.0, **unpruned.figures, "predicted": level.mean, "gap": 0.0, "half_interval": None}]
    x, line, gaps = [0.0, *drops], [level.mean], []
    for share, group, predicted in zip(drops, dropped, _predicted(drops, unpruned, dropped[:FIRST]), strict=True):
        gap = comparison.difference(group.accuracies, predicted, together=max(1, len(drops) - FIRST))
        line.append(statistics.fmean(predicted))
        gaps.append(gap)
        rows.append({"drop": share, **group.figures, "predicted": line[-1], "gap": gap.mean, "half_interval": gap.half})
    levels = [("unpruned", level.mean), ("broken below", level.least)]
    marks = [] if break_drop is None else [("break point", break_drop)]
    x_label = "share dropped, the least useful first"
    series = [
        comparison.accuracy_series("measured", x, results),
        Series("additive prediction", x, [min(1.0, max(0.0, value)) for value in line]),
    ]
    bars = [1.0 if share is None else share for share in classes.values()]
    class_series = [Series("break point", list(classes), bars, None, "bars", "ours")]
    plots = [
        Plot("Accuracy against the share dropped", x_label, "top-1", series, levels, marks),
        Plot("Break point per class (1: does not break)", "class", "share dropped", class_series),
    ]
    answer = _answer(comparison.criterion_of(context)[0], drops, break_drop, level, gaps)
    facts = {"break_drop": break_drop, "held_drop": held, "per_class": classes}
    paper, notes = _paper(break_drop, drops), _notes(context, drops, classes)
    return Finding("interaction", "Interaction break point", answer, paper, rows, plots, facts, notes)


def _class_breaks(context: StudyContext, results: Sequence[Repetitions]) -> dict[str, float | None]:
    """The break point of each class; None where it does not break or has no test samples."""
    section = context.config.studies.interaction
    # [rate][class][repetition]
    by_class = [list(zip(*map(comparison.per_class, group.outcomes), strict=True)) for group in results]
    breaks: dict[str, float | None] = {}
    for label, name in enumerate(comparison.class_names(context, len(by_class[0]))):
        least = comparison.Level(by_class[0][label], section.tolerance).least
        means = [statistics.fmean(rate[label]) for rate in by_class[1:]]
        breaks[name] = None if math.isnan(least) else _break_point(section.drops, means, least)
    return breaks


def _predicted(drops: Sequence[float], unpruned: Repetitions, first: Sequence[Repetitions]) -> list[list[float]]:
    """The additive model for each rate and repetition: a line through the unpruned accuracy, fitted to the first rates."""
    squares = sum(share**2 for share in drops[:FIRST])
    starts = unpruned.accuracies
    slopes = [
        sum(share * (group.accuracies[k] - start) for share, group in zip(drops, first, strict=False)) / squares
        for k, start in enumerate(starts)
    ]
    return [[start + slope * share for start, slope in zip(starts, slopes, strict=True)] for share in drops]


def _break_point(drops: Sequence[float], means: Sequence[float], least: float) -> float | None:
    """The first rate from which on each mean is below `least`."""
    result = None
    for drop, mean in zip(reversed(drops), reversed(means), strict=True):
        if mean >= least - 1e-12:
            break
        result = drop
    return result


def _answer(name: str, drops: Sequence[float], break_drop: float | None, level: comparison.Level,
            gaps: Sequence[comparison.Difference]) -> str:  # fmt: skip
    where = f"does not break up to {percent(drops[-1])}" if break_drop is None else f"breaks at {percent(break_drop)}"
    adds = "the additive prediction from the first rates is not refuted"
    if clear := [k for k in range(FIRST, len(drops)) if gaps[k].clear]:
        k = clear[-1]
        side = "worse" if gaps[k].mean < 0 else "better"
        gap = comparison.in_points(gaps[k])
        adds = f"effects do not add up: at {percent(drops[k])} it is {side} than predicted by adding, by {gap}"
    unpruned = comparison.spread(level.accuracies)
    return f"Dropping the least useful by {name} {where} dropped (unpruned {unpruned}); {adds}."


def _paper(break_drop: float | None, drops: Sequence[float]) -> str:
    claim = (
        "A known limit of the method is that accuracy of small, uniform sets (MNIST-like) breaks beyond 30 % dropped"
    )
    if break_drop is None:
        return f"{claim}; here it does not, up to {percent(drops[-1])}."
    return f"{claim}; here it holds beyond that." if break_drop > 0.3 else f"{claim}; here it breaks by then."


def _notes(context: StudyContext, drops: Sequence[float], classes: Mapping[str, float | None]) -> list[str]:
    section = context.config.studies
    broken = {name: drop for name, drop in classes.items() if drop is not None}
    notes = [
        f"{comparison.sample_size(section.seeds, section.evaluations)} per rate. Prediction: a line through the "
        f"unpruned accuracy, fitted to {', '.join(map(percent, drops[:FIRST]))} dropped, per repetition; gaps with "
        "t-intervals that hold for all other rates together by 95 % (Bonferroni).",
        f"Broken: the mean lies below the unpruned one by more than "
        f"{count(section.interaction.tolerance, 'standard deviation')}, there and at all larger rates that were tried.",
    ]
    if broken:
        first = min(broken, key=lambda name: broken[name])
        notes.append(
            f"{len(broken)} of {len(classes)} classes break, the first of them class {first} at {percent(broken[first])}."
        )
    return notes

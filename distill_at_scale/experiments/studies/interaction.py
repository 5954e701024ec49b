"""Where pruning breaks, and whether samples' effects add up: accuracy against the share dropped, the least useful first.

The additive model of the paper (a sample has one effect, whatever else is kept) is held against the facts: the first two drop
rates give the cost per share dropped, by least squares through each repetition's own unpruned accuracy, and were costs constant
the later rates would lie on that line. A gap from it that is clear over sample_size is an interaction (or an effect that
grows with the rank). The break point is the first rate from which on all means lie below the unpruned one by more than the
tolerance; per class likewise. Left out: which samples interact.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.experiments.studies.comparison import (
    Difference,
    Level,
    accuracies,
    class_names,
    criterion_of,
    difference,
    in_points,
    per_class,
    sample_size,
    spread,
)
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import count
from distill_at_scale.pipeline.report.text import share as percent

NAME = "interaction"
FIRST = 2  # rates behind the additive prediction


def check(context: StudyContext) -> None:
    """Raises UserError where the drop rates do not ascend within (0, 1)."""
    _checked(context.config.studies.interaction.drops)


def study(context: StudyContext) -> Finding:
    section = context.config.studies.interaction
    drops = _checked(section.drops)
    whole, tried = _tried(context, drops)
    level = Level(accuracies(whole), section.tolerance)
    break_drop = _break_point(drops, [statistics.fmean(accuracies(o)) for o in tried], level.least)
    classes = _class_breaks(context, drops, whole, tried, section.tolerance)
    predicted = _predicted(drops, whole, tried)
    together = max(1, len(drops) - FIRST)
    gaps = [difference(accuracies(o), p, together=together) for o, p in zip(tried, predicted, strict=True)]
    answer = _answer(context, drops, break_drop, level, gaps)
    facts = {"break_drop": break_drop, "held_drop": _held(drops, break_drop), "per_class": classes}
    return Finding(
        NAME, "Interaction break point", answer, _paper(break_drop, drops), _rows(drops, whole, tried, predicted, gaps),
        [_plot(drops, whole, tried, predicted, level, break_drop), _class_plot(classes)], facts,
        _notes(context, drops, classes),
    )  # fmt: skip


def _checked(drops: Sequence[float]) -> list[float]:
    if list(drops) != sorted(set(drops)) or not 0 < drops[0] <= drops[-1] < 1:
        raise UserError(f"studies.interaction.drops = {list(drops)}: give ascending shares between 0 and 1")
    return list(drops)


def _tried(context: StudyContext, drops: Sequence[float]) -> tuple[list[Outcome], list[list[Outcome]]]:
    """Unpruned outcomes, and those of every drop rate."""
    cut = {**STATIC, "select.scope": "class", "select.order": "useful"}
    parts = [context.repetitions(UNPRUNED)]
    parts += [context.repetitions({**cut, "select.keep": round(1 - drop, 10)}) for drop in drops]
    found = iter(context.points.run(list(itertools.chain(*parts))))
    whole, *tried = [[next(found) for _ in part] for part in parts]
    return whole, tried


def _break_point(drops: Sequence[float], means: Sequence[float], least: float) -> float | None:
    """The first rate from which on every mean is below `least`."""
    found = None
    for drop, mean in zip(reversed(drops), reversed(means), strict=True):
        if mean >= least - 1e-12:
            break
        found = drop
    return found


def _class_breaks(
    context: StudyContext,
    drops: Sequence[float],
    whole: Sequence[Outcome],
    tried: Sequence[Sequence[Outcome]],
    tolerance: float,
) -> dict[str, float | None]:
    """The break point of every class, by name; None where it does not break or has no test samples."""
    before = list(zip(*map(per_class, whole), strict=True))  # by class, a value per repetition
    after = [list(zip(*map(per_class, outcomes), strict=True)) for outcomes in tried]
    found = {}
    for label, name in enumerate(class_names(context, len(before))):
        means = [statistics.fmean(values[label]) for values in after]
        least = Level(before[label], tolerance).least
        found[name] = None if math.isnan(least) else _break_point(drops, means, least)
    return found


def _predicted(
    drops: Sequence[float], whole: Sequence[Outcome], tried: Sequence[Sequence[Outcome]]
) -> list[list[float]]:
    """What the additive model says for every rate and repetition, from that repetition's first rates."""
    starts, first = accuracies(whole), [accuracies(outcomes) for outcomes in tried[:FIRST]]
    squares = sum(drop**2 for drop in drops[:FIRST])
    slopes = [
        sum(drop * (values[k] - start) for drop, values in zip(drops, first, strict=False)) / squares
        for k, start in enumerate(starts)
    ]
    return [[start + slope * drop for start, slope in zip(starts, slopes, strict=True)] for drop in drops]


def _held(drops: Sequence[float], break_drop: float | None) -> float:
    """The largest rate before the break; 0 where the first one breaks already."""
    return max((drop for drop in drops if break_drop is None or drop < break_drop), default=0.0)


def _answer(
    context: StudyContext, drops: Sequence[float], break_drop: float | None, level: Level, gaps: Sequence[Difference]
) -> str:
    name, _ = criterion_of(context)
    where = (
        f"does not break up to {percent(drops[-1])} dropped" if break_drop is None
        else f"breaks at {percent(break_drop)} dropped"
    )  # fmt: skip
    clear = [k for k in range(FIRST, len(drops)) if gaps[k].clear]
    if clear:
        k = clear[-1]
        side = "worse" if gaps[k].mean < 0 else "better"
        adds = f"effects do not add up: at {percent(drops[k])} it is {side} than predicted by adding, by {in_points(gaps[k])}"
    else:
        adds = "the additive prediction from the first rates is not refuted"
    return f"Dropping the least useful by {name} {where} (unpruned {spread(level.accuracies)}); {adds}."


def _paper(break_drop: float | None, drops: Sequence[float]) -> str:
    said = "A known limit of the method is that accuracy of small, uniform sets (MNIST-like) breaks beyond 30 % dropped"
    if break_drop is None:
        return f"{said}; here it does not, up to {percent(drops[-1])}."
    return f"{said}; here it holds beyond that." if break_drop > 0.3 else f"{said}; here it breaks by then."


def _rows(
    drops: Sequence[float], whole: Sequence[Outcome], tried: Sequence[Sequence[Outcome]],
    predicted: Sequence[Sequence[float]], gaps: Sequence[Difference],
) -> list[dict[str, Any]]:  # fmt: skip
    start, std = mean_and_std(accuracies(whole))
    rows: list[dict[str, Any]] = [
        {"drop": 0.0, "kept": whole[0].kept, "mean": start, "std": std, "n": len(whole), "predicted": start, "gap": 0.0,
         "half_interval": None}
    ]  # fmt: skip
    for drop, outcomes, line, gap in zip(drops, tried, predicted, gaps, strict=True):
        mean, std = mean_and_std(accuracies(outcomes))
        rows.append({"drop": drop, "kept": outcomes[0].kept, "mean": mean, "std": std, "n": len(outcomes),
                     "predicted": statistics.fmean(line), "gap": gap.mean, "half_interval": gap.half})  # fmt: skip
    return rows


def _plot(
    drops: Sequence[float], whole: Sequence[Outcome], tried: Sequence[Sequence[Outcome]],
    predicted: Sequence[Sequence[float]], level: Level, break_drop: float | None,
) -> Plot:  # fmt: skip
    figures = [mean_and_std(accuracies(outcomes)) for outcomes in (whole, *tried)]
    x, line = [0.0, *drops], [level.mean, *(statistics.fmean(values) for values in predicted)]
    series = [
        Series("measured", x, [m for m, _ in figures], [s for _, s in figures], role="ours"),
        Series("additive prediction", x, [min(1.0, max(0.0, value)) for value in line]),
    ]
    levels = [("unpruned", level.mean), ("broken below", level.least)]
    marks = [] if break_drop is None else [("break point", break_drop)]
    return Plot(
        "Accuracy against the share dropped", "share dropped, the least useful first", "top-1", series, levels, marks
    )


def _class_plot(classes: Mapping[str, float | None]) -> Plot:
    """Bars of the classes that break; 1 where a class does not."""
    series = Series(
        "break point", list(classes), [1.0 if drop is None else drop for drop in classes.values()], None, "bars", "ours"
    )
    return Plot("Break point per class (1: does not break)", "class", "share dropped", [series])


def _notes(context: StudyContext, drops: Sequence[float], classes: Mapping[str, float | None]) -> list[str]:
    section = context.config.studies
    broken = {name: drop for name, drop in classes.items() if drop is not None}
    notes = [
        f"{sample_size(section.seeds, section.evaluations)} per rate. Prediction: a line through the "
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

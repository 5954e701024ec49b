"""The same keep rates over several data sets, or derived ones: where does pruning by score pay?

Every set has its own unpruned runs, to which all its accuracies are relative, and random selection at the same rates. The
test split is that of the set. Left out: which rate is the best for a set (critical_ratio).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import BY_RATE, RANDOM, UNPRUNED, Finding, StudyContext
from distill_at_scale.experiments.studies.comparison import difference, near_chance
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import NBSP, count, points

NAME = "across"
NOT_OF_A_SET = ("run", "cluster", "sweep", "studies")  # sections
PAPER = (
    "The paper leaves open how the early loss bears long-tailed, imbalanced or strongly correlated data; its known limit is "
    "that sets like MNIST lose beyond 30 % dropped."
)
KINDS = {
    "none": "as it is",
    "long_tail": "long tail 1:{imbalance:g}",
    "near_duplicates": "{copies} near-duplicates each",
    "low_variance": "low variance",
    "high_variance": "high variance",
}


@dataclass(frozen=True)
class Cell:
    """What one way of selecting gave on one set: accuracies over repetitions, as fractions."""

    accuracies: list[float]
    kept: int
    of: int
    classes: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        return mean_and_std(self.accuracies)[1]


@dataclass(frozen=True)
class StudyDataset:
    """One data set and its curve."""

    name: str
    config: Config
    unpruned: Cell
    ours: dict[float, Cell]  # by keep rate
    random: dict[float, Cell]

    @property
    def kind(self) -> str:
        data = self.config.data
        return KINDS[data.transform].format(imbalance=data.imbalance, copies=data.copies)

    def relative(self, cell: Cell) -> tuple[float, float | None]:
        """Accuracy as a part of the unpruned one, and its deviation by the propagation of both."""
        if not self.unpruned.mean:
            return float("nan"), None
        part = cell.mean / self.unpruned.mean
        if cell.std is None or self.unpruned.std is None:
            return part, None
        return part, math.hypot(cell.std, part * self.unpruned.std) / self.unpruned.mean


def study(context: StudyContext) -> Finding:
    """Raises UserError that names the set, before anything starts, for one whose configuration is not allowed."""
    sets = _sets(context)
    configs = {name: _configured(context, name, overrides) for name, overrides in sets.items()}
    tried = [point for overrides in sets.values() for point in _points(context, overrides)]
    context.say(f"across: {len(tried)} points over {len(sets)} data sets")
    outcomes = context.points.run(tried)
    found, notes = [], []
    for name, overrides in sets.items():
        made = _set(context, name, configs[name], overrides, outcomes)
        if made is None:
            notes.append(
                f"The set {name} is left out: nothing was evaluated on it; has it a test split (data.holdout)?"
            )
        else:
            found.append(made)
    notes += _notes(context, found)
    rows, plots = [row for one in found for row in _rows(one)], [_plot(context, found)] if found else []
    return Finding(NAME, "Across data sets", _answer(context, found), _paper(found), rows, plots, _facts(found), notes)


def check(context: StudyContext) -> None:
    """Raises UserError that names the set for one whose configuration or names are not allowed; nothing is made."""
    for name, overrides in _sets(context).items():
        config = _configured(context, name, overrides)
        try:
            validate.check_names(config)
        except UserError as error:
            raise UserError(f"studies.across.sets.{name}: {error}" if overrides else str(error)) from None


def _sets(context: StudyContext) -> dict[str, Mapping[str, Any]]:
    """What differs from the base, by name; the base itself comes first."""
    section = context.config.studies.across
    source = context.config.data.source.rpartition(":")[2]
    return {source if source not in section.sets else "base": {}, **section.sets}


def _rates(context: StudyContext) -> list[float]:
    return sorted(set(context.config.studies.across.keep))


def _configured(context: StudyContext, name: str, overrides: Mapping[str, Any]) -> Config:
    """All points of a set can be configured; returns the configuration of its unpruned ones."""
    place = f"studies.across.sets.{name}"
    for key in overrides:
        if "." not in key:
            raise UserError(
                f"{place}: {key} is a whole section; give the keys that differ, for example {key}.KEY: VALUE"
            )
        if key.partition(".")[0] in NOT_OF_A_SET:
            raise UserError(f"{place}: {key} cannot differ from set to set; leave it out")
    try:
        configs = [context.points.configured(point) for point in _points(context, overrides)]
    except UserError as error:
        raise UserError(f"{place}: {error}" if overrides else str(error)) from None
    return configs[0]


def _unpruned(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**overrides, **UNPRUNED}


def _ours(overrides: Mapping[str, Any], rate: float) -> dict[str, Any]:
    return {**overrides, "select.per_class": None, "select.keep": rate}


def _random(overrides: Mapping[str, Any], rate: float) -> dict[str, Any]:
    return {**overrides, **BY_RATE, **RANDOM, "select.order": "useful", "select.scope": "class", "select.keep": rate}


def _points(context: StudyContext, overrides: Mapping[str, Any]) -> list[Point]:
    found = context.repetitions(_unpruned(overrides))
    for rate in _rates(context):
        found += context.repetitions(_ours(overrides, rate)) + context.repetitions(_random(overrides, rate))
    return found


def _set(
    context: StudyContext, name: str, config: Config, overrides: Mapping[str, Any], outcomes: Sequence[Outcome]
) -> StudyDataset | None:
    """None where a part of it has no outcome."""

    def cell(asked: Mapping[str, Any]) -> Cell | None:
        wanted = context.repetitions(asked)
        every = [next((outcome for outcome in outcomes if outcome.point == point), None) for point in wanted]
        found = [outcome for outcome in every if outcome is not None]
        if not found:
            return None
        return Cell([o.accuracy() for o in found], found[0].kept, found[0].of, len(found[0].kept_per_class))

    unpruned = cell(_unpruned(overrides))
    ours = {rate: made for rate in _rates(context) if (made := cell(_ours(overrides, rate)))}
    random = {rate: made for rate in _rates(context) if (made := cell(_random(overrides, rate)))}
    if unpruned is None or not len(ours) == len(random) == len(_rates(context)):
        return None
    return StudyDataset(name, config, unpruned, ours, random)


def clear(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """1 where ours are clearly higher, -1 where clearly lower, else 0."""
    gap = difference(ours, theirs)
    return 0 if not gap.clear else 1 if gap.mean > 0 else -1


def _rows(one: StudyDataset) -> list[dict[str, Any]]:
    cells = [("unpruned", 1.0, one.unpruned)]
    cells += [(name, rate, cells[rate]) for name, cells in _ways(one).items() for rate in cells]
    return [_row(one, name, rate, cell) for name, rate, cell in cells]


def _ways(one: StudyDataset) -> dict[str, dict[float, Cell]]:
    return {_criterion(one.config): one.ours, "random": one.random}


def _criterion(config: Config) -> str:
    chosen = config.criterion
    if isinstance(chosen, str):
        name = chosen.rpartition(":")[2]
    else:
        name = " + ".join(f"{weight:g} {part}" for part, weight in chosen.items())
    return name if config.select.order == "useful" else f"{name}, {config.select.order}"


def _row(one: StudyDataset, name: str, rate: float, cell: Cell) -> dict[str, Any]:
    relative, error = one.relative(cell)
    return {"set": one.name, "data": one.kind, "selection": name, "keep": rate, "kept": cell.kept, "of": cell.of,
            "mean": cell.mean, "std": cell.std, "n": len(cell.accuracies), "relative": relative,
            "relative std": error}  # fmt: skip


def _plot(context: StudyContext, found: Sequence[StudyDataset]) -> Plot:
    """All sets side by side: one bar per set, rate and way of selecting."""
    names, series = [one.name for one in found], []
    for rate in _rates(context):
        for way in ("ours", "random"):
            values = [one.relative(getattr(one, way)[rate]) for one in found]
            label = _criterion(context.config) if way == "ours" else way
            series.append(Series(f"{label}, keep {rate:g}", names, [v for v, _ in values], [e for _, e in values], "bars",
                                 "ours" if way == "ours" else "random"))  # fmt: skip
    title = "Accuracy relative to each set's unpruned one"
    return Plot(title, "data set", "top-1, as a part of unpruned", series, [("unpruned", 1.0)])


def _paper(found: Sequence[StudyDataset]) -> str:
    verdicts = [clear(cell.accuracies, one.random[r].accuracies) for one in found for r, cell in one.ours.items()]
    return (
        f"{PAPER} Here, of {len(verdicts)} pairs of set and rate, the selection is clearly better than a random one in "
        f"{verdicts.count(1)} and clearly worse in {verdicts.count(-1)}."
    )


def _answer(context: StudyContext, found: Sequence[StudyDataset]) -> str:
    if not found:
        return "No data set could be evaluated."
    sentences = [_of_rate(context, found, rate) for rate in _rates(context)]
    base, rate = found[0], _rates(context)[0]
    if derived := [one for one in found if one.config.data.transform != "none"]:
        gains = "; ".join(f"{one.kind} ({one.name}) {_gain(one, rate)}" for one in derived)
        sentences.append(f"Gain over random selection at keep {rate:g}: {base.name} {_gain(base, rate)}; {gains}.")
    return " ".join(sentences)


def _of_rate(context: StudyContext, found: Sequence[StudyDataset], rate: float) -> str:
    def which(sign: int, against: str) -> str:
        theirs = [one.unpruned if against == "unpruned" else one.random[rate] for one in found]
        pairs = zip(found, theirs, strict=True)
        return (
            ", ".join(one.name for one, cell in pairs if clear(one.ours[rate].accuracies, cell.accuracies) == sign)
            or "none"
        )

    name = _criterion(context.config)
    return (
        f"At keep {rate:g}, of {count(len(found), 'set')}, {name} clearly beats random selection on {which(1, 'random')} and "
        f"loses to it on {which(-1, 'random')}; it clearly beats the unpruned set on {which(1, 'unpruned')} and is clearly "
        f"below it on {which(-1, 'unpruned')}."
    )


def _gain(one: StudyDataset, rate: float) -> str:
    ours, random = one.ours[rate], one.random[rate]
    gain = points(ours.mean - random.mean)
    unsure = "" if clear(ours.accuracies, random.accuracies) else ", not clear"
    return f"{gain} points ({100 * one.relative(ours)[0]:.0f}{NBSP}% of unpruned{unsure})"


def _facts(found: Sequence[StudyDataset]) -> dict[str, Any]:
    return {
        "sets": {
            one.name: {
                "data": one.kind,
                "unpruned": one.unpruned.mean,
                "ours": {str(rate): one.relative(cell)[0] for rate, cell in one.ours.items()},
                "random": {str(rate): one.relative(cell)[0] for rate, cell in one.random.items()},
                "beats_random": {str(r): clear(c.accuracies, one.random[r].accuracies) for r, c in one.ours.items()},
                "beats_unpruned": {str(r): clear(c.accuracies, one.unpruned.accuracies) for r, c in one.ours.items()},
            }
            for one in found
        }
    }


def _notes(context: StudyContext, found: Sequence[StudyDataset]) -> list[str]:
    notes = [
        f"{context.config.studies.seeds} distillations per point; a difference is clear where its paired 95 % t-interval "
        "leaves zero out."
    ]
    if any(one.config.data.transform in ("low_variance", "high_variance") for one in found):
        notes.append(
            "Sets chosen by variance have fewer classes, in the test split too; compare them relative to themselves."
        )
    if chance := [one.name for one in found if near_chance(one.unpruned.mean, one.unpruned.classes)]:
        notes.append(
            f"On {', '.join(chance)} even the unpruned set is near chance, so the comparison says little there; distil longer, "
            "or more images per class."
        )
    few = [
        one.name for one in found for rate, cell in one.ours.items() if cell.kept > rate * cell.of + cell.classes / 2
    ]
    if few:
        notes.append(
            f"At least min_per_class samples of a class are kept, which raised the rate on {', '.join(dict.fromkeys(few))}."
        )
    return notes

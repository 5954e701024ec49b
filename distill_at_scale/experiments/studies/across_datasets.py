"""Where does pruning by score pay? The same keep rates on several data sets, or on sets derived from one.

Each set has unpruned runs of its own, to which its accuracies are relative, random selection at the same rates, and its own
test split. Not covered: the best rate for a set (critical_ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.statistics import mean_and_std, summary
from distill_at_scale.experiments.studies import comparison
from distill_at_scale.experiments.studies.base import BY_RATE, RANDOM, UNPRUNED, Finding, Repetitions, StudyContext
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import NBSP, count, points

NOT_OF_A_SET = ("run", "cluster", "sweep", "studies")  # sections
PAPER = (
    "The paper leaves open how the early loss bears long-tailed, imbalanced or strongly correlated data; its known limit is "
    "that sets like MNIST lose beyond 30 % dropped."
)
KINDS = {
    "none": "as it is", "long_tail": "long tail 1:{imbalance:g}", "near_duplicates": "{copies} near-duplicates each",
    "low_variance": "low variance", "high_variance": "high variance",
}  # fmt: skip

Way = tuple[str, float]  # unpruned, ours or random; keep rate


@dataclass(frozen=True)
class StudyDataset:
    """One data set and its results."""

    name: str
    config: Config
    cells: Mapping[Way, Repetitions]

    @property
    def kind(self) -> str:
        data = self.config.data
        return KINDS[data.transform].format(imbalance=data.imbalance, copies=data.copies)

    @property
    def unpruned(self) -> Repetitions:
        return self.cells["unpruned", 1.0]

    def relative(self, way: Way) -> tuple[float, float | None]:
        """Accuracy as a part of the unpruned one, and its standard deviation by error propagation."""
        (mean, std), (base, base_std) = (mean_and_std(self.cells[w].accuracies) for w in (way, ("unpruned", 1.0)))
        if not base:
            return float("nan"), None
        part = mean / base
        return part, None if std is None or base_std is None else math.hypot(std, part * base_std) / base

    def beats(self, other: str, rate: float) -> int:
        """1 where the selection is clearly better than `other` (random, unpruned), -1 where clearly worse, else 0."""
        theirs = self.unpruned if other == "unpruned" else self.cells[other, rate]
        return comparison.difference(self.cells["ours", rate].accuracies, theirs.accuracies).sign

    def facts(self, rates: Sequence[float]) -> dict[str, Any]:
        facts: dict[str, Any] = {"data": self.kind, "unpruned": self.unpruned.mean}
        facts |= {way: {str(rate): self.relative((way, rate))[0] for rate in rates} for way in ("ours", "random")}
        others = ("random", "unpruned")
        return facts | {f"beats_{other}": {str(rate): self.beats(other, rate) for rate in rates} for other in others}


def check(context: StudyContext) -> None:
    """Raises UserError, naming the set, for a configuration or name that is not allowed. Writes nothing."""
    for name, overrides in data_sets(context).items():
        config = configured(context, name, overrides)
        try:
            validate.check_names(config)
        except UserError as error:
            raise UserError(f"studies.across.sets.{name}: {error}" if overrides else str(error)) from None


def study(context: StudyContext) -> Finding:
    """Raises UserError, naming the set, before anything starts, for a configuration that is not allowed."""
    sets, rates = data_sets(context), _rates(context)
    configs = {name: configured(context, name, overrides) for name, overrides in sets.items()}
    ways = {name: _ways(context, overrides) for name, overrides in sets.items()}
    tried = [point for own in ways.values() for way in own.values() for point in context.repetitions(way)]
    context.say(f"across: {len(tried)} points over {len(sets)} data sets")
    outcomes = context.points.run(tried)
    results, notes = list[StudyDataset](), list[str]()
    for name in sets:
        cells = {}
        for way, overrides in ways[name].items():  # without a test split there is no outcome
            wanted = context.repetitions(overrides)
            matches = [next((outcome for outcome in outcomes if outcome.point == point), None) for point in wanted]
            if own := [outcome for outcome in matches if outcome is not None]:
                cells[way] = Repetitions(own)
        if len(cells) == len(ways[name]):
            results.append(StudyDataset(name, configs[name], cells))
        else:
            notes.append(f"The set {name} is left out: it was not evaluated. Does it have a test split?")

    rows = []
    for one in results:
        for way in (("unpruned", 1.0), *(("ours", rate) for rate in rates), *(("random", rate) for rate in rates)):
            cell, (relative, error) = one.cells[way], one.relative(way)
            name = _criterion(one.config) if way[0] == "ours" else way[0]
            rows.append({"set": one.name, "data": one.kind, "selection": name, "keep": way[1], "kept": cell.kept,
                         "of": cell.of, **summary(cell.accuracies), "relative": relative, "relative std": error})  # fmt: skip
    verdicts = [one.beats("random", rate) for one in results for rate in rates]
    paper = (
        f"{PAPER} Here, of {len(verdicts)} pairs of set and rate, the selection is clearly better than a random one in "
        f"{verdicts.count(1)} and clearly worse in {verdicts.count(-1)}."
    )
    answer, plots = _answer(context, results), [_plot(context, results)] if results else []
    facts = {"sets": {one.name: one.facts(rates) for one in results}}
    return Finding("across", "Across data sets", answer, paper, rows, plots, facts, notes + _notes(context, results))


def _plot(context: StudyContext, results: Sequence[StudyDataset]) -> Plot:
    series = []
    for rate in _rates(context):
        for name, label in (("ours", _criterion(context.config)), ("random", "random")):
            values = [one.relative((name, rate)) for one in results]
            series.append(
                Series(f"{label}, keep {rate:g}", [one.name for one in results], [value for value, _ in values],
                       [error for _, error in values], "bars", "ours" if name == "ours" else "random")
            )  # fmt: skip
    title = "Accuracy relative to each set's unpruned one"
    return Plot(title, "data set", "top-1, as a part of unpruned", series, [("unpruned", 1.0)])


def data_sets(context: StudyContext) -> dict[str, Mapping[str, Any]]:
    """The overrides of each set, by name; the base configuration is the first."""
    section = context.config.studies.across
    source = context.config.data.source.rpartition(":")[2]
    return {source if source not in section.sets else "base": {}, **section.sets}


def configured(context: StudyContext, name: str, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a set's unpruned points; raises UserError where a point of the set is not allowed."""
    place = f"studies.across.sets.{name}"
    for key in overrides:
        if "." not in key:
            raise UserError(f"{place}: {key} is a whole section; give the keys that differ, such as {key}.KEY: VALUE")
        if key.partition(".")[0] in NOT_OF_A_SET:
            raise UserError(f"{place}: {key} cannot differ from set to set; leave it out")
    try:
        ways = _ways(context, overrides).values()
        return [context.points.configured(point) for way in ways for point in context.repetitions(way)][0]  # noqa: RUF015
    except UserError as error:
        raise UserError(f"{place}: {error}" if overrides else str(error)) from None


def _rates(context: StudyContext) -> list[float]:
    return sorted(set(context.config.studies.across.keep))


def _ways(context: StudyContext, overrides: Mapping[str, Any]) -> dict[Way, dict[str, Any]]:
    """The overrides of all ways of selecting on a set."""
    ways: dict[Way, dict[str, Any]] = {("unpruned", 1.0): {**overrides, **UNPRUNED}}
    random = {**overrides, **BY_RATE, **RANDOM, "select.order": "useful", "select.scope": "class"}
    for rate in _rates(context):
        ways["ours", rate] = {**overrides, "select.per_class": None, "select.keep": rate}
        ways["random", rate] = {**random, "select.keep": rate}
    return ways


def _criterion(config: Config) -> str:
    name = comparison.criterion_name(config)
    return name if config.select.order == "useful" else f"{name}, {config.select.order}"


def _answer(context: StudyContext, results: Sequence[StudyDataset]) -> str:
    if not results:
        return "No data set could be evaluated."
    rates, sentences = _rates(context), []
    for rate in rates:
        won, lost, above, below = (
            ", ".join(one.name for one in results if one.beats(other, rate) == sign) or "none"
            for other in ("random", "unpruned")
            for sign in (1, -1)
        )
        name, sets = _criterion(context.config), count(len(results), "set")
        sentences.append(
            f"At keep {rate:g}, of {sets}, {name} clearly beats random selection on {won} and loses to it on {lost}; "
            f"it clearly beats the unpruned set on {above} and is clearly below it on {below}."
        )
    base, first = results[0], rates[0]
    if derived := [one for one in results if one.config.data.transform != "none"]:
        gains = "; ".join(f"{one.kind} ({one.name}) {_gain(one, first)}" for one in derived)
        sentences.append(f"Gain over random selection at keep {first:g}: {base.name} {_gain(base, first)}; {gains}.")
    return " ".join(sentences)


def _gain(one: StudyDataset, rate: float) -> str:
    gain = points(one.cells["ours", rate].mean - one.cells["random", rate].mean)
    unclear = "" if one.beats("random", rate) else ", not clear"
    return f"{gain} points ({100 * one.relative(('ours', rate))[0]:.0f}{NBSP}% of unpruned{unclear})"


def _notes(context: StudyContext, results: Sequence[StudyDataset]) -> list[str]:
    notes = [
        f"{context.config.studies.seeds} distillations per point; a difference is clear where its paired 95 % t-interval "
        "leaves zero out."
    ]
    if any(one.config.data.transform in ("low_variance", "high_variance") for one in results):
        notes.append("Sets chosen by variance have fewer classes, also in the test split; compare within a set.")
    bases = [(one.name, one.unpruned) for one in results]
    if chance := [name for name, base in bases if comparison.near_chance(base.mean, len(base.kept_per_class))]:
        notes.append(
            f"On {', '.join(chance)} even the unpruned set is near chance, so the comparison says little there; distil longer, "
            "or more images per class."
        )
    ours = [(one.name, rate, one.cells["ours", rate]) for one in results for rate in _rates(context)]
    if raised := [name for name, rate, cell in ours if cell.kept > rate * cell.of + len(cell.kept_per_class) / 2]:
        notes.append(
            f"At least min_per_class samples of a class are kept, which raised the rate on {', '.join(dict.fromkeys(raised))}."
        )
    return notes

"""How far scores and selections can be relied on: between trials, epochs, networks and criteria, and while a set is distilled.

Agreement is Spearman's rank correlation within class (mean over classes) and the Jaccard index of the kept sets. How many
trials suffice follows from the agreement of single ones by Spearman and Brown's formula; means over disjoint halves of the
trials check it. Left out: whether what is kept is any good (the other studies).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.studies import drift, rankings
from distill_at_scale.experiments.studies.base import Finding, StudyContext
from distill_at_scale.experiments.studies.rankings import RankSample, Scores
from distill_at_scale.models.spec import builder
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import share
from distill_at_scale.pruning.scoring.reliability import spearman_brown

NAME = "stability"
RATES = (0.1, 0.3, 0.5)
CHANGED = 0.1  # of rank correlation below what another seed gives: then utility drifts
PAPER = (
    "The paper averages 5 trials of 5 early epochs for its early loss, without saying how far they agree, and leaves open "
    "whether utility drifts during distillation; the figures here are of this data and network alone."
)

Array = np.ndarray[Any, Any]


@dataclass
class _Part:
    """What one comparison adds to the finding."""

    answer: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Base:
    """The scores that the others are compared with."""

    context: StudyContext
    scores: Scores
    drawn: RankSample
    column: str
    rates: list[float]

    @property
    def low(self) -> bool:
        return self.scores.low(self.column)

    @property
    def score(self) -> Array:
        return self.scores.read(self.column, self.drawn.rows)

    def correlations(self, vectors: Sequence[Array]) -> tuple[Array, Array]:
        return rankings.correlations(np.stack(vectors, 1), self.drawn.labels)

    def overlaps(self, vectors: Sequence[Array], low: bool | None = None) -> list[Array]:
        """Per rate the Jaccard index of what every two vectors would keep."""
        low, stacked = self.low if low is None else low, np.stack(vectors, 1)
        return [rankings.jaccard(rankings.kept(stacked, self.drawn.labels, rate, low)) for rate in self.rates]

    def row(
        self, compared: str, names: tuple[str, str], found: tuple[float, float | None], overlap: Sequence[float]
    ) -> Any:
        shared: Sequence[float | None] = overlap or [None] * len(self.rates)
        jaccard = {f"jaccard at keep {rate:g}": value for rate, value in zip(self.rates, shared, strict=True)}
        return {"compared": compared, "first": names[0], "second": names[1], "correlation": found[0],
                "deviation over classes": found[1], **jaccard}  # fmt: skip


def check(context: StudyContext) -> None:
    """Raises UserError for a network that is not there, and where nothing is scored; nothing is made."""
    if not rankings.scored(context.config.score):
        raise UserError("the study stability needs scores; name a criterion other than random in score.criterion, or leave "
                        "it out of studies.run")  # fmt: skip
    for name in context.config.studies.stability.networks:
        builder("studies.stability.networks", name)


def study(context: StudyContext) -> Finding:
    """Raises UserError, before anything is distilled, for a point or network that is not allowed."""
    for point in drift.points(context):
        context.points.configured(point)
    base = _base(context)
    parts = [_trials(base), _epochs(base), _networks(base), _criteria(base), _drift(base)]
    notes = [note for part in parts for note in part.notes]
    if len(base.drawn.rows) < base.drawn.of:
        notes.append(
            f"{len(base.drawn.rows):,} of {base.drawn.of:,} samples were looked at, a seeded draw class by class."
        )
    facts = {"agreement": None, "trials_needed": None, "drift": None, "criterion": base.column}
    for part in parts:
        facts |= part.facts
    answer = " ".join(part.answer for part in parts if part.answer)
    rows, plots = [row for part in parts for row in part.rows], [plot for part in parts for plot in part.plots]
    return Finding(NAME, "Stability of scores and selections", answer, PAPER, rows, plots, facts, notes)


def _base(context: StudyContext) -> _Base:
    scores, config = Scores(context.points.shared({}) / "scores.parquet"), context.config
    wanted = config.criterion.rpartition(":")[2] if isinstance(config.criterion, str) else ""
    column = wanted if wanted in scores.columns else scores.columns[0]
    keep = None if isinstance(config.select.keep, str) or config.select.per_class else config.select.keep
    return _Base(context, scores, scores.draw(config.run.seed), column, rankings.rates_of([keep, *RATES]))


def _trials(base: _Base) -> _Part:
    """Single trials with each other, and means over halves of them."""
    values = base.scores.values(base.column, base.drawn.rows)
    if values is None or values.shape[1] < 2:
        return _Part(f"The agreement of {base.column} between trials is not known.", notes=[
            f"The scores {base.column} are not there for two trials or more; raise score.trials to see how far they agree."
        ])  # fmt: skip
    trials = rankings.by_trial(values, base.column, base.context.config.score)
    count, vectors = trials.shape[1], list(trials.T)
    mean, std = base.correlations(vectors)
    single, spread = rankings.off_diagonal(mean), rankings.off_diagonal(std)
    overlap = [rankings.off_diagonal(matrix) for matrix in base.overlaps(vectors)]
    rows = [base.row("two trials", ("a trial", "another"), (single, spread), overlap)]
    seed = base.context.config.run.seed
    sizes = range(1, count // 2 + 1)
    halves = [rankings.half_correlation(trials, base.drawn.labels, size, seed) for size in sizes]
    rows += [
        base.row("means of trials", (f"mean of {size}", f"mean of {size} others"), (found, None), [])
        for size, found in zip(sizes, halves, strict=True)
        if size > 1
    ]
    wanted = base.context.config.studies.stability.reliability
    needed = rankings.trials_needed(single, wanted)
    facts = {"agreement": single, "trials": count, "trials_needed": needed, "reliability_wanted": wanted,
             "reliability": spearman_brown(single, count) if single > 0 else 0.0,
             "jaccard_between_trials": dict(zip(map(str, base.rates), overlap, strict=True))}  # fmt: skip
    plots = [_by_number(single, halves, count, needed, wanted), _by_rate(base, overlap)]
    return _Part(_of_trials(base, facts, overlap), rows, plots, facts)


def _of_trials(base: _Base, facts: dict[str, Any], overlap: Sequence[float]) -> str:
    count, needed, wanted = facts["trials"], facts["trials_needed"], facts["reliability_wanted"]
    rate = base.rates[0]
    first = (
        f"Within class, two trials of {base.column} agree by a rank correlation of {facts['agreement']:.2f} and, at keep "
        f"{rate:.3g}, share {share(round(overlap[0], 2))} of what they keep (random sets: {share(round(rate / (2 - rate), 2))})"
    )
    if needed is None:
        return f"{first}; single trials do not agree at all, so no number of them is known to suffice."
    enough = "suffice" if needed <= count else "do not suffice"
    return (
        f"{first}; the {count} trials together are reliable by {facts['reliability']:.2f} and {enough}: {wanted:g} takes "
        f"{needed}."
    )


def _by_number(single: float, halves: Sequence[float], count: int, needed: int | None, wanted: float) -> Plot:
    numbers = list(range(1, (last := max(2 * count, min(needed or 0, 10 * count))) + 1))
    line = [spearman_brown(max(single, 0.0), number) for number in numbers]
    series = [Series("by Spearman and Brown", numbers, line, role="ours")]
    series.append(Series("measured between halves", list(range(1, len(halves) + 1)), list(halves), kind="points"))
    marks = [("trials needed", float(needed))] if needed is not None and needed <= last else []
    levels = [("asked for", wanted)]
    return Plot("Reliability by the number of trials", "trials averaged", "rank correlation", series, levels, marks)


def _by_rate(base: _Base, overlap: Sequence[float]) -> Plot:
    series = [
        Series("two trials", base.rates, list(overlap), role="ours"),
        Series("two random sets", base.rates, [rate / (2 - rate) for rate in base.rates], role="random"),
    ]
    return Plot("What two trials keep alike", "kept of every class", "Jaccard index", series)


def _epochs(base: _Base) -> _Part:
    """Every epoch with the last one, each as the mean over trials."""
    values = base.scores.values(base.column, base.drawn.rows)
    if values is None or values.shape[2] < 2:
        return _Part()
    vectors = list(values.mean(axis=1, dtype=np.float64).T)
    (mean, std), overlaps = base.correlations(vectors), base.overlaps(vectors)
    last = len(vectors) - 1
    rows = [
        base.row("epochs", (f"epoch {i + 1} of those scored", "the last one"), (mean[i, last], std[i, last]),
                 [matrix[i, last] for matrix in overlaps])
        for i in range(last)
    ]  # fmt: skip
    line = [float(value) for value in mean[:, last]]
    early = next(
        i for i, value in enumerate(line) if value >= base.context.config.studies.stability.reliability or i == last
    )
    until = "only the last one itself" if early == last else f"epoch {early + 1} of {last + 1} on"
    wanted = base.context.config.studies.stability.reliability
    answer = (
        f"The first epoch ranks as the last one by {line[0]:.2f}; a correlation of {wanted:g} is reached by {until}."
    )
    series = [
        Series("with the last epoch", list(range(1, last + 2)), line, [float(s) for s in std[:, last]], role="ours")
    ]
    plot = Plot("How early epochs rank", "epoch of those scored", "rank correlation with the last", series)
    return _Part(answer, rows, [plot], {"first_epoch_agreement": line[0], "epochs_with_last": line})


def _scored_by(base: _Base, network: str) -> dict[str, Any]:
    """The same criterion under another network, and no other criteria."""
    config = base.context.config
    names = [name for name in config.score.criteria if name.rpartition(":")[2] == base.column]
    return {"score.network": network} | ({"score.criterion": names} if names else {})


def _networks(base: _Base) -> _Part:
    """The base's network with each of studies.stability.networks."""
    config, names, score = base.context.config, [], [base.score]
    for name in config.studies.stability.networks:
        if name == config.score.network or name in names:
            continue
        base.context.say(f"stability: scores under {name}")
        other = Scores(base.context.points.shared(_scored_by(base, name)) / "scores.parquet")
        if base.column not in other.columns or other.file.metadata.num_rows != base.drawn.of:
            raise UserError(f"{other.path} has not the scores of the same samples; remove its folder and run again")
        names.append(name)
        score.append(other.read(base.column, base.drawn.rows))
    if not names:
        return _Part(notes=["Scores under other networks were not compared; name some in studies.stability.networks."])
    (mean, std), overlaps = base.correlations(score), base.overlaps(score)
    every = [config.score.network, *names]
    rows = [_pair(base, "networks", every, (mean, std), overlaps, pair) for pair in _pairs(every)]
    with_base = {name: float(mean[0, i + 1]) for i, name in enumerate(names)}
    worst = min(with_base, key=lambda name: with_base[name])
    answer = f"Another network ranks as {config.score.network} does by {with_base[worst]:.2f} ({worst})" + (
        f" to {max(with_base.values()):.2f}." if len(names) > 1 else "."
    )
    bars = Series("rank correlation", names, list(with_base.values()), [float(s) for s in std[0, 1:]], "bars", "ours")
    plot = Plot(f"Scores under other networks than {config.score.network}", "network", "rank correlation", [bars])
    return _Part(answer, rows, [plot], {"network_agreement": with_base})


def _criteria(base: _Base) -> _Part:
    """Every two criteria in the table, both turned so that low is useful."""
    names = base.scores.columns
    if len(names) < 2:
        return _Part()
    scores = [base.scores.read(name, base.drawn.rows) * (1 if base.scores.low(name) else -1) for name in names]
    found, overlaps = base.correlations(scores), base.overlaps(scores, low=True)
    rows = [_pair(base, "criteria", names, found, overlaps, pair) for pair in _pairs(names)]
    matrix = {a: {b: float(found[0][i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}
    known = [pair for pair in _pairs(names) if np.isfinite(found[0][pair])]  # a constant criterion ranks nothing
    i, j = min(known, key=lambda pair: found[0][pair], default=(0, 0))
    least = f"{found[0][i, j]:.2f}".replace("-", "−")
    answer = f"Of the criteria, {names[i]} and {names[j]} agree least ({least})." if known else ""
    series = [Series(name, names, [float(v) for v in found[0][k]], kind="points") for k, name in enumerate(names)]
    plot = Plot("Criteria against each other, low or high turned to useful", "criterion", "rank correlation", series)
    return _Part(answer, rows, [plot], {"criteria_agreement": matrix})


def _pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(names)), 2))


def _pair(
    base: _Base, compared: str, names: Sequence[str], found: tuple[Array, Array], overlaps: Sequence[Array], pair: Any
) -> Any:
    both = names[pair[0]], names[pair[1]]
    return base.row(compared, both, (float(found[0][pair]), float(found[1][pair])), [float(m[pair]) for m in overlaps])


def _drift(base: _Base) -> _Part:
    """Losses at several stages of a distillation with the static scores, and with those of the stage before."""
    base.context.say("stability: how utility drifts while a set is distilled")
    found = drift.measure(base.context, base.drawn)
    if found is None:
        return _Part(
            notes=["Drift was not measured: there are not two stages, or no test split (data.holdout makes one)."]
        )
    static = base.score * (1 if base.low else -1)
    vectors = [static, *found.losses.T, found.again]
    (mean, std), overlaps = base.correlations(vectors), base.overlaps(vectors, low=True)
    names = ["static scores", *(f"loss after step {step}" for step in found.steps), "the same, another network seed"]
    last = len(found.steps)
    pairs = [*((0, i) for i in range(1, last + 1)), *((i, i + 1) for i in range(1, last)), (1, last), (last, last + 1)]
    rows = [_pair(base, "stages", names, (mean, std), overlaps, pair) for pair in dict.fromkeys(pairs)]
    facts = {"steps": found.steps, "with_static": [float(v) for v in mean[0, 1 : last + 1]],
             "with_previous": [float(mean[i, i + 1]) for i in range(1, last)], "first_to_last": float(mean[1, last]),
             "another_seed": float(mean[last, last + 1]), "accuracies": found.accuracies}  # fmt: skip
    return _Part(_of_drift(facts), rows, [_over_steps(facts)], {"drift": facts})


def _of_drift(facts: dict[str, Any]) -> str:
    steps, static, chance = facts["steps"], facts["with_static"], facts["another_seed"]
    drifts = facts["first_to_last"] < chance - CHANGED
    verdict = "utility drifts" if drifts else "it hardly drifts beyond chance"
    return (
        f"While a set is distilled, the ranking by loss after step {steps[0]} agrees with that after step {steps[-1]} by "
        f"{facts['first_to_last']:.2f} (another network seed alone: {chance:.2f}), so {verdict}; with the static "
        f"scores it agrees by {static[0]:.2f} at first and {static[-1]:.2f} at the end."
    ).replace(" -", " −")


def _over_steps(facts: dict[str, Any]) -> Plot:
    steps = facts["steps"]
    series = [
        Series("with the static scores", steps, facts["with_static"], role="ours"),
        Series("with the stage before", steps[1:], facts["with_previous"]),
    ]
    levels = [("another network seed", facts["another_seed"])]
    return Plot("Utility while a set is distilled", "steps", "rank correlation", series, levels, log_x=True)

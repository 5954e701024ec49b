"""How reliable are scores and selections? Between trials, epochs, networks and criteria, and during a distillation.

Agreement is Spearman's rank correlation within class (mean over classes) and the Jaccard index of the kept sets. The
Spearman-Brown formula gives the number of trials needed from the agreement of single ones; means over disjoint halves of
the trials check it. Not covered: whether the kept samples are any good (the other studies).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distill_at_scale.core.atomic_files import set_aside
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.studies import drift, rankings
from distill_at_scale.experiments.studies.base import Finding, StudyContext
from distill_at_scale.experiments.studies.rankings import RankSample, Scores
from distill_at_scale.models.spec import builder
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import share
from distill_at_scale.pruning.scoring.reliability import spearman_brown
from distill_at_scale.pruning.selection.ranking import RANDOM

RATES = (0.1, 0.3, 0.5)
CHANGED = 0.1  # utility drifts if the rank correlation is lower than that of another seed by more than this
PAPER = (
    "The paper averages 5 trials of 5 early epochs for its early loss, without saying how far they agree, and leaves open "
    "whether utility drifts during distillation; the figures here are of this data and network alone."
)

Array = np.ndarray[Any, Any]


class _Reference:
    """The configured scores, with which the others are compared, on a sample of rows; and the findings so far."""

    def __init__(self, context: StudyContext):
        self.answers, self.notes = list[str](), list[str]()
        self.results, self.plots = list[dict[str, Any]](), list[Plot]()
        config = context.config
        self.context, self.scores = context, Scores(context.points.shared({}) / "scores.parquet")
        wanted = config.criterion.rpartition(":")[2] if isinstance(config.criterion, str) else ""
        self.column = wanted if wanted in self.scores.columns else self.scores.columns[0]
        self.sample: RankSample = self.scores.draw(config.run.seed)
        keep = None if isinstance(config.select.keep, str) or config.select.per_class else config.select.keep
        self.rates = sorted({rate for rate in (keep, *RATES) if rate is not None and 0 < rate < 1})
        self.low = self.scores.low(self.column)
        self.facts: dict[str, Any] = {"agreement": None, "trials_needed": None, "drift": None, "criterion": self.column}

    @property
    def score(self) -> Array:
        return self.scores.read(self.column, self.sample.rows)

    def compare(self, vectors: Sequence[Array], low: bool) -> tuple[Array, Array, list[Array]]:
        """Of every two score vectors: rank correlation, its deviation over classes, and a Jaccard index for each rate."""
        stacked = np.stack(vectors, 1)
        mean, std = rankings.correlations(stacked, self.sample.labels)
        kept = (rankings.kept(stacked, self.sample.labels, rate, low) for rate in self.rates)
        return mean, std, [rankings.jaccard(sets) for sets in kept]

    def add_row(self, compared: str, first: str, second: str, mean: float, std: float | None,
                overlap: Sequence[float | None] = ()) -> None:  # fmt: skip
        jaccard = zip(self.rates, overlap or [None] * len(self.rates), strict=True)
        self.results.append({
            "compared": compared, "first": first, "second": second, "correlation": mean, "deviation over classes": std,
            **{f"jaccard at keep {rate:g}": value for rate, value in jaccard},
        })  # fmt: skip

    def add_rows(self, compared: str, names: Sequence[str], pairs: Iterable[tuple[int, int]], mean: Array, std: Array,
                 overlaps: Sequence[Array]) -> None:  # fmt: skip
        for pair in pairs:
            first, second = (names[i] for i in pair)
            overlap = [float(matrix[pair]) for matrix in overlaps]
            self.add_row(compared, first, second, float(mean[pair]), float(std[pair]), overlap)


def check(context: StudyContext) -> None:
    """Raises UserError for an unknown network, and where nothing is scored."""
    score = context.config.score
    if not score.imported and all(name == RANDOM for name in score.criteria):
        raise UserError("the study stability needs scores; name a criterion other than random in score.criterion, or leave "
                        "it out of studies.run")  # fmt: skip
    for name in context.config.studies.stability.networks:
        builder("studies.stability.networks", name)


def study(context: StudyContext) -> Finding:
    """Raises UserError, before anything is distilled, for a point or network that is not allowed."""
    for point in drift.points(context):
        context.points.configured(point)
    base = _Reference(context)
    for compare in (_trials, _epochs, _networks, _criteria, _drift):
        compare(base)
    if len(base.sample.rows) < base.sample.of:
        base.notes.append(f"{len(base.sample.rows):,} of {base.sample.of:,} samples were compared, drawn by class.")
    title, answer = "Stability of scores and selections", " ".join(base.answers)
    return Finding("stability", title, answer, PAPER, base.results, base.plots, base.facts, base.notes)


def _trials(base: _Reference) -> None:
    """Single trials with each other, and means over halves of them."""
    values, config = base.scores.values(base.column, base.sample.rows), base.context.config
    if values is None or values.shape[1] < 2:
        base.answers.append(f"The agreement of {base.column} between trials is not known.")
        base.notes.append(
            f"The scores {base.column} are not there for two trials or more; raise score.trials to see how far they agree."
        )
        return
    trials = rankings.by_trial(values, base.column, config.score)
    count, wanted = trials.shape[1], config.studies.stability.reliability
    mean, std, overlaps = base.compare(list(trials.T), base.low)
    single, overlap = rankings.off_diagonal(mean), [rankings.off_diagonal(matrix) for matrix in overlaps]
    labels, seed, sizes = base.sample.labels, config.run.seed, range(1, count // 2 + 1)
    halves = [rankings.half_correlation(trials, labels, size, seed) for size in sizes]
    base.add_row("two trials", "a trial", "another", single, rankings.off_diagonal(std), overlap)
    for size, correlation in enumerate(halves[1:], 2):
        base.add_row("means of trials", f"mean of {size}", f"mean of {size} others", correlation, None)
    needed = rankings.trials_needed(single, wanted)
    reliability = spearman_brown(single, count) if single > 0 else 0.0
    rate = base.rates[0]
    answer = (
        f"Within class, two trials of {base.column} agree by a rank correlation of {single:.2f} and, at keep "
        f"{rate:.3g}, share {share(round(overlap[0], 2))} of what they keep (random sets: {share(round(rate / (2 - rate), 2))})"
    )
    if needed is None:
        answer += "; single trials do not agree at all, so no number of them is known to suffice."
    else:
        answer += (
            f"; the {count} trials together are reliable by {reliability:.2f} and "
            f"{'suffice' if needed <= count else 'do not suffice'}: {wanted:g} takes {needed}."
        )
    base.answers.append(answer)
    base.facts |= {"agreement": single, "trials": count, "trials_needed": needed, "reliability_wanted": wanted,
                   "reliability": reliability,
                   "jaccard_between_trials": dict(zip(map(str, base.rates), overlap, strict=True))}  # fmt: skip
    base.plots += _trial_plots(base, halves)


def _trial_plots(base: _Reference, halves: Sequence[float]) -> list[Plot]:
    facts = base.facts
    count, needed, single = facts["trials"], facts["trials_needed"], facts["agreement"]
    last = max(2 * count, min(needed or 0, 10 * count))
    numbers = list(range(1, last + 1))
    by_number = [
        Series("by Spearman and Brown", numbers, [spearman_brown(max(single, 0.0), n) for n in numbers], role="ours"),
        Series("measured between halves", list(range(1, len(halves) + 1)), list(halves), kind="points"),
    ]
    levels = [("asked for", facts["reliability_wanted"])]
    marks = [("trials needed", float(needed))] if needed is not None and needed <= last else []
    by_rate = [
        Series("two trials", base.rates, list(facts["jaccard_between_trials"].values()), role="ours"),
        Series("two random sets", base.rates, [rate / (2 - rate) for rate in base.rates], role="random"),
    ]
    return [
        Plot("Reliability by the number of trials", "trials averaged", "rank correlation", by_number, levels, marks),
        Plot("What two trials keep alike", "kept of every class", "Jaccard index", by_rate),
    ]


def _epochs(base: _Reference) -> None:
    """Each epoch with the last one, as means over trials."""
    values = base.scores.values(base.column, base.sample.rows)
    if values is None or values.shape[2] < 2:
        return
    mean, std, overlaps = base.compare(list(values.mean(axis=1, dtype=np.float64).T), base.low)
    last = values.shape[2] - 1
    names = [*(f"epoch {i + 1} of those scored" for i in range(last)), "the last one"]
    base.add_rows("epochs", names, ((i, last) for i in range(last)), mean, std, overlaps)
    line, deviations = [float(value) for value in mean[:, last]], [float(value) for value in std[:, last]]
    wanted = base.context.config.studies.stability.reliability
    early = next(i for i, value in enumerate(line) if value >= wanted or i == last)
    until = "only the last one itself" if early == last else f"epoch {early + 1} of {last + 1} on"
    base.answers.append(
        f"The first epoch ranks as the last one by {line[0]:.2f}; a correlation of {wanted:g} is reached by {until}."
    )
    series = [Series("with the last epoch", list(range(1, last + 2)), line, deviations, role="ours")]
    base.plots.append(Plot("How early epochs rank", "epoch of those scored", "rank correlation with the last", series))
    base.facts |= {"first_epoch_agreement": line[0], "epochs_with_last": line}


def _networks(base: _Reference) -> None:
    """The configured scoring network with each of studies.stability.networks."""
    config, names, scores = base.context.config, list[str](), [base.score]
    # the same criterion under another network, without the other criteria
    criterion = [name for name in config.score.criteria if name.rpartition(":")[2] == base.column]
    for name in dict.fromkeys(config.studies.stability.networks):
        if name == config.score.network:
            continue
        base.context.say(f"stability: scores under {name}")
        overrides = {"score.network": name} | ({"score.criterion": criterion} if criterion else {})
        other = Scores(base.context.points.shared(overrides) / "scores.parquet")
        if base.column not in other.columns or other.file.metadata.num_rows != base.sample.of:
            raise UserError(f"{other.path} has not the scores of the same samples; {set_aside(other.path.parent)}")
        names.append(name)
        scores.append(other.read(base.column, base.sample.rows))
    if not names:
        base.notes.append("Scores under other networks were not compared; name some in studies.stability.networks.")
        return
    mean, std, overlaps = base.compare(scores, base.low)
    pairs = list(itertools.combinations(range(len(scores)), 2))
    base.add_rows("networks", [config.score.network, *names], pairs, mean, std, overlaps)
    agreement = {name: float(mean[0, i]) for i, name in enumerate(names, 1)}
    worst = min(agreement, key=lambda name: agreement[name])
    best = f" to {max(agreement.values()):.2f}" if len(names) > 1 else ""
    ours = config.score.network
    base.answers.append(f"Another network ranks as {ours} does by {agreement[worst]:.2f} ({worst}){best}.")
    bars = Series("rank correlation", names, list(agreement.values()), [float(s) for s in std[0, 1:]], "bars", "ours")
    title = f"Scores under other networks than {ours}"
    base.plots.append(Plot(title, "network", "rank correlation", [bars]))
    base.facts["network_agreement"] = agreement


def _criteria(base: _Reference) -> None:
    """Every two criteria in the table, with signs such that low is useful."""
    names = base.scores.columns
    if len(names) < 2:
        return
    scores = [base.scores.read(name, base.sample.rows) * (1 if base.scores.low(name) else -1) for name in names]
    mean, std, overlaps = base.compare(scores, low=True)
    pairs = list(itertools.combinations(range(len(names)), 2))
    base.add_rows("criteria", names, pairs, mean, std, overlaps)
    if known := [pair for pair in pairs if np.isfinite(mean[pair])]:  # a constant criterion ranks nothing
        i, j = min(known, key=lambda pair: mean[pair])
        least = f"{mean[i, j]:.2f}".replace("-", "−")
        base.answers.append(f"Of the criteria, {names[i]} and {names[j]} agree least ({least}).")
    series = [Series(name, names, [float(v) for v in mean[k]], kind="points") for k, name in enumerate(names)]
    title = "Criteria against each other, low or high turned to useful"
    base.plots.append(Plot(title, "criterion", "rank correlation", series))
    rows = [dict(zip(names, map(float, row), strict=True)) for row in mean]
    base.facts["criteria_agreement"] = dict(zip(names, rows, strict=True))


def _drift(base: _Reference) -> None:
    """Losses after several numbers of steps, with the static scores and with those of the stage before."""
    base.context.say("stability: how utility drifts while a set is distilled")
    result = drift.measure(base.context, base.sample)
    if result is None:
        base.notes.append("Drift was not measured: it needs two stages and a test split (data.holdout makes one).")
        return
    steps, last = result.steps, len(result.steps)
    vectors = [base.score * (1 if base.low else -1), *result.losses.T, result.again]
    mean, std, overlaps = base.compare(vectors, low=True)
    names = ["static scores", *(f"loss after step {step}" for step in steps), "the same, another network seed"]
    pairs = [*((0, i) for i in range(1, last + 1)), *((i, i + 1) for i in range(1, last)), (1, last), (last, last + 1)]
    base.add_rows("stages", names, dict.fromkeys(pairs), mean, std, overlaps)
    facts: dict[str, Any] = {"steps": steps, "with_static": [float(v) for v in mean[0, 1 : last + 1]],
             "with_previous": [float(mean[i, i + 1]) for i in range(1, last)], "first_to_last": float(mean[1, last]),
             "another_seed": float(mean[last, last + 1]), "accuracies": result.accuracies}  # fmt: skip
    series = [
        Series("with the static scores", steps, facts["with_static"], role="ours"),
        Series("with the stage before", steps[1:], facts["with_previous"]),
    ]
    levels = [("another network seed", facts["another_seed"])]
    base.plots.append(Plot("Utility while a set is distilled", "steps", "rank correlation", series, levels, log_x=True))
    base.answers.append(drift_answer(facts))
    base.facts["drift"] = facts


def drift_answer(facts: dict[str, Any]) -> str:
    steps, static, chance = facts["steps"], facts["with_static"], facts["another_seed"]
    drifts = facts["first_to_last"] < chance - CHANGED
    verdict = "utility drifts" if drifts else "it hardly drifts beyond chance"
    return (
        f"While a set is distilled, the ranking by loss after step {steps[0]} agrees with that after step {steps[-1]} by "
        f"{facts['first_to_last']:.2f} (another network seed alone: {chance:.2f}), so {verdict}; with the static "
        f"scores it agrees by {static[0]:.2f} at first and {static[-1]:.2f} at the end."
    ).replace(" -", " −")

"""select: auto: finds the selection with short distillations, tested on a held-out part of the training split.

    <run.dir>/auto/        the points of the search, on top of the run's own ingest and scores
    <run.dir>/auto.json    rounds, choice and its reason; reused while nothing that it depends on changes

Successive halving over a portfolio (`pruning/selection/portfolio.py`). The test split is not read. The proxies were trained on
the held-out samples, too, so a selection by scores may look slightly better than it is.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from distill_at_scale.config.fields import flatten, result_values
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core.atomic_files import set_aside, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.statistics import CONFIDENCE
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.studies.comparison import near_chance
from distill_at_scale.pruning.selection import portfolio
from distill_at_scale.pruning.selection.portfolio import EVERYTHING, Candidate, Round
from distill_at_scale.pruning.selection.ranking import RANDOM
from distill_at_scale.storage.filesystem import child_address
from distill_at_scale.storage.run_dir import RunDir, address_of
from distill_at_scale.storage.sync import AUTO

OpenPoints = Callable[[Config], AbstractContextManager[PointSet]]
Say = Callable[[str], None]
NAME = "auto.json"
HELD_OUT, TESTS = 0.2, 10_000  # default for select.auto.held_out: a share, and the largest number of samples
LEAST_EPOCHS = 100  # of evaluation in an early round, unless the protocol has fewer


@dataclass
class Tried:
    """A candidate in a round: top-1 of each repetition, and what became of it."""

    candidate: Candidate
    name: str
    kept: int
    accuracies: list[float]
    decision: str = "out"  # out | goes on | chosen | not chosen | below random | for comparison (everything)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


@dataclass
class RoundResult:
    """A finished round: everything, then the candidates, the best first. `each`: mean seconds of a point with all epochs
    besides its steps, `step`: of a step.
    """

    steps: int
    repetitions: int
    seconds: float
    each: float
    step: float
    tried: list[Tried]

    def __str__(self) -> str:
        everything, best, *_ = self.tried
        going = [one.name for one in self.tried if one.decision == "goes on"]
        return (
            f"{len(self.tried) - 1} candidates, {self.steps} steps × {self.repetitions}, {self.seconds:.0f} s; best "
            f"{best.name} {best.mean:.1%}, everything {everything.mean:.1%}{'; go on: ' * bool(going)}{'; '.join(going)}"
        )


def selection(config: Config, open_points: OpenPoints, say: Say) -> dict[str, Any]:
    """The keys of `select` for a run with finished ingest and scores; from auto.json if that is up to date.

    Raises UserError for classes too small to hold out samples, and for the first point that fails.
    """
    run = RunDir.of(config.run, say)
    fingerprint = _made_with(config, run)
    known = report if (report := read(run)) and report["made_with"] == fingerprint else None
    if known and known["chosen"]:
        say(f"auto: {known['name']} was found before ({run.place(NAME)})")
        return dict(known["chosen"])
    counts = PreparedDataset(run / "prepared").counts("train")
    search = search_config(config, sum(counts))
    candidates, rounds = portfolio.candidates(config, counts), list[RoundResult]()
    plan: Sequence[Round] = portfolio.planned(config, counts, distill.step_count(config))
    if known:  # of a search that was interrupted
        rounds = [RoundResult(**one | {"tried": [Tried(**row) for row in one["tried"]]}) for one in known["rounds"]]
        plan = [Round(**one) for one in known["plan"]]
        candidates = [one.candidate for one in rounds[-1].tried if one.decision == "goes on"]

    def publish(plan: Sequence[Round], **result: Any) -> None:
        seconds = round(sum(one.seconds for one in rounds), 3)
        held_out = search.select.held_out
        values = {"made_with": fingerprint, "chosen": None, "name": "", "held_out": held_out, "seconds": seconds}
        lists = {"rounds": [asdict(one) for one in rounds], "plan": [asdict(one) for one in plan]}
        write_json(run / NAME, values | result | lists)

    with open_points(search) as points:
        points.take_over(run)
        while plan:
            result, plan = _round(search, points, plan, candidates, rounds)
            rounds.append(result)
            candidates = [one.candidate for one in result.tried if one.decision == "goes on"]
            publish(plan)
            say(f"auto: round {len(rounds)} of {len(rounds) + len(plan)}: {result}")
    chosen, reason = choose(rounds, len(counts))
    of = rounds[-1].tried[0].kept
    publish((), chosen=dict(chosen.candidate), name=chosen.name, kept=chosen.kept, of=of, reason=reason)
    say(f"auto: {chosen.name}, because {reason}")
    return dict(chosen.candidate)


def _round(
    config: Config, points: PointSet, plan: Sequence[Round], candidates: Sequence[Candidate], rounds: Sequence[RoundResult]
) -> tuple[RoundResult, Sequence[Round]]:  # fmt: skip
    """Plays the next round, and returns the plan of those after it. `config` is that of the search, `rounds` are the earlier
    ones, `candidates` the ones that are left, the best first.
    """
    section, began = config.select.auto, time.perf_counter()
    epochs = distill.method_class(config).protocol(config).overridden(config.evaluate).epochs

    def points_of(candidate: Candidate, now: Round) -> list[Point]:
        keys = {f"select.{key}": value for key, value in candidate.items()}
        trained = max(round(now.share * epochs), min(epochs, LEAST_EPOCHS))
        lengths = {"distill.steps": now.steps, "evaluate.epochs": trained}
        overrides = {"select.per_class": None, "select.keep": 1.0, **keys, **lengths}
        return [Point(overrides, seed) for seed in range(now.repetitions)]

    if section.minutes is not None:
        if rounds:
            each, step = rounds[-1].each, rounds[-1].step
        else:  # the first point of the round tells the time of the others
            each, step = _times(points.run(points_of(EVERYTHING, plan[0])[:1]), plan[0])
        left, at_once = 60 * section.minutes - sum(one.seconds for one in rounds), points.runner.at_once()
        most = (section.steps or distill.step_count(config)) / plan[-1].steps
        plan = portfolio.fitting(plan, left, each / at_once, step / at_once, most)
    now, *later = plan
    tried = [EVERYTHING, *candidates[: now.candidates]]
    groups = [points_of(candidate, now) for candidate in tried]
    outcomes = points.run([point for group in groups for point in group])
    rows = []
    for k, candidate in enumerate(tried):
        own = outcomes[k * now.repetitions : (k + 1) * now.repetitions]
        name = portfolio.describe(candidate, config.criterion)
        rows.append(Tried(candidate, name, own[0].kept, [one.accuracy() for one in own]))
    rows[0].decision = "for comparison"
    rows[1:] = sorted(rows[1:], key=lambda row: (-row.mean, row.kept))
    # small sets look better after few steps: the best of each size go on first, if there is room for all sizes
    sizes = [row for k, row in enumerate(rows[1:], 1) if row.kept not in {other.kept for other in rows[1:k]}]
    room = later[0].candidates if later else 0
    for row in (sizes + [row for row in rows[1:] if row not in sizes] if len(sizes) <= room else rows[1:])[:room]:
        row.decision = "goes on"
    seconds = round(time.perf_counter() - began, 3)
    return RoundResult(now.steps, now.repetitions, seconds, *_times(outcomes, now), rows), later


def _times(outcomes: Sequence[Outcome], now: Round) -> tuple[float, float]:
    """Mean seconds of a point with all epochs, besides its steps; and of a step."""
    each = statistics.fmean(one.seconds.get("select", 0.0) + one.seconds.get("evaluate", 0.0) for one in outcomes)
    return each / now.share, statistics.fmean(one.seconds.get("distill", 0.0) for one in outcomes) / now.steps


def choose(rounds: Sequence[RoundResult], classes: int) -> tuple[Tried, str]:
    """The cheapest of the last round whose mean is within one standard error of the best, and why; sets the decisions.

    The standard error is that of a difference of two means, with the deviation of all candidates of the round pooled.
    Everything counts as a candidate, so nothing is chosen that is clearly below it. A candidate is left out if it was below
    random selection of the same size by more than a deviation, in the last round in which both took part. Everything is kept
    if it is near chance itself: then the search says nothing.
    """
    from scipy.stats import t  # takes a second to import

    everything, *others = rounds[-1].tried
    groups = [one.accuracies for one in rounds[-1].tried]
    freedom = sum(len(group) - 1 for group in groups)
    deviation = math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)
    error = deviation * math.sqrt(2 / rounds[-1].repetitions)
    half = error * float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    for one in others:
        one.decision = "below random" if _below_random(one, rounds, deviation) else "not chosen"
    if near_chance(everything.mean, classes):
        everything.decision = "chosen"
        return everything, (
            f"the search says nothing: with everything kept it reaches only {everything.mean:.1%}, near chance; raise "
            "select.auto.steps"
        )
    allowed = [everything, *(one for one in others if one.decision == "not chosen" and one.kept < everything.kept)]
    best = max(one.mean for one in allowed)
    good = [one for one in allowed if one.mean >= best - error - 1e-12]
    chosen = min(good, key=lambda one: (one.kept, -one.mean))
    chosen.decision = "chosen"
    if allowed == [everything]:
        return chosen, "every candidate was below random selection of the same size, or keeps as many samples"
    if chosen is everything:
        top = max(allowed[1:], key=lambda one: one.mean)
        gap = f"{100 * (top.mean - everything.mean):+.1f} ± {100 * half:.1f} points"
        return chosen, f"no candidate reaches its {everything.mean:.1%}; the best, {top.name}, differs by {gap}"
    return chosen, (
        f"it reaches {chosen.mean:.1%} and everything {everything.mean:.1%} (difference "
        f"{100 * (chosen.mean - everything.mean):+.1f} ± {100 * half:.1f} points, n = {rounds[-1].repetitions}), and it keeps "
        f"{chosen.kept} of {everything.kept} samples"
    )


def _below_random(one: Tried, rounds: Sequence[RoundResult], deviation: float) -> bool:
    for result in reversed(rounds):
        same = [row for row in result.tried if row.candidate == one.candidate]
        random = [row for row in result.tried if row.candidate.get("criterion") == RANDOM and row.kept == one.kept]
        if same and random:
            return same[0].mean < random[0].mean - deviation
    return False


def search_config(config: Config, samples: int) -> Config:
    """The configuration of the search's points, in a folder of their own; `samples` of the training split."""
    section = config.select.auto
    share = section.held_out or config.select.held_out or min(HELD_OUT, TESTS / samples)
    overrides: dict[str, Any] = {
        "run.dir": child_address(address_of(config.run), AUTO), "run.reuse": None, "distill.evaluate_every": 0,
        "evaluate.seeds": section.evaluations, "evaluate.bounds": [], "evaluate.split": "held_out",
        "select.held_out": share,
    }  # fmt: skip
    return with_overrides(config, overrides, "select: auto")


def read(run: RunDir) -> dict[str, Any] | None:
    """auto.json of a run, None if it does not exist.

    Raises UserError where it is damaged.
    """
    try:
        report = json.loads((run / NAME).read_text(encoding="utf-8"))
        return report if report["made_with"] and report["rounds"] and (report["name"] or not report["chosen"]) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.place(NAME)} is damaged ({error}); {set_aside(run / NAME)}") from None


def known_selection(config: Config) -> Mapping[str, Any] | None:
    """The keys of `select`, if they were found for exactly this configuration."""
    run = RunDir.of(config.run)
    run.fetch()
    if run.record("score") is None or (report := read(run)) is None:
        return None
    return report["chosen"] if report["made_with"] == _made_with(config, run) else None


def _made_with(config: Config, run: RunDir) -> str:
    values = flatten(config.select.auto, "select.auto.")
    for name in ("select", "distill", "runtime", "evaluate"):
        values |= result_values(getattr(config, name), f"{name}.", unused=True)
    for key in ("evaluate.seeds", "evaluate.bounds"):  # the search evaluates select.auto.evaluations networks
        del values[key]
    steps = distill.step_count(config)
    return digest({**values, "distill.steps": steps, "seed": config.run.seed, "scores": run.content("score")})

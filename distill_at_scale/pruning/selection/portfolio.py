"""The candidates of select: auto, and the rounds in which successive halving compares them.

A candidate is a mapping of keys of the section `select`. Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): the
first round tries all candidates with few steps; the best third of each round goes on with twice the steps and twice the
epochs of evaluation. "Everything" takes part in each round, for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_at_scale.config.load import Config

Candidate = Mapping[str, Any]
EVERYTHING: Candidate = {"order": "useful", "keep": 1.0}
EACH = 2, 10, 50  # kept samples per class of the default portfolio, for each distilled one
SHARES = 0.1, 0.3  # its other keep rates
LARGEST, APART = 0.5, 1.6  # its largest keep rate, and the smallest factor between two
THIRD, FINALISTS = 3, 3  # one in THIRD goes on to the next round, until at most FINALISTS are left
LONGER = (
    2  # factor from the steps of a round to the next; with 3, the first of a short search ranked only initial images
)
QUARTER = 4  # the last round has the steps of the run divided by this


@dataclass(frozen=True)
class Round:
    """`candidates` besides everything, each distilled `repetitions` times with `steps` steps, and evaluated with a `share` of
    the epochs.
    """

    candidates: int
    steps: int
    repetitions: int
    share: float = 1.0

    @property
    def points(self) -> int:
        return (self.candidates + 1) * self.repetitions


def candidates(config: Config, counts: Sequence[int]) -> Sequence[Candidate]:
    """select.auto.portfolio, or each of `config.selections` at several keep rates, the most promising first.

    `counts` are training samples per class.
    """
    if config.select.auto.portfolio is not None:
        return config.select.auto.portfolio
    return [{**kind, "keep": rate} for kind in config.selections for rate in keep_rates(config.distill.ipc, counts)]


def keep_rates(ipc: int, counts: Sequence[int]) -> list[float]:
    """Keep rates for `ipc` distilled samples per class, ascending."""
    mean, rates = sum(counts) / len(counts), list[float]()
    for rate in sorted([*(ipc * each / mean for each in EACH), *SHARES]):
        if rate <= LARGEST and (not rates or rate >= APART * rates[-1]):
            rates.append(float(f"{rate:.3g}"))
    return rates


def describe(candidate: Candidate, criterion: Any) -> str:
    """A candidate in words, such as "clusters loss, 2 %"; `criterion` is that of a candidate without one."""
    if candidate == EVERYTHING:
        return "everything"
    keys = dict(candidate)
    ranked = keys.pop("criterion", None) or criterion
    name = ranked if isinstance(ranked, str) else " + ".join(f"{weight:g} {one}" for one, weight in ranked.items())
    order, keep, each = keys.pop("order", "useful"), keys.pop("keep", 1.0), keys.pop("per_class", None)
    words = [
        name if order == "useful" else f"{order} {name}",
        f"{each} per class" if each else f"{100 * keep:.3g} %",
    ]
    return ", ".join([*words, *(f"{key} {value}" for key, value in keys.items())])


def rounds(count: int, steps: int, seeds: int) -> list[Round]:
    """The rounds for `count` candidates; the last one has `steps` steps and `seeds` repetitions."""
    sizes = [count]
    while sizes[-1] > FINALISTS:
        sizes.append(-(-sizes[-1] // THIRD))
    last = len(sizes) - 1
    shares = [LONGER ** (k - last) for k in range(len(sizes))]
    return [
        Round(size, max(1, round(steps * share)), seeds if k == last else min(1 + k, seeds), share)
        for k, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]


def planned(config: Config, counts: Sequence[int], steps: int) -> list[Round]:
    """The rounds of a search for a run of `steps` steps, with time for all of them."""
    section = config.select.auto
    last = section.steps or -(-steps // QUARTER)
    return rounds(len(candidates(config, counts)), last, section.seeds)


def fitting(plan: Sequence[Round], left: float, each: float, step: float, most: float) -> list[Round]:
    """A plan with fewer or more steps, or with fewer candidates, that takes at most `left` seconds.

    If less than a quarter of the steps fits, the last half of the candidates is left out instead. A distillation has at least
    one step, so a plan for one candidate may take longer than `left`.

    Args:
        each: seconds of a point with all epochs, besides its steps, divided by how many run at a time.
        step: seconds of a step, divided in the same way.
        most: the largest factor for the steps.
    """

    def cost(tried: Sequence[Round]) -> float:
        return sum(one.points * (one.share * each + one.steps * step) for one in tried)

    def scaled(factor: float) -> list[Round]:
        return [replace(one, steps=max(1, int(one.steps * factor))) for one in plan]

    factor = most
    while cost(scaled(factor)) > left and factor > 1e-6:
        factor *= 0.9
    if factor >= 1 / QUARTER or plan[0].candidates == 1:
        return scaled(factor)
    last = plan[-1]
    return fitting(rounds(plan[0].candidates // 2, last.steps, last.repetitions), left, each, step, most)

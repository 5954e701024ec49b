"""The candidates of select: auto, the rounds of successive halving, and their fit to a time."""

from __future__ import annotations

import pytest

from distill_at_scale.config.load import validate
from distill_at_scale.pruning.selection import portfolio
from distill_at_scale.pruning.selection.portfolio import Round


@pytest.mark.parametrize(
    ("ipc", "each", "rates"),
    [
        (1, 5000, [0.0004, 0.002, 0.01, 0.1, 0.3]),
        (10, 5000, [0.004, 0.02, 0.1, 0.3]),
        (50, 5000, [0.02, 0.1, 0.3, 0.5]),
        (1, 135, [0.0148, 0.0741, 0.3]),
        (10, 30, [0.1, 0.3]),
    ],
)
def test_keep_rates_follow_the_images_per_class(ipc, each, rates):
    assert portfolio.keep_rates(ipc, [each] * 10) == rates


def test_the_best_third_goes_on_with_twice_the_steps():
    assert portfolio.rounds(20, 90, 3) == [Round(20, 22, 1, 1 / 4), Round(7, 45, 2, 1 / 2), Round(3, 90, 3)]
    assert portfolio.rounds(3, 90, 5) == [Round(3, 90, 5)]
    assert portfolio.rounds(4, 2, 2) == [Round(4, 1, 1, 1 / 2), Round(2, 2, 2)]
    assert Round(3, 90, 5).points == 20, "everything takes part"


def seconds(rounds, each, step):
    return sum(one.points * (one.share * each + one.steps * step) for one in rounds)


def test_a_plan_uses_the_time_but_no_more():
    plan = portfolio.rounds(20, 90, 3)
    whole = seconds(plan, 1.0, 0.1)
    assert portfolio.fitting(plan, whole + 1, 1.0, 0.1, 1.0) == plan
    longer = portfolio.fitting(plan, 4 * whole, 1.0, 0.1, 4.0)
    assert longer[-1].steps > 2 * 90
    assert seconds(longer, 1.0, 0.1) <= 4 * whole
    shorter = portfolio.fitting(plan, whole / 2, 1.0, 0.1, 1.0)
    assert [one.candidates for one in shorter] == [20, 7, 3]
    assert whole / 4 < seconds(shorter, 1.0, 0.1) <= whole / 2
    fewer = portfolio.fitting(plan, whole / 8, 1.0, 0.1, 1.0)
    assert fewer[0].candidates < 20
    assert seconds(fewer, 1.0, 0.1) <= whole / 8
    assert portfolio.fitting(plan, 0.0, 1.0, 0.1, 1.0) == [Round(1, 1, 3)], "the least that can be compared"


def names(ipc=1, score=None, **select):
    config = validate({"select": {"keep": "auto", **select}, "score": score or {}, "distill": {"ipc": ipc}})
    return [portfolio.describe(one, config.criterion) for one in portfolio.candidates(config, [100 * ipc, 100 * ipc])]


RATES = ("2 %", "10 %", "30 %", "50 %")


def test_a_criterion_or_an_order_limits_the_candidates_to_it():
    assert names(criterion="el2n") == [f"el2n, {rate}" for rate in RATES]
    assert names(order="useless") == [f"useless loss, {rate}" for rate in RATES]
    assert names(criterion="random", order="useful") == [f"random, {rate}" for rate in RATES]


@pytest.mark.parametrize(
    ("kinds", "keys"),
    [
        (["loss", "clusters loss", "random"], {"order": "useful"}),
        (["clusters loss", "easy_random loss", "random"], {"ipc": 10}),
        (["loss", "random"], {"ipc": 10, "scope": "global"}),
        (["random"], {"score": {"criterion": "random"}}),
        (["monte_carlo", "easy_random monte_carlo", "random"], {"score": {"criterion": "monte_carlo"}}),
        (
            ["easy_random theirs", "random"],
            {"ipc": 10, "score": {"criterion": "theirs", "imported": {"theirs": "a.csv"}}},
        ),
    ],
)
def test_the_default_follows_the_images_per_class_and_what_is_scored(kinds, keys):
    assert names(**keys) == [f"{kind}, {rate}" for kind in kinds for rate in RATES]


def test_a_portfolio_of_ones_own_is_all_that_is_tried_and_what_it_ranks_by_is_scored():
    own = [
        {"criterion": {"loss": 0.5, "el2n": 0.5}, "keep": 0.1},
        {"criterion": "margin", "per_class": 7, "scope": "adaptive"},
    ]
    assert names(auto={"portfolio": own}) == ["0.5 loss + 0.5 el2n, 10 %", "margin, 7 per class, scope adaptive"]
    values = {"score": {"criterion": "loss"}, "select": {"keep": "auto", "auto": {"portfolio": own}}}
    assert validate(values).score.criteria == ["loss", "el2n", "margin"]
    assert validate({**values, "select": {**values["select"], "keep": 0.1}}).score.criteria == ["loss"]
    assert validate({"select": {"keep": "auto"}}).score.criteria == ["loss", "clusters"]
    assert validate({"select": {"keep": "auto", "criterion": "el2n"}}).score.criteria == ["loss", "el2n"]
    assert validate({"select": {"keep": "auto"}, "score": {"criterion": "random"}}).score.criteria == ["random"]

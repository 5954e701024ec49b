"""The trials of a sweep: the grid or the draws of its space, and the controls that belong to them."""

from __future__ import annotations

import math

from conftest import tiny_config
from sweep_cases import RATES, config

from distill_at_scale.core.progress import Display
from distill_at_scale.experiments import points
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import space
from distill_at_scale.experiments.sweep.space import SweepTrial


def tried(trials: list[SweepTrial], control: str | None = None) -> list[dict]:
    return [dict(trial.keys) for trial in trials if trial.control == control]


def test_a_grid_is_the_product_of_all_lists_with_every_repetition():
    trials = space.trials(config(space={**RATES, "distill.ipc": [1, 2]}, seeds=2, controls=[]))
    pairs = [(t.keys["select.keep"], t.keys["distill.ipc"], t.point.seed) for t in trials]
    assert pairs == [(k, i, s) for k in (0.1, 0.3) for i in (1, 2) for s in (0, 1)]


def test_keys_may_be_nested_as_the_command_line_makes_them():
    assert space.dimensions(config(space={"select": {"keep": [0.1]}})) == {"select.keep": [0.1]}


def test_the_unpruned_control_is_tried_once_for_all_that_matters_without_pruning():
    trials = space.trials(config(space={**RATES, "distill.ipc": [1, 2], "runtime.rule": ["none", "loss"]}))
    unpruned = [trial for trial in trials if trial.control == "unpruned"]
    assert [trial.keys["distill.ipc"] for trial in unpruned] == [1, 2]
    for trial in unpruned:
        assert trial.point.overrides["select.keep"] == 1
        assert trial.point.overrides["runtime.rule"] == "none"
        assert trial.point.overrides["evaluate.control"] == "random_real"


def test_the_unpruned_control_keeps_everything_for_any_base_selection():
    base = config(select__keep=0.3, select__order="stratum", select__stratum_start=0.2, controls=["unpruned"])
    base = base.model_copy(update={"select": base.select.model_copy(update={"per_class": 3})})
    trial = next(t for t in space.trials(base) if t.control == "unpruned")
    settings = points.PointSet(base, LocalRunner(), Display.silent()).configured(trial.point)
    assert (settings.select.keep, settings.select.per_class, settings.select.order) == (1, None, "useful")


def test_a_key_of_an_order_is_varied_only_with_that_order():
    orders = {
        "select.order": ["useful", "coverage", "easy_random"],
        "select.strata": [5, 50],
        "select.easiest": [0.5, 0.9],
    }
    trials = space.trials(config(space={**orders, "select.keep": [0.1]}, controls=["random"]))
    seen = [tuple(t.keys[key] for key in orders) for t in trials if t.control is None]
    assert seen == [
        ("useful", None, None),
        *(("coverage", strata, easiest) for strata in (5, 50) for easiest in (0.5, 0.9)),
        *(("easy_random", None, easiest) for easiest in (0.5, 0.9)),
    ]
    assert [tuple(keys[key] for key in orders) for keys in tried(trials, "random")] == [(None, None, None)]


def test_random_samples_are_tried_at_every_keep_rate_once():
    trials = space.trials(config(space={**RATES, "select.order": ["useful", "useless"], "select.criterion": ["loss"]}))
    random = tried(trials, "random")
    assert [(keys["select.keep"], keys["select.criterion"]) for keys in random] == [(0.1, "random"), (0.3, "random")]
    assert {keys["select.order"] for keys in random} == {None}


def test_keeping_everything_is_the_unpruned_control_and_listed_once():
    trials = space.trials(config(space={"select.keep": [0.1, 1.0], "select.order": ["useful", "high"]}))
    assert [t.control for t in trials if t.keys["select.keep"] == 1.0] == ["unpruned"]
    alone = space.trials(config(space={"select.keep": [0.1, 1.0], "select.order": ["useful", "high"]}, controls=[]))
    assert [t.keys for t in alone if t.keys["select.keep"] == 1.0] == [{"select.keep": 1.0, "select.order": "useful"}]


def test_keeping_everything_with_runtime_pruning_is_not_the_unpruned_control():
    trials = space.trials(config(space={"select.keep": [0.1, 1.0]}, runtime__rule="loss"))
    assert [t.control for t in trials if t.keys["select.keep"] == 1.0] == ["unpruned", None]


def test_random_as_a_criterion_is_listed_once():
    trials = space.trials(config(space={"select.keep": [0.1], "select.criterion": ["loss", "random"]}))
    assert [t.control for t in trials] == ["unpruned", "random", None]
    assert tried(trials) == [{"select.keep": 0.1, "select.criterion": "loss"}]


def test_a_drop_rate_without_a_rule_makes_no_new_point():
    trials = space.trials(config(space={"runtime.rule": ["none", "loss"], "runtime.drop": [0.1, 0.5]}, controls=[]))
    drops = [(t.keys["runtime.rule"], t.keys["runtime.drop"]) for t in trials]
    assert drops == [("none", None), ("loss", 0.1), ("loss", 0.5)]


def test_draws_are_in_their_ranges_and_more_samples_extend_fewer():
    wanted = {
        "select.keep": {"loguniform": [0.01, 0.5]},
        "distill.ipc": {"randint": [1, 3]},
        "distill.method": ["dc", "dm"],
    }
    few = tried(space.trials(config(space=wanted, search="random", samples=10)))
    many = tried(space.trials(config(space=wanted, search="random", samples=40)))
    assert many[: len(few)] == few
    assert all(0.01 <= keys["select.keep"] <= 0.5 for keys in many)
    assert {keys["distill.ipc"] for keys in many} == {1, 2, 3}
    assert {keys["distill.method"] for keys in many} == {"dc", "dm"}
    assert sum(keys["select.keep"] < math.sqrt(0.005) for keys in many) in range(10, 31), "not uniform in the logarithm"


def test_draws_follow_the_seed_of_the_run():
    wanted = {"space": {"select.keep": {"uniform": [0.1, 0.9]}}, "search": "random", "samples": 3}
    assert tried(space.trials(config(**wanted))) == tried(space.trials(config(**wanted)))
    other = tiny_config("nowhere", run={"dir": "nowhere", "seed": 1}, sweep=wanted)
    assert tried(space.trials(config(**wanted))) != tried(space.trials(other))

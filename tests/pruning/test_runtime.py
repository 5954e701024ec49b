"""Runtime pruning: how many samples are dropped, which, and which effects are remembered between full observations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill_at_scale.config.methods import RuntimeSection
from distill_at_scale.pruning.runtime import RuntimePruning


def pruning(drop=0.3, refresh=10, rule="loss"):
    return RuntimePruning(RuntimeSection(rule=rule, drop=drop, refresh=refresh))


@pytest.mark.parametrize("tenths", range(10))
def test_the_dropped_count_is_rounded_down_and_one_stays(tenths):
    for n in range(1, 60):
        assert pruning(tenths / 10).drop_count(n) == min(tenths * n // 10, n - 1)


def test_nothing_is_dropped_without_a_rule_or_a_rate():
    assert pruning(0.9, rule="none").drop_count(100) == 0
    assert pruning(0.0).drop_count(100) == 0


def test_one_sample_always_stays():
    assert [pruning(0.99).drop_count(n) for n in (1, 2, 3, 50)] == [0, 1, 2, 49]
    assert pruning(0.99).mask(torch.tensor([3.0, 1.0, 2.0])).tolist() == [False, True, False]


def test_the_largest_values_are_dropped():
    values = torch.randn(37, generator=torch.Generator().manual_seed(0))
    mask = pruning(0.3).mask(values)
    largest = sorted(range(37), key=lambda k: float(values[k]))[37 - math.floor(0.3 * 37) :]
    assert [k for k in range(37) if not mask[k]] == sorted(largest)


def test_of_equal_values_the_later_ones_are_dropped():
    assert pruning(0.5).mask(torch.ones(4)).tolist() == [True, True, False, False]


def test_a_full_observation_is_due_every_few_visits():
    rule = pruning(refresh=4)
    looks = [rule.remembered_mask(0, torch.arange(10), 10, visit) is None for visit in range(9)]
    assert looks == [True, False, False, False] * 2 + [True]


def test_nothing_is_forecast_or_remembered_where_nothing_is_dropped():
    rule = pruning(0.0, refresh=4)
    rule._remember(0, torch.arange(10), 10, torch.randn(10))
    assert all(rule.remembered_mask(0, torch.arange(10), 10, visit) is None for visit in range(8))
    assert rule.state_dict() == {}
    rule = pruning(0.3)
    assert rule.remembered_mask(0, torch.arange(3), 3, 1) is None  # 0.3 of three is none


def test_a_forecast_drops_what_was_large_before():
    rule, rows = pruning(0.25), torch.tensor([7, 2, 5, 0])
    rule._remember(3, rows, 8, torch.tensor([1.0, 9.0, 2.0, 3.0]))
    assert rule.remembered_mask(3, torch.tensor([5, 2, 0, 7]), 8, 1).tolist() == [True, False, True, True]


def test_samples_that_were_never_seen_count_as_average():
    rule = pruning(0.5)
    rule._remember(0, torch.tensor([0, 1, 2, 3]), 8, torch.tensor([0.0, 0.0, 10.0, 10.0]))
    assert rule.remembered_mask(0, torch.tensor([2, 6, 0, 7]), 8, 1).tolist() == [False, True, True, False]


def test_values_are_compared_across_networks_of_other_scales():
    rule = pruning(0.5)
    rule._remember(0, torch.tensor([0, 1]), 4, torch.tensor([1000.0, 1001.0]))
    rule._remember(0, torch.tensor([2, 3]), 4, torch.tensor([0.001, 0.002]))
    assert rule.remembered_mask(0, torch.tensor([0, 1, 2, 3]), 4, 1).tolist() == [True, False, True, False]


def test_equal_values_do_not_break_the_memory():
    rule = pruning(0.5)
    rule._remember(0, torch.arange(4), 4, torch.full((4,), 2.0))
    assert torch.isfinite(rule.state_dict()["remembered/0"]).all()


def test_classes_do_not_share_their_memory():
    rule = pruning(0.5)
    rule._remember(0, torch.arange(2), 2, torch.tensor([5.0, 1.0]))
    rule._remember(1, torch.arange(2), 2, torch.tensor([1.0, 5.0]))
    assert rule.remembered_mask(0, torch.arange(2), 2, 1).tolist() == [False, True]
    assert rule.remembered_mask(1, torch.arange(2), 2, 1).tolist() == [True, False]


def test_the_state_carries_the_memory_to_another_process():
    rule, again = pruning(0.5), pruning(0.5)
    for label in (0, 1, 4):
        rule._remember(label, torch.arange(6), 6, torch.randn(6))
    again.load_state_dict(rule.state_dict(), [0, 4])
    assert sorted(again.state_dict()) == ["remembered/0", "remembered/4"]
    for label in (0, 4):
        rows = torch.randperm(6)
        assert torch.equal(again.remembered_mask(label, rows, 6, 1), rule.remembered_mask(label, rows, 6, 1))


def test_a_renewed_pool_keeps_the_memory_of_samples_that_stay():
    rule = pruning(0.5)
    rule.memory = {0: torch.tensor([1.0, 2.0, 3.0, 4.0]), 1: torch.tensor([5.0])}
    rule.renew(0, np.array([3, 5, 8, 9]), np.array([1, 5, 9, 12]))
    rule.renew(2, np.array([3]), np.array([4]))  # no value of it is known
    assert {label: values.tolist() for label, values in rule.memory.items()} == {0: [0, 2, 4, 0], 1: [5]}


def test_a_loaded_memory_is_a_copy():
    rule, again = pruning(0.5), pruning(0.5)
    rule._remember(0, torch.arange(2), 2, torch.tensor([1.0, 2.0]))
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    again.load_state_dict(state, [0])
    again._remember(0, torch.arange(2), 2, torch.tensor([2.0, 1.0]))
    assert torch.equal(state["remembered/0"], rule.state_dict()["remembered/0"])


# Rule ite: thresholds instead of sorting.


def effects(n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Log-normal sizes."""
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()


def ite(drop=0.3, tail=0.5, refresh=10, decay=0.9):
    return RuntimePruning(RuntimeSection(rule="ite", drop=drop, tail=tail, refresh=refresh, decay=decay))


@pytest.mark.parametrize(("tail", "smaller", "larger"), [(0.0, 0.3, 0.0), (0.5, 0.15, 0.15), (1.0, 0.0, 0.3)])
def test_both_tails_are_dropped_in_the_configured_proportion(tail, smaller, larger):
    values = effects(4000)
    dropped = values[~ite(0.3, tail).observe(0, torch.arange(4000), 4000, values)]
    assert float((dropped < 1).sum()) / 4000 == pytest.approx(smaller, abs=0.02)
    assert float((dropped > 1).sum()) / 4000 == pytest.approx(larger, abs=0.02)


def test_dropped_samples_are_more_extreme_than_all_kept_ones():
    values = effects(300)
    kept = ite(0.4, 0.5).observe(0, torch.arange(300), 300, values)
    inside = values[kept]
    assert all(v < inside.min() or v > inside.max() for v in values[~kept])


def test_a_network_that_scales_all_effects_drops_the_same_samples():
    rows = torch.arange(200)
    one, other = ite(), ite()
    one.observe(0, rows, 200, effects(200))
    other.observe(0, rows, 200, effects(200))
    assert torch.equal(
        one.observe(0, rows, 200, effects(200, 1)), other.observe(0, rows, 200, effects(200, 1, scale=1e-4))
    )


@pytest.mark.parametrize(("decay", "same"), [(0.0, True), (0.9, False)])
def test_the_spread_of_earlier_batches_counts_as_far_as_it_is_remembered(decay, same):
    rows = torch.arange(500)
    fresh, old = ite(decay=decay), ite(decay=decay)
    old.observe(0, rows, 500, effects(500) ** 5)  # a much larger spread
    masks = [rule.observe(0, rows, 500, effects(500, 1)) for rule in (fresh, old)]
    assert torch.equal(*masks) is same
    assert int(masks[0].sum()) <= int(masks[1].sum())


def test_the_running_variance_is_the_decayed_mean():
    rule, batches = ite(decay=0.75), [effects(50, seed) ** (0.5 + seed / 2) for seed in range(3)]
    for batch in batches:
        rule.observe(4, torch.arange(50), 50, batch)
    first, second, third = (batch.double().log().var(correction=0) for batch in batches)
    assert float(rule.running[4]) == pytest.approx(float(0.75 * (0.75 * first + 0.25 * second) + 0.25 * third))


def test_between_full_observations_remembered_effects_decide_and_unseen_samples_are_average():
    rule, rows = ite(0.4, 0.5), torch.randperm(100)[:60]
    seen = rule.observe(0, rows, 100, effects(60))
    unseen = torch.tensor([r for r in range(100) if r not in set(rows.tolist())])
    assert torch.equal(rule.remembered_mask(0, rows, 100, 1), seen)
    assert bool(rule.remembered_mask(0, unseen, 100, 1).all())
    assert rule.remembered_mask(0, rows, 100, 10) is None


@pytest.mark.parametrize("values", [torch.ones(5), torch.zeros(5), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])])
def test_degenerate_effects_leave_something_and_nothing_infinite(values):
    for tail in (0.0, 0.5, 1.0):
        rule = ite(0.8, tail)
        assert bool(rule.observe(0, torch.arange(5), 5, values).any())
        assert all(torch.isfinite(t).all() for t in rule.state_dict().values())


@pytest.mark.parametrize("tail", [0.0, 0.5, 1.0])
def test_at_least_one_sample_is_kept(tail):
    for seed in range(20):
        assert bool(ite(0.99, tail).observe(0, torch.arange(3), 3, effects(3, seed)).any())


@pytest.mark.parametrize("name", ["loss", "ite"])
def test_values_that_are_not_finite_drop_nothing_and_are_forgotten(name):
    rule, values = RuntimePruning(RuntimeSection(rule=name, drop=0.3)), effects(10)
    values[3] = float("nan")
    assert bool(rule.observe(0, torch.arange(10), 10, values).all())
    assert rule.state_dict() == {}


def test_the_state_of_rule_ite_resumes_to_the_same_bytes():
    rule, again, rows = ite(), ite(), torch.arange(40)
    for seed, label in enumerate((0, 1, 0)):
        rule.observe(label, rows, 40, effects(40, seed))
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    assert sorted(state) == ["effects/0", "effects/1", "remembered/0", "remembered/1"]
    again.load_state_dict(state, [0])
    assert sorted(again.state_dict()) == ["effects/0", "remembered/0"]
    masks = [r.observe(0, rows, 40, effects(40, 9)) for r in (rule, again)]
    assert torch.equal(*masks)
    assert all(torch.equal(rule.state_dict()[key], again.state_dict()[key]) for key in again.state_dict())
    assert torch.equal(state["effects/0"], state["effects/0"].clone())


def test_each_rule_needs_only_its_own_values():
    def never():
        raise AssertionError

    assert ite().values(loss=never, ite=lambda: 1) == 1
    assert pruning().values(loss=lambda: 2, ite=never) == 2


@pytest.mark.parametrize(("tail", "dropped"), [(0.0, {0, 1, 2}), (0.5, {0, 8, 9}), (1.0, {7, 8, 9})])
def test_rule_loss_drops_both_tails_where_the_method_asks_for_it(tail, dropped):
    rule = RuntimePruning(RuntimeSection(rule="loss", drop=0.3, tail=tail), both_tails=True)
    assert {k for k, kept in enumerate(rule.mask(torch.arange(10.0)).tolist()) if not kept} == dropped

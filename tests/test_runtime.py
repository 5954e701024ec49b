"""Runtime pruning: how many are dropped, which, and what is remembered between full looks."""

from __future__ import annotations

import math

import pytest
import torch

from distill_at_scale.pruning.runtime import RuntimePruning
from distill_at_scale.sections import RuntimeSection


def pruning(drop=0.3, refresh=10, rule="loss"):
    return RuntimePruning(RuntimeSection(rule=rule, drop=drop, refresh=refresh))


@pytest.mark.parametrize("tenths", range(10))
def test_the_dropped_count_is_rounded_down_and_one_stays(tenths):
    for n in range(1, 60):
        assert pruning(tenths / 10).dropped(n) == min(tenths * n // 10, n - 1)


def test_nothing_is_dropped_without_a_rule_or_a_rate():
    assert pruning(0.9, rule="none").dropped(100) == 0
    assert pruning(0.0).dropped(100) == 0


def test_one_sample_always_stays():
    assert [pruning(0.99).dropped(n) for n in (1, 2, 3, 50)] == [0, 1, 2, 49]
    assert pruning(0.99).mask(torch.tensor([3.0, 1.0, 2.0])).tolist() == [False, True, False]


def test_the_largest_values_are_dropped():
    values = torch.randn(37, generator=torch.Generator().manual_seed(0))
    mask = pruning(0.3).mask(values)
    largest = sorted(range(37), key=lambda k: float(values[k]))[37 - math.floor(0.3 * 37) :]
    assert [k for k in range(37) if not mask[k]] == sorted(largest)


def test_of_equal_values_the_later_ones_are_dropped():
    assert pruning(0.5).mask(torch.ones(4)).tolist() == [True, True, False, False]


def test_a_full_look_is_asked_for_every_few_visits():
    rule = pruning(refresh=4)
    looks = [rule.forecast(0, torch.arange(10), 10, visit) is None for visit in range(9)]
    assert looks == [True, False, False, False] * 2 + [True]


def test_nothing_is_forecast_or_remembered_where_nothing_is_dropped():
    rule = pruning(0.0, refresh=4)
    rule._remember(0, torch.arange(10), 10, torch.randn(10))
    assert all(rule.forecast(0, torch.arange(10), 10, visit) is None for visit in range(8))
    assert rule.state_dict() == {}
    rule = pruning(0.3)
    assert rule.forecast(0, torch.arange(3), 3, 1) is None  # 0.3 of three is none


def test_a_forecast_drops_what_was_large_before():
    rule, rows = pruning(0.25), torch.tensor([7, 2, 5, 0])
    rule._remember(3, rows, 8, torch.tensor([1.0, 9.0, 2.0, 3.0]))
    assert rule.forecast(3, torch.tensor([5, 2, 0, 7]), 8, 1).tolist() == [True, False, True, True]


def test_samples_that_were_never_seen_count_as_average():
    rule = pruning(0.5)
    rule._remember(0, torch.tensor([0, 1, 2, 3]), 8, torch.tensor([0.0, 0.0, 10.0, 10.0]))
    assert rule.forecast(0, torch.tensor([2, 6, 0, 7]), 8, 1).tolist() == [False, True, True, False]


def test_values_are_compared_across_networks_of_other_scales():
    rule = pruning(0.5)
    rule._remember(0, torch.tensor([0, 1]), 4, torch.tensor([1000.0, 1001.0]))
    rule._remember(0, torch.tensor([2, 3]), 4, torch.tensor([0.001, 0.002]))
    assert rule.forecast(0, torch.tensor([0, 1, 2, 3]), 4, 1).tolist() == [True, False, True, False]


def test_equal_values_do_not_break_the_memory():
    rule = pruning(0.5)
    rule._remember(0, torch.arange(4), 4, torch.full((4,), 2.0))
    assert torch.isfinite(rule.state_dict()["remembered/0"]).all()


def test_classes_do_not_share_their_memory():
    rule = pruning(0.5)
    rule._remember(0, torch.arange(2), 2, torch.tensor([5.0, 1.0]))
    rule._remember(1, torch.arange(2), 2, torch.tensor([1.0, 5.0]))
    assert rule.forecast(0, torch.arange(2), 2, 1).tolist() == [False, True]
    assert rule.forecast(1, torch.arange(2), 2, 1).tolist() == [True, False]


def test_the_state_carries_the_memory_to_another_process():
    rule, again = pruning(0.5), pruning(0.5)
    for label in (0, 1, 4):
        rule._remember(label, torch.arange(6), 6, torch.randn(6))
    again.load_state_dict(rule.state_dict(), [0, 4])
    assert sorted(again.state_dict()) == ["remembered/0", "remembered/4"]
    for label in (0, 4):
        rows = torch.randperm(6)
        assert torch.equal(again.forecast(label, rows, 6, 1), rule.forecast(label, rows, 6, 1))


def test_a_loaded_memory_is_a_copy():
    rule, again = pruning(0.5), pruning(0.5)
    rule._remember(0, torch.arange(2), 2, torch.tensor([1.0, 2.0]))
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    again.load_state_dict(state, [0])
    again._remember(0, torch.arange(2), 2, torch.tensor([2.0, 1.0]))
    assert torch.equal(state["remembered/0"], rule.state_dict()["remembered/0"])

"""Weighted ranks and adaptive class rates against slow references, and warnings about a selection."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import rankdata
from selection_cases import choose, kept, on_disk, skewed

from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.scoring import reliability
from distill_at_scale.pruning.selection import checks, quotas, score_reader

WEIGHTS = {"loss": 0.7, "el2n": 0.3}
LOW = {"loss": True, "el2n": False}


def two_criteria(seed=0, decimals=1):
    """skewed() with a second criterion on another scale."""
    table = skewed(seed, decimals)
    other = np.random.default_rng([8, seed]).normal(1000, 300, table.num_rows).round(-2).astype(np.float32)
    return table.append_column("el2n", pa.array(other))


def combined(table):
    """id -> weighted mean of scaled ranks, class by class, with the ranks of scipy on plain floats."""
    combined_scores = {}
    for label in set(table["label"].to_pylist()):
        rows = [row for row in table.to_pylist() if row["label"] == label]
        total = 0
        for name, weight in WEIGHTS.items():
            values = np.array([row[name] for row in rows]) * (1 if LOW[name] else -1)
            total = total + weight * (rankdata(values) - 1) / max(1, len(rows) - 1)
        combined_scores |= dict(zip([row["sample_id"] for row in rows], total, strict=True))
    return combined_scores


@pytest.mark.parametrize("order", ["useful", "useless"])
def test_weights_rank_by_the_sum_of_scaled_ranks_of_every_criterion_in_its_own_direction(order):
    for seed in range(6):
        table = two_criteria(seed, seed % 3)
        expected, selection = combined(table), choose(table, criterion=WEIGHTS, low=LOW, order=order, keep=0.3)
        for label in set(table["label"].to_pylist()):
            rows = sorted((r for r in selection.table.to_pylist() if r["label"] == label), key=lambda row: row["rank"])
            sums = [expected[row["sample_id"]] * (1 if order == "useful" else -1) for row in rows]
            assert all(before <= after + 1e-6 for before, after in pairwise(sums))
            assert [row["kept"] for row in rows] == sorted((row["kept"] for row in rows), reverse=True)


def test_one_weight_ranks_as_the_criterion_alone_does():
    table = skewed(2)
    alone, weighed = (choose(table, criterion=c, low={"loss": False}, keep=0.4) for c in ("loss", {"loss": 3.0}))
    assert alone.table.drop_columns(["score"]).equals(weighed.table.drop_columns(["score"]))


def test_no_scale_of_a_score_matters():
    table = two_criteria(1)
    stretched = pa.array(np.exp(table["loss"].to_numpy() * 3).astype(np.float32))
    other = table.set_column(table.column_names.index("loss"), "loss", stretched)
    first, second = (choose(t, criterion=WEIGHTS, low=LOW, keep=0.3).table for t in (table, other))
    assert first.equals(second)


@pytest.mark.parametrize("scope", ["class", "global", "adaptive"])
def test_weighted_selection_streams_from_disk_as_it_is_found_in_memory(tmp_path, monkeypatch, scope):
    table = two_criteria(3)
    there = choose(table, 2, criterion=WEIGHTS, low=LOW, keep=0.3, scope=scope)
    monkeypatch.setattr(score_reader, "BATCH", 7)
    selection = choose(on_disk(tmp_path, table), 2, criterion=WEIGHTS, low=LOW, keep=0.3, scope=scope)
    assert selection.table.equals(there.table)
    assert selection.facts == there.facts


def test_the_facts_say_the_weights():
    facts = choose(two_criteria(), criterion=WEIGHTS, low=LOW, keep=0.3).facts
    assert (facts["criterion"], facts["weights"]) == ("0.7 loss + 0.3 el2n", WEIGHTS)


@pytest.mark.parametrize("order", ["low", "high"])
def test_weights_refuse_an_end_of_a_scale(order):
    with pytest.raises(UserError, match=r"set select.order to useful"):
        choose(two_criteria(), criterion=WEIGHTS, low=LOW, order=order)


def test_a_weighted_criterion_without_scores_is_named():
    with pytest.raises(UserError, match="'el2n' has no scores; scored are: loss"):
        choose(skewed(0), criterion=WEIGHTS, low=LOW)


def test_a_non_finite_score_of_any_criterion_names_its_sample():
    columns = {"sample_id": ["a", "b"], "label": [0, 0], "loss": [0.5, 0.7], "el2n": [1.0, float("inf")]}
    with pytest.raises(UserError, match="'b' is not finite"):
        choose(pa.table(columns), criterion=WEIGHTS, low=LOW)


def spreading(stds, sizes, seed=0):
    """Classes whose scores have exactly these standard deviations."""
    chance, rows = np.random.default_rng(seed), []
    for label, (std, size) in enumerate(zip(stds, sizes, strict=True)):
        values = chance.normal(size=size)
        values = (values - values.mean()) / (values.std() or 1) * std
        rows += [{"sample_id": f"{label}-{k:04d}", "label": label, "loss": float(v)} for k, v in enumerate(values)]
    return pa.Table.from_pylist(rows)


def test_the_adaptive_scope_is_neymans_allocation_with_the_budget_of_the_fixed_rate():
    table = spreading([1, 2, 3], [100, 100, 200])
    selection = choose(table, scope="adaptive", keep=0.3)
    assert selection.facts["kept_per_class"] == [13, 27, 80]  # 120 in proportion to 100, 200 and 600, remainders first
    assert selection.facts["kept"] == choose(table, keep=0.3).facts["kept"]
    assert selection.facts["rates"] == {"0": 0.13, "1": 0.27, "2": 0.4}


def test_the_adaptive_scope_keeps_the_minimum_and_never_more_than_there_are():
    selection = choose(spreading([0.001, 1, 50], [50, 50, 10]), minimum=4, scope="adaptive", keep=0.5)
    assert selection.facts["kept_per_class"] == [4, 41, 10]
    assert selection.facts["raised_to_minimum"] == [0]


def test_the_adaptive_scope_keeps_the_best_of_every_class():
    selection = choose(spreading([1, 2], [30, 30]), scope="adaptive", keep=0.4)
    for row in selection.table.to_pylist():
        assert row["kept"] == (row["rank"] < selection.facts["kept_per_class"][row["label"]])


def test_the_adaptive_scope_takes_a_count_per_class_as_a_budget():
    assert choose(spreading([1, 3], [50, 50]), scope="adaptive", per_class=10).facts["kept_per_class"] == [5, 15]


def test_classes_that_do_not_spread_share_what_is_left():
    assert choose(spreading([0, 0], [10, 30]), scope="adaptive", keep=0.5).facts["kept_per_class"] == [5, 15]
    assert choose(spreading([0, 1], [10, 10]), scope="adaptive", keep=0.7).facts["kept_per_class"] == [4, 10]


def test_an_allocation_always_adds_up_and_keeps_its_bounds():
    chance = np.random.default_rng(0)
    for _ in range(300):
        size = int(chance.integers(1, 8))
        highest = chance.integers(0, 40, size)
        lowest = np.minimum(chance.integers(0, 5, size), highest)
        weights = highest * chance.choice([0, 1e-12, 1, 1e6], size) * chance.random(size)
        budget = int(chance.integers(lowest.sum(), highest.sum() + 1))
        shares = quotas.allocate(budget, weights, lowest, highest)
        assert shares.sum() == budget
        assert ((shares >= lowest) & (shares <= highest)).all()


def test_the_random_control_has_no_spread_and_keeps_its_rate():
    assert choose(spreading([1, 9], [40, 40]), criterion="random", scope="adaptive", keep=0.25).facts["kept"] == 20


NOISY = {"useful": {"loss": "low"}, "criteria": ["loss"], "trials": 5, "agreement": {"trials": 0.3, "all": 0.5}}


def test_poor_agreement_of_trials_is_warned_about_with_the_number_needed():
    (line,) = checks.selection_warnings(["loss"], NOISY, 1.0, None, {})
    assert "agree to 0.30 only" in line
    assert "10 trials would reach 0.8 (score.trials, now 5)" in line  # 4 * 0.7 / 0.3 = 9.33


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (["loss"], NOISY | {"agreement": {"trials": 0.6}}),
        (["loss"], NOISY | {"agreement": None}),
        (["loss"], NOISY | {"trials": 10}),
        (["loss"], {"useful": {"loss": "low"}}),  # a table from before agreement was measured
        (["random"], NOISY),
        (["el2n"], NOISY | {"useful": {"loss": "low", "el2n": "low"}, "criteria": ["loss", "el2n"]}),
        (["mine"], NOISY | {"useful": {"loss": "low", "mine": "low"}, "criteria": ["loss", "mine"]}),
    ],
)
def test_no_warning_without_reason(names, table):
    assert checks.selection_warnings(names, table, 1.0, None, {}) == []


def test_trials_that_do_not_agree_at_all_are_beyond_mending():
    (line,) = checks.selection_warnings(["loss"], NOISY | {"agreement": {"trials": -0.1}}, 1.0, None, {})
    assert "more trials cannot improve this" in line


def test_a_rate_beyond_the_break_point_is_warned_about():
    broke = checks.BreakPoint(0.7, 0.5)
    (line,) = checks.selection_warnings(["random"], {}, 0.1, broke, {})
    assert line.startswith(
        "90.0% of the samples are dropped, but on this data accuracy broke at 70.0% and held at 50.0%"
    )
    assert line.endswith("raise select.keep to 0.5")
    assert (
        len(checks.selection_warnings(["random"], {}, 0.3001, broke, {})) == 1
    )  # the rate that broke, rounded class by class
    assert checks.selection_warnings(["random"], {}, 0.5, broke, {}) == []


def test_the_break_point_is_read_from_the_first_folder_that_has_the_study(tmp_path):
    second = tmp_path / "second" / "studies"
    second.mkdir(parents=True)
    (second / "interaction.json").write_text(
        json.dumps({"facts": {"break_drop": 0.4, "held_drop": 0.3}}), encoding="utf-8"
    )
    assert checks.measured_break_point([tmp_path / "first", tmp_path / "second"]) == checks.BreakPoint(0.4, 0.3)
    assert checks.measured_break_point([tmp_path / "first"]) is None


def test_noisy_monte_carlo_scores_are_warned_about():
    (line,) = checks.selection_warnings(
        ["monte_carlo"], {}, 1, None, {"reliability": 0.2, "more_subsets": 1500, "subsets": 100}
    )
    assert "reliability after 100 subsets is 0.20; about 1,500 more subsets would reach 0.8" in line


@pytest.mark.parametrize("agreement", [0.05, 0.3, 0.7, 0.95])
def test_spearman_and_brown_are_each_others_inverse(agreement):
    assert reliability.spearman_brown(agreement, reliability.times_needed(agreement, 0.8)) == pytest.approx(0.8)


def test_ids_of_both_scopes_are_the_same_where_all_classes_spread_alike():
    table = spreading([1, 1], [40, 40])
    assert kept(choose(table, scope="adaptive", keep=0.25)) == kept(choose(table, keep=0.25))

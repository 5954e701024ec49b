"""A sweep's figures against values worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from scipy import stats
from sweep_tables import digits, row

from distill_at_scale.experiments.sweep import analysis
from distill_at_scale.experiments.sweep import text as answers
from distill_at_scale.experiments.sweep.analysis import Accuracy
from distill_at_scale.pipeline.report import text as wording


def only(configurations, **wanted):
    """The one configuration with these swept keys (a double underscore for the dot) and control."""
    control = wanted.pop("control", None)
    keys = {key.replace("__", "."): value for key, value in wanted.items()}
    (one,) = [
        o
        for o in analysis.distilled(configurations)
        if o.control == control and all(o.keys[k] == v for k, v in keys.items())
    ]
    return one


def test_pooled_figures_equal_those_of_all_single_evaluations():
    first, second = [0.5, 0.6, 0.7], [0.8, 0.9]
    rows = [row(statistics.fmean(v), std=statistics.stdev(v), n=len(v)) for v in (first, second)]
    pooled = analysis.pooled(rows)
    assert pooled.mean == pytest.approx(statistics.fmean(first + second))
    assert pooled.std == pytest.approx(statistics.stdev(first + second))
    assert pooled.n == 5
    assert answers.size(pooled) == "5 of 2 distillations"


def test_a_single_evaluation_has_no_deviation_and_says_so():
    pooled = analysis.pooled([row(0.5, std=None, n=1)])
    assert pooled.std is None
    assert answers.accuracy(pooled) == "50.0\u00a0%"
    assert "chance is not ruled out" in answers.spread(pooled)
    assert "one distilled set" in answers.spread(analysis.pooled([row(0.5, n=5)]))
    assert answers.spread(analysis.pooled([row(0.5), row(0.6, seed=1)])) == ""


def test_repetitions_are_grouped_and_counted_as_distillations_times_networks():
    configurations = analysis.configurations(digits())
    assert len(analysis.distilled(configurations)) == 3 * 3 + 1
    one = only(configurations, select__keep=0.1, select__criterion="loss")
    assert one.accuracy.means == pytest.approx((0.798, 0.8, 0.802))
    assert answers.size(one.accuracy) == "3\u00a0×\u00a05"
    assert one.rate == 0.1


def test_failed_and_stopped_trials_are_in_no_configuration():
    rows = [row(0.5, 0.1, "loss"), row(None, 0.2, "loss", error="diverged"), row(0.9, 0.3, "loss", stopped=40)]
    assert [one.kept for one in analysis.configurations(rows)] == [100]


def test_scoring_is_charged_to_selections_only_in_full_and_shared():
    configurations = analysis.configurations(digits())
    one = only(configurations, select__keep=0.1, select__criterion="loss")
    assert (one.cost, one.sharing) == (2.0 + 6.0, 18)
    assert one.shared_cost == pytest.approx(2.0 + 6.0 / 18)
    assert only(configurations, control="unpruned").cost == 10.0
    assert only(configurations, control="random", select__keep=0.1).cost == 2.0


def test_the_start_of_workers_is_no_part_of_a_cost():
    rows = [row(0.8, 0.1, "loss", distill=10.0, start_seconds=7.0), row(0.8, 1.0, None, "unpruned", distill=12.0)]
    ours, unpruned = analysis.configurations(rows)
    assert (ours.distill_seconds, ours.start_seconds, ours.cost) == (3.0, 7.0, 9.0)  # 6 of scoring
    assert (unpruned.start_seconds, unpruned.cost) == (0.0, 12.0)  # of an early version


def test_ingest_is_not_charged_where_the_table_parts_it_from_scoring():
    (one,) = analysis.configurations([row(0.5, 0.1, "loss", shared=6.0, score_seconds=4.0)])
    assert one.scoring_seconds == 4.0


def test_a_criterion_of_the_base_configuration_that_is_random_needs_no_scores():
    rows = [{k: v for k, v in row(0.5, 0.1).items() if k != "select.criterion"}]
    assert analysis.configurations(rows, {"select.criterion": "random"})[0].scoring_seconds == 0
    assert analysis.configurations(rows, {"select.criterion": "loss"})[0].scoring_seconds == 6


def test_random_as_a_swept_criterion_is_the_random_control():
    configurations = analysis.configurations([row(0.5, 0.1, "random"), row(0.6, 0.1, "loss")])
    assert [one.control for one in configurations] == ["random", None]
    assert analysis.random_of(configurations[1], configurations) is configurations[0]


def test_controls_are_those_of_the_same_setting():
    settings = [("dc", 0.4), ("dm", 0.5)]
    rows = [row(m, control="unpruned", **{"distill.method": name}) for name, m in settings]
    rows += [row(m, 0.1, "loss", **{"distill.method": name}) for name, m in settings]
    rows += [row(m - 0.1, 0.1, "random", "random", **{"distill.method": name}) for name, m in settings]
    configurations = analysis.configurations(rows)
    dm = only(configurations, distill__method="dm", select__criterion="loss")
    assert analysis.unpruned_of(dm, configurations).accuracy.mean == 0.5
    assert analysis.random_of(dm, configurations).accuracy.mean == 0.4


def test_the_unpruned_control_fits_although_keys_of_pruning_differ():
    configurations = analysis.configurations(
        [row(0.5, control="unpruned", **{"runtime.drop": 0.0}), row(0.4, 0.1, "loss", **{"runtime.drop": 0.3})]
    )
    assert analysis.unpruned_of(configurations[1], configurations) is configurations[0]


def test_welch_agrees_with_scipy_on_the_samples_themselves():
    a, b = [0.30, 0.31, 0.29, 0.305], [0.28, 0.27, 0.285]
    ours, theirs = (
        Accuracy(statistics.fmean(v), statistics.stdev(v), (statistics.fmean(v),), (len(v),)) for v in (a, b)
    )
    result = analysis.difference(ours, theirs)
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_a_difference_counts_distillations_where_there_are_several_on_both_sides():
    many, one = Accuracy(0.5, 0.1, (0.4, 0.6), (5, 5)), Accuracy(0.4, 0.05, (0.4,), (5,))
    assert analysis.difference(many, many).counts == (2, 2)
    assert analysis.difference(many, one).counts == (10, 5)
    assert analysis.difference(many, one).over == "networks"
    assert "of single distillations" in answers.interval(analysis.difference(one, one))
    assert analysis.difference(many, Accuracy(0.4, None, (0.4,), (1,))) is None


def test_equal_values_on_both_sides_give_a_difference_without_spread():
    same = Accuracy(0.5, 0.0, (0.5, 0.5), (1, 1))
    result = analysis.difference(same, same)
    assert (result.low, result.high, result.verdict) == (0, 0, "open")


def test_differences_are_formatted_in_points_with_a_sign():
    assert [wording.points(value) for value in (0.0123, -0.0123, -0.0001)] == ["+1.2", "−1.2", "0.0"]


def test_the_pareto_front_holds_what_nothing_beats():
    rows = [
        row(m, 0.1, str(i), distill=d, shared=0)
        for i, (d, m) in enumerate([(1, 0.5), (2, 0.4), (3, 0.6), (3, 0.55), (4, 0.6)])
    ]
    front = analysis.pareto(analysis.configurations(rows))
    assert [(one.cost, one.accuracy.mean) for one in front] == [(1, 0.5), (3, 0.6)]


def test_the_cheapest_within_one_deviation_of_the_best_is_recommended():
    recommended = analysis.recommend(analysis.configurations(digits()))
    assert recommended.chosen.keys["select.keep"] == 0.1
    assert recommended.chosen.keys["select.criterion"] == "loss"
    assert recommended.saved == pytest.approx(10 - 8)
    assert recommended.saved_shared == pytest.approx(10 - 2 - 6 / 18)
    assert recommended.pays_after == 1
    assert recommended.over_random.value == pytest.approx(0.10)
    assert recommended.over_random.verdict == "better"
    assert recommended.over_unpruned.verdict == "open"


def test_without_a_deviation_only_the_best_itself_is_within_it():
    rows = [row(0.5, 0.1, "loss", std=None, n=1), row(0.51, 0.5, "loss", std=None, n=1, distill=20)]
    assert analysis.recommend(analysis.configurations(rows)).chosen.kept == 500


def test_pruning_that_does_not_pay_has_a_negative_saving_and_says_so():
    rows = [row(0.9, 0.5, "loss", distill=9.0), row(0.5, control="unpruned")]
    recommended = analysis.recommend(analysis.configurations(rows))
    assert recommended.saved == pytest.approx(-5)
    assert recommended.pays_after == 6
    assert "costs 5.0\u00a0s more (50\u00a0%)" in answers.saving(recommended)
    assert "6 distillations" in answers.saving(recommended)


def test_scoring_never_pays_where_a_distillation_is_no_faster():
    configurations = analysis.recommend(
        analysis.configurations([row(0.9, 0.5, "loss", distill=11.0), row(0.5, control="unpruned")])
    )
    assert configurations.pays_after is None
    assert "never pays" in answers.saving(configurations)


def test_a_random_selection_that_is_as_good_and_cheaper_is_reported():
    rows = [
        row(0.8, 0.1, "loss", distill=2),
        row(0.795, 0.1, "random", "random", distill=2),
        row(0.7, control="unpruned"),
    ]
    recommended = analysis.recommend(analysis.configurations(rows))
    assert recommended.chosen.keys["select.criterion"] == "loss"
    assert "needs no scoring" in " ".join(answers.reasons(recommended))


def test_where_scoring_is_shared_another_configuration_may_be_the_cheapest():
    rows = [row(0.8, 0.5, "loss", distill=6, shared=6, seed=s) for s in range(3)]
    rows += [row(0.8, control="unpruned", seed=s) for s in range(3)]
    configurations = analysis.configurations(rows)
    one, shared = analysis.recommend(configurations), analysis.recommend(configurations, shared=True)
    assert one.chosen.control == "unpruned"
    assert shared.chosen.kept == 500
    assert answers.headline(one, shared)["verdict"] == "unclear"
    assert "saves 2.0\u00a0s (20\u00a0%)" in " ".join(answers.reasons(one, shared))


def test_nothing_is_recommended_of_nothing():
    assert analysis.recommend([]) is None
    assert analysis.configurations([]) == []
    assert math.isnan(analysis.configurations([row(0.5, of=0)])[0].rate)

"""Studies on fake points with known answers; the suite, its files and how it resumes."""

from __future__ import annotations

import json
import math
import re

import pyarrow.parquet as pq
import pytest
from fake_points import CLASSES, EACH, FakePointSet

from distill_at_scale.config.load import with_overrides
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments import studies
from distill_at_scale.experiments.studies import comparison, critical_ratio, drop, interaction, stratified, suite
from distill_at_scale.experiments.studies.bisection import Search
from distill_at_scale.experiments.studies.comparison import Level, difference, in_points, sample_size
from distill_at_scale.pipeline.report.text import share


def needs(least: float, config, share: float) -> float:
    """Accuracy 0.6 from `least` on, falling off below; random selection needs ten times as much."""
    needed = least * (10 if config.select.criterion == "random" else 1)
    return 0.6 if share >= needed else 0.6 - 0.3 * math.log10(needed / share)


def search(point_set, **keys):
    values = {"tolerance": 1.0, "lowest": 0.004, "points": 12, "seeds": 3}
    return Search(point_set.context, **{**values, **keys}).run()


# --- comparison ---


def test_a_t_interval_is_that_of_the_textbook():
    result = difference([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    assert result.paired
    assert result.mean == pytest.approx(0.2)
    assert result.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert not result.clear
    assert difference([0.5], [0.4]).half is None


def test_unequal_repetitions_are_compared_by_welch():
    result = difference([0.50, 0.52], [0.40, 0.42, 0.44])
    assert not result.paired
    error = math.sqrt(0.0002 / 2 + 0.0004 / 3)
    freedom = error**4 / ((0.0001**2) / 1 + (0.0004 / 3) ** 2 / 2)
    assert result.half == pytest.approx(comparison.t.ppf(0.975, freedom) * error)


def test_confidence_is_a_half_at_the_limit_and_one_far_above_it():
    level = Level([0.48, 0.50, 0.52], 1.0)
    assert level.least == pytest.approx(0.48)
    assert level.confidence([0.46, 0.48, 0.50]) == pytest.approx(0.5)
    assert level.confidence([0.67, 0.68, 0.69]) > 0.99
    assert Level([0.5, 0.5], 1.0).confidence([0.4, 0.4]) == 0.0


# --- bisection ---


@pytest.mark.parametrize("least", [0.01, 0.07, 0.4])
def test_bisection_finds_the_smallest_sufficient_rate(tmp_path, least):
    result = search(FakePointSet(tmp_path, lambda config, share: needs(least, config, share)))
    assert least * 0.93 <= result.smallest.keep <= least * 1.25
    assert result.smallest.keep == result.unbroken.keep
    assert not result.exceptions


def test_bisection_tries_no_more_rates_than_it_may(tmp_path):
    result = search(FakePointSet(tmp_path, lambda config, share: needs(0.07, config, share)), points=4)
    assert len(result.rates) == 4 + 1
    assert result.rates[-1].keep == 1.0


def test_the_deviation_comes_from_at_least_three_unpruned_distillations(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5)
    result = search(point_set, seeds=2)
    assert len(result.level.accuracies) == 3
    assert len(result.smallest.outcomes) == 2


def test_a_smaller_rate_that_suffices_below_one_that_does_not_is_reported(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.4 if 0.05 < share < 0.5 else 0.6, studies__seeds=3)
    result = search(point_set)
    assert result.smallest.keep == 0.004
    assert 0.5 <= result.unbroken.keep < 0.7
    assert result.exceptions
    assert any("not monotone" in note for note in critical_ratio.study(point_set.context).notes)


def test_where_no_rate_suffices_everything_is_kept(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.6 if share == 1 else 0.2)
    assert search(point_set).smallest.keep == 1.0
    finding = critical_ratio.study(point_set.context)
    assert "No keep rate" in finding.answer
    assert "random" not in {row["set"] for row in finding.rows}  # as many at random are all of them


# --- critical ratio ---


def test_the_critical_ratio_is_reported_with_its_number_and_its_random_control(tmp_path):
    point_set = FakePointSet(
        tmp_path,
        lambda config, share: needs(0.04, config, share),
        studies__critical_ratio__points=12,
        select__per_class=7,
    )
    finding = critical_ratio.study(point_set.context)
    keep, kept = finding.facts["critical_keep"], finding.facts["critical_kept"]
    assert 0.036 < keep < 0.05
    assert kept == CLASSES * int(keep * EACH + 0.5)
    assert finding.answer.startswith(f"{kept} of {CLASSES * EACH} samples ({kept // CLASSES} per class")
    assert "better than as many random ones" in finding.answer
    assert finding.paper == ""
    assert [row["set"] for row in finding.rows].count("random") == 1
    assert len({tuple(row) for row in finding.rows}) == 1, "all rows have the same keys"
    assert finding.facts["confidence"] > 0.5


def test_a_critical_ratio_at_chance_says_that_it_says_little(tmp_path):
    finding = critical_ratio.study(FakePointSet(tmp_path, lambda config, share: 0.28).context)
    assert any("near chance" in note for note in finding.notes)


def test_a_minimum_that_decides_instead_of_the_rate_is_reported(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5, select__min_per_class=5)
    finding = critical_ratio.study(point_set.context)
    assert finding.facts["critical_kept"] == 5 * CLASSES
    assert any("min_per_class = 5" in note for note in finding.notes)


def test_a_stratum_has_no_critical_ratio(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5, select__order="stratum", select__keep=0.2)
    with pytest.raises(UserError, match="order other than stratum"):
        critical_ratio.study(point_set.context)


# --- stratified ---


@pytest.mark.parametrize(
    ("slope", "verdict", "words"),
    [(-0.3, "trustworthy", "is trustworthy"), (0.3, "reversed", "is reversed"), (0.0, "nothing", "shows nothing")],
)
def test_strata_tell_whether_the_criterion_is_trustworthy(tmp_path, slope, verdict, words):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5 + slope * config.select.stratum_start)
    finding = stratified.study(point_set.context)
    assert finding.facts["verdict"] == verdict
    assert words in finding.answer
    assert f"the best is stratum {finding.facts['best_stratum']})" in finding.answer
    assert math.copysign(1, finding.facts["spearman"]) == math.copysign(1, slope) or slope == 0
    assert [row["kept"] for row in finding.rows[:-1]] == [200] * 5


# --- drop ---


def test_the_drop_test_distinguishes_the_three_outcomes(tmp_path):
    def accuracy(config, share):
        if share == 1:
            return 0.5
        return 0.5 if config.select.criterion == "random" else 0.55 if config.select.order == "useful" else 0.4

    finding = drop.study(FakePointSet(tmp_path, accuracy).context)
    assert finding.facts["drop_least_useful"] == pytest.approx(0.05)
    assert finding.facts["drop_most_useful"] == pytest.approx(-0.1)
    assert "least useful first (the largest scores) +5.0 ± 0.0 points (helps)" in finding.answer
    assert "(hurts)" in finding.answer
    assert "do no harm or help (agrees)" in finding.paper
    assert "hurt (agrees)" in finding.paper


def test_a_drop_test_that_contradicts_the_paper_says_so(tmp_path):
    finding = drop.study(FakePointSet(tmp_path, lambda config, share: 0.5 if share == 1 else 0.4).context)
    assert "disagrees: it hurts here" in finding.paper


# --- interaction ---


def test_the_break_point_is_where_all_larger_drops_are_broken_too(tmp_path):
    by_drop = {0.0: 0.6, 0.1: 0.6, 0.3: 0.5, 0.5: 0.6, 0.7: 0.5, 0.8: 0.4, 0.9: 0.3, 0.95: 0.2}

    def accuracy(config, share):
        value = by_drop[round(1 - config.select.rate, 2)]
        return [0.6, *[value] * (CLASSES - 1)]

    finding = interaction.study(FakePointSet(tmp_path, accuracy).context)
    assert finding.facts["break_drop"] == 0.7
    assert finding.facts["per_class"] == {"0": None, "1": 0.7, "2": 0.7, "3": 0.7}


def test_effects_that_add_up_are_not_called_an_interaction(tmp_path):
    finding = interaction.study(
        FakePointSet(tmp_path, lambda config, share: 0.6 - 0.2 * (1 - config.select.rate)).context
    )
    assert "not refuted" in finding.answer
    assert finding.rows[-1]["predicted"] == pytest.approx(0.6 - 0.2 * 0.95)


def test_a_cliff_is_a_clear_gap_from_the_additive_prediction(tmp_path):
    finding = interaction.study(
        FakePointSet(tmp_path, lambda config, share: 0.6 if config.select.rate > 0.2 else 0.3).context
    )
    assert "do not add up: at 95\u00a0% it is worse than predicted by adding" in finding.answer
    assert finding.facts["break_drop"] == 0.8


def test_drop_rates_that_do_not_ascend_are_refused(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5, studies__interaction__drops=[0.3, 0.1, 0.5])
    with pytest.raises(UserError, match=r"studies\.interaction\.drops"):
        interaction.study(point_set.context)


def test_an_evaluation_without_figures_per_class_says_what_to_do(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5)
    outcome = point_set.run(point_set.context.repetitions({"select.keep": 1.0}, 1))[0]
    del outcome.rows[0]["per_class"]
    with pytest.raises(UserError, match=r"no accuracy per class.*renamed to evaluate\.json\.damaged"):
        comparison.per_class(outcome)


# --- the suite ---


@pytest.fixture
def point_set(tmp_path):
    return FakePointSet(
        tmp_path / "run", lambda config, share: needs(0.04, config, share), studies__run=["drop", "interaction"]
    )


def test_a_suite_leaves_findings_and_one_table(tmp_path, point_set):
    findings_by_name = suite.run(point_set.config, point_set, lambda line: None)
    assert [finding.study for finding in findings_by_name] == ["drop", "interaction"]
    written = json.loads((tmp_path / "run" / "studies" / "interaction.json").read_text(encoding="utf-8"))
    assert written["facts"]["break_drop"] == findings_by_name[1].facts["break_drop"]
    table = pq.read_table(tmp_path / "run" / "studies" / "studies.parquet").to_pylist()
    assert [row["study"] for row in table] == ["drop"] * 4 + ["interaction"] * 8
    assert table[4]["drop"] == 0.0
    assert table[0]["drop"] is None


@pytest.mark.parametrize(("wanted", "message"), [
    ({"studies__across": {"sets": {"bad": {"data.source": "digitz"}}}}, "studies.across.sets.bad: data.source = 'digitz'"),
    ({"studies__stability": {"networks": ["mlpp"]}}, "studies.stability.networks = 'mlpp' is unknown"),
    ({"studies__interaction": {"drops": [0.5, 0.3, 0.9]}}, "ascending"),
    ({"select__order": "stratum", "select__keep": 0.2}, "select.order other than stratum"),
    ({"score__criterion": "random"}, "stability needs scores"),
])  # fmt: skip
def test_a_later_studys_error_is_raised_before_anything_runs(tmp_path, wanted, message):
    point_set = FakePointSet(tmp_path / "run", lambda config, share: 0.5, **wanted)
    with pytest.raises(UserError, match=re.escape(message)):
        suite.run(point_set.config, point_set, lambda line: None)
    assert not point_set.tried
    assert not (tmp_path / "run").exists(), "nothing was scored"


def test_a_second_call_reads_what_the_first_has_found(point_set):
    first = suite.run(point_set.config, point_set, lambda line: None)
    point_set.tried.clear()
    lines: list[str] = []
    second = suite.run(point_set.config, point_set, lines.append)
    assert point_set.tried == []
    assert [finding.answer for finding in second] == [finding.answer for finding in first]
    assert second[1].plots[0].series[0].y == pytest.approx(list(first[1].plots[0].series[0].y))
    assert all("skipped" in line for line in lines)


def test_an_interrupted_study_runs_again_and_a_finished_one_does_not(point_set, monkeypatch):
    def interrupted(context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(studies.STUDIES, "interaction", interrupted)
        with pytest.raises(KeyboardInterrupt):
            suite.run(point_set.config, point_set, lambda line: None)
    point_set.tried.clear()
    suite.run(point_set.config, point_set, lambda line: None)
    assert {config.select.order for config in point_set.tried} == {"useful"}, "interaction alone"


def test_another_tolerance_makes_a_study_again(point_set):
    suite.run(point_set.config, point_set, lambda line: None)
    point_set.tried.clear()
    section = point_set.config.studies
    changed = section.interaction.model_copy(update={"tolerance": 2.0})
    point_set.config = point_set.config.model_copy(
        update={"studies": section.model_copy(update={"interaction": changed})}
    )
    suite.run(point_set.config, point_set, lambda line: None)
    assert point_set.tried


def test_trackers_and_workers_leave_findings_valid(tmp_path, point_set):
    """Keys that never change results do not discard a finding."""
    suite.run(point_set.config, point_set, lambda line: None)
    lines: list[str] = []
    suite.run(with_overrides(point_set.config, {"track.wandb": {}, "distill.workers": 2}), point_set, lines.append)
    assert len(lines) == len(point_set.config.studies.run)
    assert all("already done for this configuration" in line for line in lines)


def test_a_damaged_finding_is_named(tmp_path, point_set):
    suite.run(point_set.config, point_set, lambda line: None)
    (tmp_path / "run" / "studies" / "drop.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"drop\.json is no finding .* renamed to drop\.json\.damaged; give the same"):
        suite.run(point_set.config, point_set, lambda line: None)
    assert [finding.study for finding in suite.run(point_set.config, point_set, lambda line: None)]


def test_all_studies_share_their_unpruned_points(tmp_path):
    point_set = FakePointSet(tmp_path, lambda config, share: 0.5)
    for study in (critical_ratio.study, stratified.study, drop.study, interaction.study):
        study(point_set.context)
    assert len({config.model_dump_json() for config in point_set.tried if config.select.keep == 1.0}) == 1


def test_rates_differences_and_counts_are_formatted_plainly():
    assert [share(rate) for rate in (0.0004, 0.25632, 0.9)] == ["0.04\u00a0%", "25.6\u00a0%", "90\u00a0%"]
    assert in_points(difference([0.5, 0.6], [0.6, 0.7])) == "−10.0 ± 0.0 points"
    assert sample_size(3, 1) == "n = 3 distillations × 1 evaluation"

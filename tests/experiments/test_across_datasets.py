"""The study over data sets: what it asks for, what it answers where the accuracies are known, and the whole of it on digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import with_overrides
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.studies import across_datasets
from distill_at_scale.experiments.studies.base import StudyContext
from distill_at_scale.experiments.studies.comparison import difference

SETS = {
    "tail": {"data.transform": "long_tail", "data.imbalance": 100.0},
    "twins": {"data.transform": "near_duplicates"},
}
KNOWN = {  # (transform, selection, keep) -> accuracy
    ("none", "unpruned", 1.0): 0.5, ("none", "ours", 0.1): 0.6, ("none", "random", 0.1): 0.4,
    ("long_tail", "unpruned", 1.0): 0.4, ("long_tail", "ours", 0.1): 0.2, ("long_tail", "random", 0.1): 0.3,
    ("near_duplicates", "unpruned", 1.0): 0.5, ("near_duplicates", "ours", 0.1): 0.5,
    ("near_duplicates", "random", 0.1): 0.5,
}  # fmt: skip


class FakePointSet:
    """A point set with known accuracies; those of repetitions are close to each other."""

    def __init__(self, config, lost=()):
        self.config, self.lost, self.asked = config, lost, []

    def configured(self, point):
        return with_overrides(self.config, point.overrides, "a point")

    def shared(self, overrides):
        raise AssertionError("not needed")

    def run(self, points):
        self.asked += points
        return [outcome for point in points if (outcome := self.outcome(point)) is not None]

    def outcome(self, point):
        select, transform = self.configured(point).select, self.configured(point).data.transform
        if transform in self.lost:
            return None
        way = "unpruned" if select.keep == 1 else "random" if select.criterion == "random" else "ours"
        value = KNOWN[transform, way, select.keep] + 0.001 * (point.seed - 1) * (1 if way == "ours" else -1)
        kept = int(select.keep * 300)
        return Outcome(point, [{"set": "distilled", "top1": value}], kept, 300, [kept // 3] * 3, {}, Path())


@pytest.fixture
def context(make_config, tmp_path):
    config = make_config(tmp_path, studies={"across": {"sets": SETS, "keep": [0.1]}})
    return StudyContext(config, FakePointSet(config), lambda line: None)


def test_every_set_is_compared_with_its_own_unpruned_runs(context):
    finding = across_datasets.study(context)
    facts = finding.facts["sets"]
    assert list(facts) == ["digits", "tail", "twins"]
    assert {name: facts[name]["ours"]["0.1"] for name in facts} == pytest.approx(
        {"digits": 1.2, "tail": 0.5, "twins": 1.0}
    )
    assert facts["tail"]["random"]["0.1"] == pytest.approx(0.75)
    assert {name: facts[name]["beats_random"]["0.1"] for name in facts} == {"digits": 1, "tail": -1, "twins": 0}
    assert {name: facts[name]["beats_unpruned"]["0.1"] for name in facts} == {"digits": 1, "tail": -1, "twins": 0}


def test_the_answer_says_on_which_sets_it_pays_and_what_the_tail_does_to_it(context):
    answer = across_datasets.study(context).answer
    assert "loss clearly beats random selection on digits and loses to it on tail" in answer
    assert "it clearly beats the unpruned set on digits and is clearly below it on tail" in answer
    assert (
        "digits +20.0 points (120\u00a0% of unpruned); long tail 1:100 (tail) −10.0 points (50\u00a0% of unpruned)"
        in answer
    )
    assert "5 near-duplicates each (twins) 0.0 points (100\u00a0% of unpruned, not clear)" in answer


def test_the_table_and_the_plot_hold_all_sets_side_by_side(context):
    finding = across_datasets.study(context)
    assert len(finding.rows) == 3 * 3
    assert len({tuple(row) for row in finding.rows}) == 1
    plot = finding.plots[0]
    assert [(s.name, s.role) for s in plot.series] == [("loss, keep 0.1", "ours"), ("random, keep 0.1", "random")]
    assert all(list(s.x) == ["digits", "tail", "twins"] and len(s.error) == 3 for s in plot.series)
    assert plot.series[0].error[0] == pytest.approx((0.001**2 + (1.2 * 0.001) ** 2) ** 0.5 / 0.5)


def test_all_points_are_requested_at_once_and_alike_for_every_set(context):
    across_datasets.study(context)
    asked = context.points.asked
    assert len(asked) == 3 * 3 * context.config.studies.seeds
    assert {point.seed for point in asked} == {0, 1, 2}
    full = [context.points.configured(point) for point in asked if point.overrides["select.keep"] == 1]
    assert {c.runtime.rule for c in full} == {"none"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data.transfrom": "none"},
            r"studies\.across\.sets\.odd: unknown key data\.transfrom .*did you mean data\.transform",
        ),
        ({"data.size": 1}, r"studies\.across\.sets\.odd: data\.size = 1 .* not allowed"),
        ({"data": {"size": 8}}, r"studies\.across\.sets\.odd: data is a whole section"),
        ({"run.dir": "x"}, r"studies\.across\.sets\.odd: run\.dir cannot differ from set to set"),
    ],
)
def test_a_set_that_is_not_allowed_is_named_before_anything_starts(context, overrides, message):
    config = with_overrides(context.config, {"studies.across.sets": {**SETS, "odd": overrides}})
    point_set = FakePointSet(config)
    with pytest.raises(UserError, match=message):
        across_datasets.study(StudyContext(config, point_set, lambda line: None))
    assert point_set.asked == []


def test_a_set_without_a_test_split_is_skipped_with_a_message(context):
    point_set = FakePointSet(context.config, lost=("long_tail",))
    finding = across_datasets.study(StudyContext(context.config, point_set, lambda line: None))
    assert list(finding.facts["sets"]) == ["digits", "twins"]
    assert "The set tail is left out" in finding.notes[0]


def test_a_set_near_chance_gets_a_warning(context, monkeypatch):
    assert not any("near chance" in note for note in across_datasets.study(context).notes)
    monkeypatch.setitem(KNOWN, ("long_tail", "unpruned", 1.0), 0.38)  # of three classes
    assert any("On tail even the unpruned set is near chance" in note for note in across_datasets.study(context).notes)


def test_a_set_named_like_the_source_renames_the_base_and_duplicates_nothing(context):
    config = with_overrides(context.config, {"studies.across.sets": {"digits": {}}})
    finding = across_datasets.study(StudyContext(config, FakePointSet(config), lambda line: None))
    assert list(finding.facts["sets"]) == ["base", "digits"]
    assert {row["n"] for row in finding.rows} == {3}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [([0.5, 0.6], [0.4, 0.5], 1), ([0.4, 0.5], [0.5, 0.6], -1), ([0.5, 0.5], [0.5, 0.5], 0), ([0.9], [0.1], 0),
     ([0.1, 0.9, 0.5], [0.2, 0.3, 0.6], 0), ([0.30, 0.31, 0.32], [0.20, 0.22, 0.21], 1)],
)  # fmt: skip
def test_a_difference_is_clear_by_its_interval(ours, theirs, expected):
    assert difference(ours, theirs).sign == expected


def test_the_whole_study_on_digits(make_config, tmp_path):
    sets = {"tail": {"data.transform": "long_tail", "data.imbalance": 4.0},
            "two": {"data.transform": "high_variance", "data.variance_classes": 2}}  # fmt: skip
    studies = {"seeds": 2, "steps": 1, "across": {"sets": sets, "keep": [0.5]}}
    config = make_config(tmp_path / "run", studies=studies, score__trials=1, score__epochs=1)
    point_set = PointSet(config, LocalRunner(), Display.silent())
    finding = across_datasets.study(StudyContext(config, point_set, lambda line: None))
    assert list(finding.facts["sets"]) == ["digits", "tail", "two"]
    by = {(row["set"], row["selection"]): row for row in finding.rows}
    assert by["two", "unpruned"]["of"] < by["digits", "unpruned"]["of"]
    assert by["tail", "loss"]["kept"] == by["tail", "random"]["kept"] < by["digits", "loss"]["kept"]
    assert len(list((tmp_path / "run" / "shared").glob("data-*"))) == 3


def test_the_configuration_for_digits_is_valid_with_all_of_its_sets(tmp_path):
    path = ROOT / "configs" / "studies_across_digits.yaml"
    config = configuration.load(path, [f"run.dir={tmp_path}"])
    point_set = PointSet(config, LocalRunner(), Display.silent())
    sets = across_datasets.data_sets(StudyContext(config, point_set, print))
    assert {"digits", "long_tail_10", "long_tail_100", "near_duplicates", "moving_digits"} <= set(sets)
    for name, overrides in sets.items():
        across_datasets.configured(StudyContext(config, point_set, print), name, overrides)
    assert f"# Run: distill-at-scale study {path.relative_to(ROOT)}\n" in path.read_text(encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["studies"]["run"] == ["across"]

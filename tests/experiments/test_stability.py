"""The study of agreement: known rankings give known figures, and the whole of it on digits."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_at_scale.config.load import with_overrides
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.studies import drift, rankings, stability
from distill_at_scale.experiments.studies.base import StudyContext
from distill_at_scale.pruning.scoring.reliability import spearman_brown
from distill_at_scale.pruning.scoring.score_table import KEY


def write_scores(folder, values, labels, useful="low", other=None):
    """A table of criterion loss from values [n, trials, epochs], with a second criterion without values."""
    folder.mkdir(parents=True, exist_ok=True)
    n, trials, epochs = values.shape
    flat = pa.array(values.astype(np.float32).reshape(-1))
    mean = values.mean((1, 2)).astype(np.float32)
    columns = {"sample_id": [f"{i:06d}" for i in range(n)], "label": np.asarray(labels, np.int32), "loss": mean,
               "loss_values": pa.FixedSizeListArray.from_arrays(flat, trials * epochs), "score": mean}  # fmt: skip
    useful_of = {"loss": useful}
    if other is not None:
        columns["margin"], useful_of["margin"] = other.astype(np.float32), "high"
    facts = {"trials": trials, "epochs": epochs, "useful": useful_of}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(facts)})
    pq.write_table(table, folder / "scores.parquet", row_group_size=50)
    return folder


class FakePointSet:
    """A point set that knows scores by network and distils nothing."""

    def __init__(self, config, folders):
        self.config, self.folders, self.asked = config, folders, []

    def configured(self, point):
        return with_overrides(self.config, point.overrides, "a point")

    def shared(self, overrides):
        return self.folders[overrides.get("score.network", "")]

    def run(self, points):
        self.asked += points
        return []


def noisy(n=300, trials=4, epochs=2, noise=0.0, classes=3, seed=0):
    """True utilities [n] plus independent noise per trial and epoch, and labels [n]."""
    draw = np.random.default_rng(seed)
    truth = draw.standard_normal(n)
    values = truth[:, None, None] + noise * draw.standard_normal((n, trials, epochs))
    return truth, values, np.sort(np.arange(n) % classes)


def studied(make_config, tmp_path, folders, **keys):
    config = make_config(tmp_path / "run", **keys)
    point_set = FakePointSet(config, folders)
    return stability.study(StudyContext(config, point_set, lambda line: None)), point_set


def test_trials_with_equal_ranks_agree_fully_and_one_suffices(make_config, tmp_path):
    _, values, labels = noisy(noise=0.0)
    finding, _ = studied(make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)})
    assert finding.facts["agreement"] == pytest.approx(1)
    assert finding.facts["trials_needed"] == 1
    assert finding.facts["jaccard_between_trials"] == {"0.1": 1.0, "0.2": 1.0, "0.3": 1.0, "0.5": 1.0}
    assert "suffice" in finding.answer


def test_noise_of_known_size_gives_the_reliability_and_the_number_of_trials_of_theory(make_config, tmp_path):
    """Truth and the mean of two epochs' noise have variances 1 and 4 / 2: a trial's reliability is about 1 / 3."""
    _, values, labels = noisy(n=6000, trials=8, noise=2.0)
    folder = write_scores(tmp_path / "s", values, labels)
    finding, _ = studied(make_config, tmp_path, {"": folder}, studies={"stability": {"reliability": 0.8}})
    single = finding.facts["agreement"]
    assert single == pytest.approx(1 / 3, abs=0.04)  # rank correlation is a little below the plain one
    assert finding.facts["trials_needed"] == pytest.approx(8, abs=1)
    halves = {row["first"]: row["correlation"] for row in finding.rows if row["compared"] == "means of trials"}
    for size in (2, 3, 4):
        assert halves[f"mean of {size}"] == pytest.approx(spearman_brown(single, size), abs=0.03)


def test_trials_that_do_not_agree_never_suffice(make_config, tmp_path):
    draw = np.random.default_rng(1)
    values, labels = draw.standard_normal((90, 2, 1)), np.repeat([0, 1, 2], 30)
    values[:, 1] = -values[:, 0]
    finding, _ = studied(make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)})
    assert finding.facts["agreement"] == pytest.approx(-1)
    assert finding.facts["trials_needed"] is None
    assert "no number of them is known to suffice" in finding.answer


def test_agreement_is_within_class_even_where_classes_differ_much(make_config, tmp_path):
    draw = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], 200)
    values = draw.standard_normal((600, 2, 1)) + 100 * labels[:, None, None]
    finding, _ = studied(make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)})
    assert abs(finding.facts["agreement"]) < 0.15


def test_epochs_are_compared_with_the_last_one(make_config, tmp_path):
    truth, values, labels = noisy(trials=2, epochs=3)
    values[:, :, 0] = -truth[:, None]
    values[:, :, 1] = 2 * truth[:, None] + 5
    finding, _ = studied(make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)})
    assert finding.facts["epochs_with_last"] == pytest.approx([-1, 1, 1])
    assert "reached by epoch 2 of 3 on" in finding.answer


def test_other_networks_are_scored_and_compared(make_config, tmp_path):
    _, values, labels = noisy(noise=0.5)
    folders = {
        "": write_scores(tmp_path / "s", values, labels),
        "resnet18": write_scores(tmp_path / "same", 3 * values, labels),
        "alexnet": write_scores(tmp_path / "turned", -values, labels),
    }
    networks = {"stability": {"networks": ["resnet18", "alexnet"]}}
    finding, _ = studied(make_config, tmp_path, folders, studies=networks)
    assert finding.facts["network_agreement"] == pytest.approx({"resnet18": 1, "alexnet": -1})
    assert "by -1.00 (alexnet) to 1.00" in finding.answer
    rows = {(r["first"], r["second"]): r for r in finding.rows if r["compared"] == "networks"}
    assert rows["convnet", "resnet18"]["jaccard at keep 0.1"] == 1
    assert rows["convnet", "alexnet"]["jaccard at keep 0.1"] == 0


def test_scores_of_other_samples_are_refused(make_config, tmp_path):
    _, values, labels = noisy()
    few = write_scores(tmp_path / "few", values[:-1], labels[:-1])
    folders = {"": write_scores(tmp_path / "s", values, labels), "resnet18": few}
    with pytest.raises(UserError, match="has not the scores of the same samples"):
        studied(make_config, tmp_path, folders, studies={"stability": {"networks": ["resnet18"]}})


def test_criteria_are_compared_by_what_they_call_useful(make_config, tmp_path):
    truth, values, labels = noisy()
    folder = write_scores(tmp_path / "s", values, labels, other=-truth)
    finding, _ = studied(make_config, tmp_path, {"": folder})
    assert finding.facts["criteria_agreement"]["loss"]["margin"] == pytest.approx(1)


def test_one_trial_says_nothing_and_the_study_says_so(make_config, tmp_path):
    _, values, labels = noisy(trials=1)
    finding, _ = studied(make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)})
    assert finding.facts["agreement"] is None
    assert finding.facts["trials_needed"] is None
    assert "raise score.trials" in finding.notes[0]


def test_large_tables_are_sampled_by_class_and_their_rows_are_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(rankings, "CLASSES", 2)
    monkeypatch.setattr(rankings, "SAMPLES", 7)
    values = np.arange(300 * 2, dtype=np.float32).reshape(300, 2, 1)
    scores = rankings.Scores(write_scores(tmp_path / "s", values, np.repeat([0, 1, 2], 100)) / "scores.parquet")
    drawn = scores.draw(0)
    assert np.bincount(drawn.labels).tolist().count(7) == 2
    assert (drawn.rows == 100 * drawn.labels + drawn.places).all()
    assert np.array_equal(scores.values("loss", drawn.rows), values[drawn.rows])
    assert drawn.of == 300


def test_every_row_has_the_same_keys_and_the_configured_rate_is_among_them(make_config, tmp_path):
    _, values, labels = noisy(noise=0.3)
    folder = write_scores(tmp_path / "s", values, labels, other=values.mean((1, 2)))
    finding, _ = studied(make_config, tmp_path, {"": folder}, select__keep=0.25)
    assert len({tuple(row) for row in finding.rows}) == 1
    assert "jaccard at keep 0.25" in finding.rows[0]


def test_the_kept_sets_follow_the_quota_and_the_direction():
    scores, labels = np.array([[0.1], [0.2], [0.3], [0.4], [5.0], [4.0]]), np.array([0, 0, 0, 0, 1, 1])
    assert np.flatnonzero(rankings.kept(scores, labels, 0.5)).tolist() == [0, 1, 5]
    assert np.flatnonzero(rankings.kept(scores, labels, 0.1, low=False)).tolist() == [3, 4]


def test_stages_run_from_a_hundredth_to_all_steps_unless_they_are_given(make_config, tmp_path):
    assert drift.stages(make_config(tmp_path, distill__steps=1000)) == [10, 46, 215, 1000]
    assert drift.stages(make_config(tmp_path, distill__steps=1000, studies={"steps": 2})) == [1, 2]
    given = make_config(tmp_path, studies={"stability": {"steps": [7, 3]}})
    assert drift.stages(given) == [3, 7]


def test_a_stage_is_distilled_from_everything(make_config, tmp_path):
    _, values, labels = noisy()
    _, point_set = studied(
        make_config, tmp_path, {"": write_scores(tmp_path / "s", values, labels)}, runtime__rule="loss"
    )
    configs = [point_set.configured(point) for point in point_set.asked]
    assert {(c.select.keep, c.runtime.rule) for c in configs} == {(1.0, "none")}
    assert [c.distill.steps for c in configs] == [1, 2, 3]


def test_the_verdict_on_drift_looks_at_what_another_seed_changes():
    facts = {"steps": [1, 9], "with_static": [0.5, 0.4], "first_to_last": 0.55, "another_seed": 0.6}
    assert "hardly drifts beyond chance" in stability.drift_answer(facts)
    assert "so utility drifts" in stability.drift_answer({**facts, "another_seed": 0.9})


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    studies = {"seeds": 2, "stability": {"networks": ["mlp"], "steps": [1, 3]}}
    folder = tmp_path_factory.mktemp("stability")
    config = make_config(folder / "run", studies=studies, score__width=4, evaluate__epochs=5)
    point_set = PointSet(config, LocalRunner(), Display.silent())
    context = StudyContext(config, point_set, lambda line: None)
    return context, stability.study(context)


def test_the_whole_study_on_digits(whole):
    _, finding = whole
    assert set(finding.facts["network_agreement"]) == {"mlp"}
    assert finding.facts["drift"]["steps"] == [1, 3]
    assert all(-1 <= value <= 1 for value in finding.facts["drift"]["with_static"])
    assert {row["compared"] for row in finding.rows} == {"two trials", "epochs", "networks", "stages"}
    assert json.dumps([finding.facts, finding.rows])


def test_losses_are_those_of_the_samples_in_the_order_of_the_scores(whole):
    """Each sample alone has the loss that it has among the others."""
    context, _ = whole
    scores = rankings.Scores(context.points.shared({}) / "scores.parquet")
    outcome = context.points.run(drift.points(context))[-1]
    drawn = scores.draw(0)
    losses = drift.losses_of(context.config, outcome, drawn, 0)
    some = np.array([0, 40, len(drawn.rows) - 1])
    part = rankings.RankSample(drawn.rows[some], drawn.labels[some], drawn.places[some], drawn.of)
    assert np.allclose(drift.losses_of(context.config, outcome, part, 0), losses[some], rtol=1e-4)


def test_a_constant_criterion_does_not_change_the_other_pairs():
    vectors = np.stack([np.arange(20.0), np.arange(20.0)[::-1], np.zeros(20)], 1)
    mean, _ = rankings.correlations(vectors, np.repeat([0, 1], 10))
    assert mean[0, 1] == pytest.approx(-1)
    assert np.isnan(mean[0, 2])


def test_a_class_counts_for_the_pairs_that_it_can_rank():
    vectors = np.stack([np.arange(8.0), np.r_[np.zeros(4), 3, 2, 1, 0]], 1)
    assert rankings.correlations(vectors, np.repeat([0, 1], 4))[0][0, 1] == pytest.approx(-1)


def test_the_rank_correlation_is_within_classes():
    first = np.array([1, 2, 3, 4, 101, 102, 103, 104.0])
    mixed = np.array([1, 2, 3, 4, 104, 103, 102, 101.0])
    mean, std = rankings.correlations(np.stack([first, first**2, mixed], 1), np.repeat([0, 1], 4))
    assert (mean[0, 1], std[0, 1]) == pytest.approx((1.0, 0.0))
    assert (mean[0, 2], std[0, 2]) == pytest.approx((0.0, 1.0))

"""Criteria against their textbook formulas, the checkpoints they need, and what a criterion of your own must hold to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import nn

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline import validate
from distill_at_scale.pruning.criteria import CRITERIA, coreset
from distill_at_scale.pruning.criteria.factory import build_criteria, epochs_of, needed_epochs

ALL = list(CRITERIA)


@dataclass
class ArtificialOutputs:
    """Artificial ProxyOutputs."""

    logits: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor


def outputs_of(count=7, many=4, features=5):
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % many
    return ArtificialOutputs(
        torch.randn(count, many, generator=chance), labels, torch.randn(count, features, generator=chance)
    )


def make_criterion(name, **section):
    return build_criteria(ScoreSection(criterion=name, **section))[name]


# Criteria of single samples


def test_every_criterion_states_which_end_is_useful():
    assert {name: make_criterion(name).useful for name in ALL if make_criterion(name).useful != "low"} == {
        "margin": "high",
        "aum": "high",
        "cad": "high",
    }


def test_values_are_those_of_the_textbooks():
    outputs = outputs_of()
    for k in range(len(outputs.labels)):
        p, y = outputs.logits[k].softmax(0).numpy(), int(outputs.labels[k])
        error = p - np.eye(len(p))[y]
        expected = {
            "loss": -np.log(p[y]),
            "margin": p[y] - max(np.delete(p, y)),
            "aum": outputs.logits[k, y].item() - max(np.delete(outputs.logits[k].numpy(), y)),
            "entropy": -(p * np.log(p)).sum(),
            "el2n": np.linalg.norm(error),
            "el2n_late": np.linalg.norm(error),
            "cad": np.linalg.norm(error),
            "grand_last": np.linalg.norm(np.outer(error, [*outputs.features[k].tolist(), 1.0])),
            "forgetting": float(p.argmax() == y),
        }
        for name, value in expected.items():
            assert make_criterion(name).observe(outputs)[k].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    "name",
    ["loss", "loss_early", "loss_converged", "margin", "aum", "entropy", "el2n", "el2n_late", "grand", "grand_last"],
)
def test_a_score_is_the_mean_over_trials_and_epochs(name):
    values = np.random.default_rng(0).random((5, 3, 2), np.float32)
    assert make_criterion(name).aggregate(values) == pytest.approx(values.mean((1, 2)))


def test_forgetting_counts_from_right_to_wrong_and_what_is_never_learnt_most():
    trials = [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]
    counts = make_criterion("forgetting").aggregate(np.array(trials, np.float32)[:, None])
    assert counts.tolist() == [2, 0, 5, 0, 1]
    both = np.array([[trials[0], trials[1]]], np.float32)
    assert make_criterion("forgetting").aggregate(both).tolist() == [1]


def test_forgetting_is_refused_without_epochs_to_follow():
    with pytest.raises(UserError, match="two checkpoints or more"):
        make_criterion("forgetting", epochs=1)
    with pytest.raises(UserError, match="pretrained weights"):
        make_criterion("forgetting", weights="w.pth")


def test_only_checkpoints_that_some_criterion_reads_are_needed():
    section = ScoreSection(criterion=["loss_early", "loss_converged"], epochs=50)
    assert needed_epochs(build_criteria(section).values(), 50) == [0, 1, 2, 3, 4, 45, 46, 47, 48, 49]
    assert needed_epochs([make_criterion("density"), make_criterion("herding")], 50) == [49]
    assert needed_epochs([make_criterion("el2n", early=2)], 50) == [0, 1]
    assert epochs_of(make_criterion("loss"), 3) == [0, 1, 2]
    assert epochs_of(make_criterion("el2n_late", late=2), 5) == [3, 4]
    assert epochs_of(make_criterion("loss_converged", late=9), 3) == epochs_of(make_criterion("grand"), 3) == [0, 1, 2]


def test_names_of_scores_from_elsewhere_are_passed_over():
    section = ScoreSection(criterion=["random", "el2n", "monte_carlo", "theirs"], imported={"theirs": "x.json"})
    assert list(build_criteria(section)) == ["el2n"]
    with pytest.raises(UserError, match=r"'el2m' is unknown.*el2n"):
        build_criteria(ScoreSection(criterion="el2m"))


class Old:
    useful = "low"

    def observe(self, logits, labels):
        return logits[:, 0]

    def aggregate(self, values):
        return values.mean((1, 2))


class Flat(Old):
    def observe(self, seen):
        return seen.logits


def test_a_criterion_of_another_signature_is_refused():
    with pytest.raises(UserError, match=r"must be observe\(self, outputs\)"):
        build_criteria(ScoreSection(criterion="test_criteria:Old"))


class Needy(Flat):
    def __init__(self, number):
        self.number = number


class Upwards(Flat):
    useful = "upwards"


class TooFar(Flat):
    def epochs(self, count):
        return [count]


class Backwards(Flat):
    def epochs(self, count):
        return [1, 0]


class NoEpoch(Flat):
    def epochs(self, count):
        return []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Needy", "made without arguments"),
        ("Upwards", "useful is 'upwards'"),
        ("TooFar", r"asks for \[5\]"),
        ("Backwards", r"asks for \[1, 0\]"),
        ("NoEpoch", r"asks for \[\]"),
    ],
)
def test_a_plug_in_that_breaks_its_word_is_refused_before_anything_is_trained(name, message):
    with pytest.raises(UserError, match=message):
        build_criteria(ScoreSection(criterion=f"test_criteria:{name}"))


class entropy(Flat):
    pass


class label(Flat):
    pass


@pytest.mark.parametrize("criterion", [["entropy", "test_criteria:entropy"], ["test_criteria:label"]])
def test_a_plug_in_gets_no_column_that_is_there_already(tmp_path, criterion):
    with pytest.raises(UserError, match=r"would be the column .(entropy|label)."):
        validate.check_names(tiny_config(tmp_path / "run", score__criterion=criterion))


class NoLinear(nn.Module):
    """Ends with a convolution."""

    def __init__(self, spec):
        super().__init__()
        self.layer = nn.Conv2d(spec.shape[0], spec.classes, spec.shape[1])

    def forward(self, images):
        return self.layer(images).flatten(1)


def test_a_network_without_a_linear_end_is_refused_before_anything_is_trained(make_run, tmp_path):
    run = make_run(tmp_path / "run", score__criterion="density", score__network="test_criteria:NoLinear")
    with pytest.raises(UserError, match=r"score\.network = 'test_criteria:NoLinear' ends with no linear layer"):
        run.stages("ingest", "score")
    assert "proxies" not in run.text


def test_one_class_is_refused_before_anything_is_trained_by_criteria_that_compare_classes(make_run, tmp_path):
    run = make_run(tmp_path / "run", data__classes=["0"], score__criterion=["herding", "aum"], score__epochs=4)
    with pytest.raises(UserError, match=r"score\.criterion = 'aum' needs 2 classes or more, and the data have 1; set"):
        run.stages("ingest", "score")
    assert "proxies" not in run.text
    for command in (run.pipeline.validate, run.pipeline.forecast):
        with pytest.raises(UserError, match=r"'aum' needs 2 classes"):
            command()
    refused, data = set(), PreparedDataset(run.dir / "prepared")
    for name in (*ALL, "monte_carlo"):
        try:
            validate.check_scoring(tiny_config(tmp_path, score__criterion=name, score__epochs=4), data)
        except UserError:
            refused.add(name)
    assert refused == {*ALL, "monte_carlo"} - {"density", "herding", "k_center", "clusters"}
    outputs = outputs_of(many=1)
    for name in refused - {"monte_carlo", "grand"}:
        assert len(make_criterion(name).observe(outputs).unique()) == 1, f"{name} tells samples of one class apart"


# Criteria of classes


@pytest.fixture
def points():
    return np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32) + 50


@pytest.mark.parametrize("count", [1, 3, 39, 100])
def test_density_is_the_mean_distance_to_the_nearest_neighbours(points, count):
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, 1:]
    assert coreset.neighbour_distances(points, count) == pytest.approx(distances[:, :count].mean(1), rel=1e-5)


def test_distances_of_copies_are_nothing_and_a_sample_alone_has_no_neighbour(points):
    assert coreset.neighbour_distances(np.repeat(points, 2, 0), 1).tolist() == [0.0] * 80
    assert coreset.neighbour_distances(points[:1], 5).tolist() == [0.0]


def order_of(ranks):
    assert sorted(ranks.tolist()) == list(range(len(ranks)))
    return np.argsort(ranks).tolist()


@pytest.mark.parametrize("kept", [2**26, 0], ids=["products kept", "products recomputed"])
def test_herding_picks_what_takes_the_mean_nearest_to_that_of_the_class(points, monkeypatch, kept):
    monkeypatch.setattr(coreset, "HELD_PRODUCTS", kept)
    picked, mean = [], points.mean(0, dtype=np.float64)
    for _ in points:
        left = [k for k in range(len(points)) if k not in picked]
        picked.append(min(left, key=lambda k: np.linalg.norm(mean - points[[*picked, k]].mean(0, dtype=np.float64))))
    assert order_of(coreset.herding_ranks(points)) == picked


@pytest.mark.parametrize("kept", [2**26, 0], ids=["products kept", "products recomputed"])
def test_k_center_begins_at_the_mean_and_picks_the_farthest(points, monkeypatch, kept):
    monkeypatch.setattr(coreset, "HELD_PRODUCTS", kept)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    picked = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    while len(picked) < len(points):
        left = [k for k in range(len(points)) if k not in picked]
        picked.append(max(left, key=lambda k: distances[k, picked].min()))
    assert order_of(coreset.k_center_ranks(points)) == picked


def test_equal_samples_are_picked_in_the_order_of_their_ids():
    same = np.ones((4, 3), np.float32)
    assert order_of(coreset.herding_ranks(same)) == order_of(coreset.k_center_ranks(same)) == [0, 1, 2, 3]


def test_trials_count_alike_in_density_and_side_by_side_in_selectors(points):
    features = np.stack([points, points[::-1]], 1)  # [n, trials, features]
    density = make_criterion("density", neighbours=3)
    values = density.observe_class(features)
    assert values[:, 0].tolist() == coreset.neighbour_distances(points, 3).tolist() == values[::-1, 1].tolist()
    assert density.aggregate(values[:, :, None]) == pytest.approx(values.mean(1))
    joint = coreset.herding_ranks(np.concatenate([points, points[::-1]], 1))
    assert make_criterion("herding").observe_class(features)[:, 0].tolist() == joint.tolist()

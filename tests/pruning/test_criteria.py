"""Criteria against their textbook formulas, the checkpoints they need, and one scoring pass for all of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, write_prepared
from torch import nn

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pruning.criteria import CRITERIA, coreset
from distill_at_scale.pruning.criteria.factory import build_criteria, epochs_of, needed_epochs
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.classifier import random_projection
from distill_at_scale.pruning.scoring.columns import by_class, lists_to_matrix
from distill_at_scale.pruning.scoring.gradient_norms import GradientNorms
from distill_at_scale.pruning.scoring.reliability import MAX_CLASSES, MAX_SAMPLES, TrialAgreement
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path

CPU = torch.device("cpu")
ALL = list(CRITERIA)
SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=4)


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


class Summed:
    useful = "low"
    by_trial = True

    def observe_class(self, features):
        return features.sum((1, 2))

    def aggregate(self, values):
        return values[:, 0, 0]


def test_a_class_criterion_of_another_shape_is_refused(proxies, tmp_path):
    with pytest.raises(UserError, match=r"test_criteria:Summed returns values of shape .* must return \[samples, \d\]"):
        scored(proxies, tmp_path / "a", ["test_criteria:Summed"])


# Gradients and features of a network


def by_autograd(network, image, label):
    loss = F.cross_entropy(network(image[None]), label[None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]).norm().item()


def test_gradient_norms_are_those_of_each_sample_alone():
    network, chance = SPEC.build(0).eval(), torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 1, 8, 8, generator=chance), torch.arange(5) % 3
    expected = [by_autograd(network, image, label) for image, label in zip(images, labels, strict=True)]
    norms = GradientNorms(SPEC, network)
    with torch.no_grad():
        assert norms(images, labels).tolist() == pytest.approx(expected, rel=1e-4)


def test_gradient_norms_in_padded_parts_are_the_same(monkeypatch):
    network, chance = SPEC.build(0).eval(), torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 1, 8, 8, generator=chance), torch.arange(5) % 3
    norms = GradientNorms(SPEC, network)
    monkeypatch.setattr("distill_at_scale.pruning.scoring.gradient_norms.BYTES", 2 * norms.bytes_per_sample)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    actual = norms._in_parts(lambda image, label: norms._norm(None)(weights, image, label), images, labels)
    assert actual.tolist() == pytest.approx(norms(images, labels).tolist(), rel=1e-4)


def test_the_gradient_looks_at_the_classes_of_the_data_alone():
    network = replace(SPEC, classes=4).build(0).eval()
    images, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    table = GradientNorms(replace(SPEC, classes=4), network)
    loss = F.cross_entropy(network(images[:1])[:, [3, 1]], labels[:1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    assert table(images, labels, [3, 1])[0].item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_a_projection_keeps_distances_and_leaves_few_dimensions_alone():
    features = torch.randn(20, 2000, generator=torch.Generator().manual_seed(0))
    small = random_projection(features, 500)
    assert small.shape == (20, 500)
    assert (torch.pdist(small) / torch.pdist(features) - 1).abs().max() < 0.2
    assert torch.equal(small, random_projection(features, 500))
    assert random_projection(small, 500) is small


class NoLinear(nn.Module):
    """Ends with a convolution."""

    def __init__(self, spec):
        super().__init__()
        self.layer = nn.Conv2d(spec.shape[0], spec.classes, spec.shape[1])

    def forward(self, images):
        return self.layer(images).flatten(1)


class Bare(nn.Module):
    """Ends with a linear layer, but has no `embed`."""

    def __init__(self, spec):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, spec.classes))

    def forward(self, images):
        return self.layers(images)


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


@pytest.mark.parametrize("ends", [[], [1], [3, 7], range(1, 12)])
def test_rows_are_regrouped_class_by_class(ends):
    labels = pa.array([0, 0, 0, 1, 3, 3, 3, 3, 3, 3, 4, 4], pa.int32())
    table = pa.table({"label": labels, "row": list(range(12))})
    parts = [(Path("p"), table.slice(a, b - a)) for a, b in itertools.pairwise([0, *ends, 12])]
    parts_read = [part["row"].to_pylist() for _, part in by_class([(Path("p"), table.slice(0, 0)), *parts])]
    assert parts_read == [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9], [10, 11]]


# Agreement of trials


def agreement(values, labels, part=7):
    agreement = TrialAgreement(lambda v: v.mean((1, 2)))
    for start in range(0, len(labels), part):
        agreement.add(labels[start : start + part], values[start : start + part])
    return agreement


def test_agreement_is_the_rank_correlation_within_classes():
    chance = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    truth, noise = chance.standard_normal((1000, 1, 1)), chance.standard_normal((1000, 4, 1))
    same = np.repeat(truth + 100 * labels[:, None, None], 4, 1)
    assert agreement(same, labels).facts() == {"classes": 2, "trials": 1.0, "all": 1.0}
    facts = agreement(truth + noise + 100 * labels[:, None, None], labels).facts()
    assert facts["trials"] == pytest.approx(0.48, abs=0.05)  # Pearson's would be 0.5
    assert facts["all"] == pytest.approx(0.79, abs=0.04)  # and 0.8
    assert agreement(noise[:, :1], labels).facts() is None
    assert agreement(noise[:0], labels[:0]).facts() is None
    assert agreement(np.ones((1000, 4, 1)), labels).facts() is None


def test_agreement_holds_some_samples_of_some_classes_spread_evenly():
    labels = np.repeat(np.arange(3 * MAX_CLASSES), 2)
    result = agreement(np.zeros((len(labels), 2, 1)), labels, 100)
    assert list(result.held) == list(range(0, 3 * MAX_CLASSES, 4))
    many = agreement(np.zeros((MAX_SAMPLES + 100, 2, 1)), np.zeros(MAX_SAMPLES + 100, int), 1000)
    assert sum(map(len, many.held[0])) == MAX_SAMPLES


# One pass for all


@pytest.fixture(autouse=True)
def parts_of_ten(monkeypatch):
    """The tiny network would take thousands of images at once, nearly all of them padding."""
    monkeypatch.setattr(NetworkSpec, "microbatch", lambda spec, device: 10)


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """Prepared samples, and checkpoints of two trials of three epochs."""
    folder, chance = tmp_path_factory.mktemp("criteria"), np.random.default_rng(0)
    labels = np.arange(70) % 3
    write_prepared(folder / "prepared", chance.integers(0, 256, (70, 1, 8, 8), np.uint8), labels)
    for trial in range(2):
        section = ScoreSection(epochs=3, batch=16, lr=0.1, width=4)
        proxy.ProxyTrial(PreparedDataset(folder / "prepared"), section, trial, 0, folder / "proxies", CPU).run()
    return folder


def scored(folder, target, names, shares=1, step=1, extra=None, **section):
    """The score table of some criteria, computed by `shares` scorers."""
    keys = {"criterion": names, "epochs": 3, "width": 4, "cad_windows": 1, **section}
    config = tiny_config(target, **{f"score__{key}": value for key, value in keys.items()})
    prepared, pieces = PreparedDataset(folder / "prepared"), target / "pieces"
    pieces.mkdir(parents=True)
    chunks = prepared.chunks()
    with threads(1):
        for share in range(shares):
            work = [(chunk, score_part_path(pieces, chunk)) for chunk in chunks[share::shares][::step]]
            list(Scorer(config, folder / "prepared", folder / "proxies", CPU).score(work))
    expected = [prepared.read(c, columns=["sample_id"])["sample_id"].combine_chunks() for c in chunks]
    score_table.write_scores(
        target / "scores.parquet", [score_part_path(pieces, c) for c in chunks], expected, config, extra
    )
    return target / "scores.parquet"


def test_all_criteria_give_the_same_bytes_for_any_number_and_order_of_scorers(proxies, tmp_path):
    ways = {"one": (1, 1), "reversed": (1, -1), "three": (3, 1), "four": (4, -1)}
    contents = {scored(proxies, tmp_path / name, ALL, *way).read_bytes() for name, way in ways.items()}
    assert len(contents) == 1


def test_criteria_together_have_the_scores_that_each_has_alone(proxies, tmp_path):
    together, facts = score_table.read(scored(proxies, tmp_path / "all", ALL))
    assert facts["criteria"] == ALL
    assert facts["useful"] == {name: make_criterion(name).useful for name in ALL}
    assert (facts["observed"]["loss_early"], facts["observed"]["density"]) == ([0, 1, 2], [2])
    assert together["score"].to_pylist() == together["loss"].to_pylist()
    without = {"herding", "k_center", "clusters"}
    assert {name.removesuffix("_values") for name in together.column_names if name.endswith("_values")} == set(
        ALL
    ) - without
    for name in ALL:
        alone, _ = score_table.read(scored(proxies, tmp_path / name, name))
        assert together[name].to_numpy() == pytest.approx(alone["score"].to_numpy(), rel=1e-5), name
        assert together[name].to_numpy().std() > 0, name
    assert lists_to_matrix(together["density_values"]).shape == (70, 2)


def test_features_are_what_the_last_layer_sees(proxies, tmp_path):
    """Density of the last epoch against the features of each network, computed one by one."""
    table, _ = score_table.read(scored(proxies, tmp_path / "run", "density", neighbours=4))
    pixels, labels = PreparedDataset(proxies / "prepared").load("train")
    images = (torch.from_numpy(pixels) / 255 - 0.5) / 0.25
    expected = np.zeros(70)
    for trial in range(2):
        network = proxy.load_proxy(SPEC, proxy.checkpoint_path(proxies / "proxies", trial, 2), CPU)
        features = network.embed(images).numpy()
        for label in range(3):
            mine = labels == label
            expected[mine] += coreset.neighbour_distances(features[mine], 4) / 2
    assert table["density"].to_numpy() == pytest.approx(expected, rel=1e-4)


def test_checkpoints_that_no_criterion_uses_are_not_read(proxies, tmp_path):
    (tmp_path / "prepared").symlink_to(proxies / "prepared")
    for trial in range(2):
        target = proxy.checkpoint_path(tmp_path / "proxies", trial, 0)
        target.parent.mkdir(parents=True)
        target.symlink_to(proxy.checkpoint_path(proxies / "proxies", trial, 0))
    table, facts = score_table.read(scored(tmp_path, tmp_path / "a", "el2n", early=1))
    assert lists_to_matrix(table["el2n_values"]).shape == (70, 2)
    assert facts["observed"] == {"el2n": [0]}


def test_values_of_another_shape_are_refused(proxies, tmp_path):
    with pytest.raises(UserError, match=r"Flat returns values of shape \(16, 3\) for 16 samples"):
        scored(proxies, tmp_path, "test_criteria:Flat")


class Lengths:
    """An extra column."""

    useful = "high"

    def __init__(self):
        self.facts = {}

    def values(self, ids):
        return np.array([int(name[-2:]) for name in ids.to_pylist()], np.float32)


def test_extra_columns_are_in_the_configured_order(proxies, tmp_path):
    theirs = {"imported": {"theirs": "x.json"}, "extra": {"theirs": Lengths(), "extra": Lengths()}}
    table, facts = score_table.read(scored(proxies, tmp_path / "a", ["theirs", "herding"], **theirs))
    assert table.column_names[:6] == ["sample_id", "label", "theirs", "herding", "extra", "score"]
    assert table["theirs"].to_pylist() == table["score"].to_pylist() == list(range(70))
    assert facts["useful"] == {"theirs": "high", "herding": "low", "extra": "high"}
    assert facts["agreement"] is None


def test_a_network_that_says_nothing_of_features_shows_them_before_its_last_layer(proxies):
    from distill_at_scale.pruning.scoring.classifier import Classifier

    spec = NetworkSpec("test_criteria:Bare", (1, 8, 8), 3)
    classifier = Classifier(spec, CPU, spec.memory_format("score", CPU, False))
    classifier.std.fill_(1)
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    features = classifier.with_features(pixels)
    layers = classifier.network.layers
    assert torch.equal(features[:, :3], classifier(pixels))
    assert torch.equal(features[:, 3:], layers[:3](pixels.float() / 255))


def test_features_that_are_not_finite_name_their_sample(tmp_path):
    features = pa.FixedSizeListArray.from_arrays(pa.array([0, 1, 2, np.nan, 4, 5, 6, 7], pa.float32()), 4)
    rows = pa.table({"sample_id": ["a", "b"], "label": pa.array([0, 0], pa.int32()), "features": features})
    pq.write_table(rows, tmp_path / "piece")
    config = tiny_config(tmp_path, score__criterion="herding")
    with pytest.raises(UserError, match="the features of 'a' are not finite"):
        score_table.write_scores(tmp_path / "scores.parquet", [tmp_path / "piece"], [pa.array(["a", "b"])], config)


def test_random_alone_needs_no_proxies_and_every_stage_after_it_runs(make_run, tmp_path):
    run = make_run(tmp_path / "run", score__criterion="random", evaluate__seeds=1)
    run.stages("ingest", "score", "select", "distill", "evaluate", "report")
    assert not (run.dir / "proxies").exists()
    table, facts = score_table.read(run.dir / "scores.parquet")
    assert table.column_names == ["sample_id", "label", "score"]
    assert set(table["score"].to_pylist()) == {0.0}
    assert (facts["useful"], facts["agreement"], facts["trials"]) == ({}, None, 0)
    assert table["sample_id"].to_pylist() == PreparedDataset(run.dir / "prepared").index()[0]
    kept = pq.read_table(run.dir / "manifest.parquet")
    assert 0 < kept["kept"].to_pylist().count(True) < kept.num_rows
    assert (run.dir / "report.html").is_file()


def test_any_criterion_may_decide_the_selection(make_run, tmp_path):
    run = make_run(tmp_path / "run", score__criterion=["loss", "margin", "herding"], select__criterion="margin")
    run.stages("ingest", "score", "select")
    rows = pq.read_table(run.dir / "manifest.parquet").to_pylist()
    for label in range(3):
        kept, dropped = ([r["score"] for r in rows if r["label"] == label and r["kept"] is k] for k in (True, False))
        assert min(kept) >= max(dropped)
    validate.check_scoring(run.config, PreparedDataset(run.dir / "prepared"))

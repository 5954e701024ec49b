"""One scoring pass for all criteria: their columns, what it reads, and values and features that it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config, write_prepared
from torch import nn

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pruning.criteria import CRITERIA, coreset
from distill_at_scale.pruning.criteria.factory import build_criteria
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import by_class, lists_to_matrix
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path

CPU = torch.device("cpu")
ALL = list(CRITERIA)
SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=4)


def make_criterion(name, **section):
    return build_criteria(ScoreSection(criterion=name, **section))[name]


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


@pytest.mark.parametrize("ends", [[], [1], [3, 7], range(1, 12)])
def test_rows_are_regrouped_class_by_class(ends):
    labels = pa.array([0, 0, 0, 1, 3, 3, 3, 3, 3, 3, 4, 4], pa.int32())
    table = pa.table({"label": labels, "row": list(range(12))})
    parts = [(Path("p"), table.slice(a, b - a)) for a, b in itertools.pairwise([0, *ends, 12])]
    parts_read = [part["row"].to_pylist() for _, part in by_class([(Path("p"), table.slice(0, 0)), *parts])]
    assert parts_read == [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9], [10, 11]]


def test_values_of_another_shape_are_refused(proxies, tmp_path):
    with pytest.raises(UserError, match=r"Flat returns values of shape \(16, 3\) for 16 samples"):
        scored(proxies, tmp_path, "test_criteria:Flat")


class Summed:
    useful = "low"
    by_trial = True

    def observe_class(self, features):
        return features.sum((1, 2))

    def aggregate(self, values):
        return values[:, 0, 0]


def test_a_class_criterion_of_another_shape_is_refused(proxies, tmp_path):
    with pytest.raises(
        UserError, match=r"test_scoring_pass:Summed returns values of shape .* must return \[samples, \d\]"
    ):
        scored(proxies, tmp_path / "a", ["test_scoring_pass:Summed"])


def test_features_that_are_not_finite_name_their_sample(tmp_path):
    features = pa.FixedSizeListArray.from_arrays(pa.array([0, 1, 2, np.nan, 4, 5, 6, 7], pa.float32()), 4)
    rows = pa.table({"sample_id": ["a", "b"], "label": pa.array([0, 0], pa.int32()), "features": features})
    pq.write_table(rows, tmp_path / "piece")
    config = tiny_config(tmp_path, score__criterion="herding")
    with pytest.raises(UserError, match="the features of 'a' are not finite"):
        score_table.write_scores(tmp_path / "scores.parquet", [tmp_path / "piece"], [pa.array(["a", "b"])], config)


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


class Bare(nn.Module):
    """Ends with a linear layer, but has no `embed`."""

    def __init__(self, spec):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, spec.classes))

    def forward(self, images):
        return self.layers(images)


def test_a_network_that_says_nothing_of_features_shows_them_before_its_last_layer(proxies):
    from distill_at_scale.pruning.scoring.classifier import Classifier

    spec = NetworkSpec("test_scoring_pass:Bare", (1, 8, 8), 3)
    classifier = Classifier(spec, CPU, spec.memory_format("score", CPU, False))
    classifier.std.fill_(1)
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    features = classifier.with_features(pixels)
    layers = classifier.network.layers
    assert torch.equal(features[:, :3], classifier(pixels))
    assert torch.equal(features[:, 3:], layers[:3](pixels.float() / 255))


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

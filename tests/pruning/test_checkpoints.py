"""Checkpoints within an epoch: what they hold, where training stops, how it resumes; and cad, which needs them."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_scoring import CPU, SPEC, files, train, trial_of

from distill_at_scale.config.load import load, validate
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline.stages import score
from distill_at_scale.pruning.criteria.factory import build_criteria, epochs_of
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.columns import lists_to_matrix


def weights(folder, number):
    return proxy.load_proxy(SPEC, proxy.checkpoint_path(folder, 1, number), CPU).state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# Training


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_more_checkpoints_do_not_change_the_training(tmp_path, momentum):
    keys = {"batch": 8, "shards": 1, "momentum": momentum}  # 5 batches per epoch
    train(tmp_path / "one", **keys)
    train(tmp_path / "many", checkpoints_per_epoch=5, **keys)
    assert len(files(tmp_path / "many")) == 15
    for epoch in range(3):
        assert same(weights(tmp_path / "one", epoch), weights(tmp_path / "many", 5 * epoch + 4))


def test_parts_of_an_epoch_are_as_equal_as_its_batches_allow(tmp_path):
    steps, at, keys = [], [], {"batch": 8, "shards": 1, "epochs": 2, "checkpoints_per_epoch": 3}
    train(tmp_path, progressed=steps.append, saved=lambda: at.append(len(steps)), **keys)
    assert at == [1, 3, 5, 6, 8, 10]  # of five batches: 1, 2, 2
    assert steps == [8 * k for k in range(1, 11)]


def test_training_stops_after_a_part_of_an_epoch(tmp_path):
    seen = []
    train(tmp_path / "whole", batch=8, epochs=1, checkpoints_per_epoch=5)
    train(tmp_path / "part", batch=8, epochs=0.6, checkpoints_per_epoch=5, progressed=seen.append)
    assert seen == [8, 16, 24]
    whole, part = files(tmp_path / "whole"), files(tmp_path / "part")
    assert len(part) == 3
    assert part.items() <= whole.items()
    section = ScoreSection(trials=2, batch=8, epochs=0.6, checkpoints_per_epoch=5)
    assert section.checkpoint_counts == (2, 3)
    assert proxy.finished_samples(section, tmp_path / "part", 40) == proxy.trained_samples(section, 40, 3) == 24


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_training_resumes_within_an_epoch_with_the_same_bytes(tmp_path, stop_after):
    keys = {"batch": 8, "epochs": 1.5, "checkpoints_per_epoch": 4, "momentum": 0.9, "shards": 2}

    def stop(left=iter(range(stop_after - 1))):
        if next(left, None) is None:
            raise KeyboardInterrupt

    train(tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", saved=stop, **keys)
    assert len(files(tmp_path / "parts")) == stop_after
    train(tmp_path / "parts", **keys)
    assert len(files(tmp_path / "parts")) == 6
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_more_checkpoints_than_batches_are_refused_before_training(tmp_path):
    trial = trial_of(tmp_path, batch=8, checkpoints_per_epoch=5)  # with two shards some epochs have four batches
    with pytest.raises(
        UserError, match=r"checkpoints_per_epoch = 5, but an epoch has 4 batches; lower it, or score.batch"
    ):
        proxy.check_training(trial.prepared, trial.config, 0)
    with pytest.raises(
        UserError, match=r"checkpoints_per_epoch = 5, but an epoch has 4 batches; lower it, or score.batch"
    ):
        trial.run()
    proxy.check_training(trial.prepared, trial.config.model_copy(update={"checkpoints_per_epoch": 4}), 0)


@pytest.mark.parametrize(("epochs", "parts"), [(0.5, 1), (1.5, 1), (0.25, 2), (0.01, 10), (0.65, 10)])
def test_training_ends_at_a_checkpoint(epochs, parts):
    with pytest.raises(UserError, match=r"ends between two checkpoints.*set score\.checkpoints_per_epoch"):
        validate({"score": {"epochs": epochs, "checkpoints_per_epoch": parts}})


class NoRun:
    def content(self, stage):
        return stage

    def record(self, stage):
        return None


def test_whole_epochs_are_the_same_number_however_they_are_written():
    def fingerprint(section):
        return score.inputs(validate({"score": section}), NoRun()).fingerprint

    assert fingerprint({"epochs": 3}) == fingerprint({"epochs": 3.0, "checkpoints_per_epoch": 1})
    assert len({fingerprint({"epochs": 3, "checkpoints_per_epoch": parts}) for parts in (1, 2)}) == 2
    for count in range(1, 100):  # products of decimals are not exact
        assert ScoreSection(epochs=count / 100, checkpoints_per_epoch=100).checkpoint_counts == (5, count)


# The criterion cad


def by_the_formula(values, length, windows):
    """values [n, trials, K]: EL2N after each checkpoint."""
    count, result = values.shape[2], []
    for sample in values.tolist():
        deviations = [
            statistics.stdev(trial[k : k + length])
            for trial in sample
            for k in range(count - length - windows, count - length)
        ]
        result.append(sum(deviations) / len(deviations))
    return result


@pytest.mark.parametrize(
    ("count", "windows", "length"), [(6, 2, None), (10, 2, None), (3, 1, None), (10, 3, 4), (10, 1, 9), (7, 5, 2)]
)
def test_cad_is_the_mean_deviation_over_the_last_windows(count, windows, length):
    section = ScoreSection(criterion="cad", epochs=count, cad_windows=windows, cad_length=length)
    criterion, values = build_criteria(section)["cad"], np.random.default_rng(0).random((5, 3, count), np.float32)
    needed, length = epochs_of(criterion, count), length or count - windows
    assert needed == list(range(count - length - windows, count - 1))
    assert criterion.aggregate(values[:, :, needed]) == pytest.approx(by_the_formula(values, length, windows), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "least"),
    [
        ({"epochs": 3}, 4),
        ({"epochs": 0.3, "checkpoints_per_epoch": 10}, 4),
        ({"epochs": 5, "cad_windows": 4}, 6),
        ({"epochs": 5, "cad_length": 4}, 6),
    ],
)
def test_cad_needs_enough_checkpoints(section, least):
    message = f"'cad' needs {least} checkpoints or more per proxy.*raise score.checkpoints_per_epoch"
    with pytest.raises(UserError, match=message):
        build_criteria(ScoreSection(criterion="cad", **section))
    with pytest.raises(UserError, match="pretrained weights do not have"):
        build_criteria(ScoreSection(criterion="cad", weights="x.pt"))


def test_the_preset_is_the_recipe_of_students(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("score: {criterion: loss, epochs: 4, lr: 0.1}", encoding="utf-8")
    section = load(file, ["score.preset=cad", "score.epochs=0.8"]).score
    assert (section.criteria, section.checkpoint_counts) == (["cad"], (5, 8))
    assert (section.lr, section.momentum, section.weight_decay) == (0.01, 0.9, 5e-4)


def test_a_run_selects_by_the_cad_of_its_proxies(make_run, tmp_path):
    keys = {"score__batch": 16, "score__epochs": 0.8, "score__checkpoints_per_epoch": 5, "score__lr": 0.1}
    run = make_run(tmp_path / "run", score__criterion=["cad", "el2n"], score__early=9, select__keep=0.1, **keys)
    run.stages("ingest", "score", "select", "distill")
    data = PreparedDataset(run.dir / "prepared")
    pixels, labels = data.load("train")
    images = torch.from_numpy(pixels).float() / 255
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    spec, errors = proxy.network_spec(run.config.score, data.shape, 3, data.kind), np.zeros((len(labels), 2, 4))
    for trial, number in itertools.product(range(2), range(4)):
        network = proxy.load_proxy(spec, proxy.checkpoint_path(run.dir / "proxies", trial, number), CPU)
        p = network((images - mean) / std).softmax(1).numpy()
        errors[:, trial, number] = np.linalg.norm(p - np.eye(3)[labels], axis=1)
    table = pq.read_table(run.dir / "scores.parquet")
    assert lists_to_matrix(table["el2n_values"]).reshape(errors.shape) == pytest.approx(errors, abs=1e-5)
    assert table["cad"].to_numpy() == pytest.approx(by_the_formula(errors, 2, 2), abs=1e-5)
    manifest = pq.read_table(run.dir / "manifest.parquet").to_pylist()
    for label in range(3):
        kept, dropped = (
            [r["score"] for r in manifest if r["label"] == label and r["kept"] is k] for k in (True, False)
        )
        assert min(kept) >= max(dropped)

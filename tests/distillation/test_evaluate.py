"""Evaluation: the jobs, the training protocol, the random control, and the summary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FixedNetwork
from torch import nn

from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.manifest import kept
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import evaluate
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.spec import NetworkSpec

CPU = torch.device("cpu")
SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=4)


@pytest.fixture
def evaluator(digits_run, make_config):
    def build(**overrides):
        run = digits_run.dir
        return Evaluator(
            make_config(run, **overrides), run / "prepared", run / "synthetic", run / "manifest.parquet", CPU
        )

    return build


def test_there_is_a_job_for_every_set_network_and_seed(make_config):
    jobs = evaluate.jobs(
        make_config("x", evaluate__networks=["convnet", "vgg11"], evaluate__seeds=3, evaluate__bounds=["full"])
    )
    assert len(jobs) == len(set(jobs)) == 3 * 2 * 3
    assert {job.set for job in jobs} == {"distilled", "random_real", "full"}
    assert EvaluationJob("random_real", "vgg11", 2) in jobs


def test_a_row_has_fractions_and_the_same_job_gives_the_same_row(evaluator):
    for name in ("distilled", "random_real", "kept", "full"):
        rows = [evaluator(evaluate__bound_epochs=1).run(EvaluationJob(name, "convnet", 1)) for _ in range(2)]
        assert {k: rows[0][k] for k in ("set", "network", "seed")} == {"set": name, "network": "convnet", "seed": 1}
        assert 0 <= rows[0]["top1"] <= rows[0]["top5"] == 1.0  # five guesses of three classes
        assert rows[0]["top1"] == rows[1]["top1"]


def test_each_job_trains_on_its_set(evaluator, digits_run):
    run, built = PreparedDataset(digits_run.dir / "prepared"), evaluator()
    sizes = {
        name: len(built._training_set(EvaluationJob(name, "convnet", 0), built.synthetic).labels)
        for name in ("distilled", "random_real", "kept", "full")
    }
    assert sizes == {
        "distilled": 3,
        "random_real": 3,
        "kept": len(kept(digits_run.dir / "manifest.parquet")),
        "full": sum(run.counts()),
    }


def test_training_on_more_data_helps(evaluator):
    """The bound learns the digits; a network that saw nothing does not."""
    row = evaluator(evaluate__bound_epochs=15).run(EvaluationJob("full", "convnet", 0))
    assert row["top1"] > 0.7


def test_the_random_control_draws_other_samples_for_every_seed(digits_run):
    prepared = PreparedDataset(digits_run.dir / "prepared")
    first, same, other = (evaluate.random_real(prepared, 4, 0, draw) for draw in (0, 0, 1))
    assert first[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(first[0], same[0])
    assert not np.array_equal(first[0], other[0])
    everything, labels = prepared.load("train")
    for image, label in zip(*first, strict=True):
        assert any(np.array_equal(image, candidate) for candidate in everything[labels == label])
    assert len({image.tobytes() for image in first[0]}) == 12


def test_the_random_control_takes_all_of_a_small_class(digits_run):
    prepared = PreparedDataset(digits_run.dir / "prepared")
    pixels, labels = evaluate.random_real(prepared, 10_000, 0, 0)
    assert np.array_equal(pixels, prepared.load("train")[0])
    assert np.bincount(labels).tolist() == prepared.counts()


def learning_rates(monkeypatch, epochs, batch=256):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, *arguments):
            rates.append(
                (self.param_groups[0]["lr"], self.param_groups[0]["momentum"], self.param_groups[0]["weight_decay"])
            )
            return super().step(*arguments)

    monkeypatch.setattr(students.torch.optim, "SGD", Watched)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    students.train(SPEC, TrainingSet(images, labels), TrainingProtocol(epochs, batch=batch), 0, CPU)
    return rates


@pytest.mark.parametrize("epochs", [4, 10, 11])
def test_the_rate_falls_to_a_tenth_at_half_time(monkeypatch, epochs):
    rates = learning_rates(monkeypatch, epochs)
    assert len(rates) == epochs
    assert {(m, w) for _, m, w in rates} == {(0.9, 5e-4)}
    high = [lr for lr, _, _ in rates if lr == 0.01]
    assert [lr for lr, _, _ in rates] == pytest.approx([0.01] * len(high) + [0.001] * (epochs - len(high)))
    assert abs(len(high) - epochs / 2) <= 1


def test_an_epoch_sees_every_image_in_batches(monkeypatch):
    assert len(learning_rates(monkeypatch, 2, batch=4)) == 2 * 2


def test_training_on_one_batch_is_plain_sgd():
    spec = FixedNetwork(SPEC)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    trained = students.train(spec, TrainingSet(images, labels), TrainingProtocol(3, lr=0.05), 0, CPU)
    network = spec.build(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for epoch in range(3):
        if epoch == 2:
            optimizer.param_groups[0]["lr"] = 0.005
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for a, b in zip(trained.parameters(), network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_bytes_are_normalised_on_the_way():
    norm, chance = Normalization((0.4,), (0.2,)), torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=chance), torch.arange(6) % 3
    a = students.train(SPEC, TrainingSet(pixels, labels, norm), TrainingProtocol(2), 0, CPU)
    b = students.train(SPEC, TrainingSet(norm.apply(pixels), labels), TrainingProtocol(2), 0, CPU)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_accuracy_is_counted_over_the_whole_split(at_once):
    class Known(nn.Module):
        """Ranks the classes 6, 5, 4, ... for a picture of grey level 6, and so on round the clock of seven."""

        def forward(self, images):
            level = images.flatten(1)[:, :1] * 255
            return -((level - torch.arange(7)) % 7)

    pixels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 2, 3, 0, 0])  # the level itself thrice; then 1, 1, 5 and 6 places down
    result = students.test(Known(), pixels, labels, Normalization((0.0,), (1.0,)), CPU, at_once)
    assert (result.top1, result.top5) == (3 / 7, 5 / 7)


def test_without_a_test_split_the_message_says_what_to_do(make_run, tmp_path):
    run = make_run(tmp_path / "run", data__holdout=None).stages("ingest", "score", "select", "distill")
    with pytest.raises(UserError, match=r"no test split.*data\.holdout=0\.2"):
        run.stages("evaluate")


def test_training_that_diverges_names_the_job(evaluator):
    with pytest.raises(DistillationDiverged, match=r"distilled.*convnet.*learning rate of 1e\+30; lower evaluate\.lr"):
        evaluator(evaluate__lr=1e30).run(EvaluationJob("distilled", "convnet", 0))

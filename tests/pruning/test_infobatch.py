"""InfoBatch: which samples an epoch trains on, what their losses count, and what is remembered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_at_scale.pruning.infobatch import EASY, InfoBatch, expected_share

CPU = torch.device("cpu")


def a_rule(drop: float = 0.5, samples: int = 200, epochs: int = 8, seed: int = 0) -> InfoBatch:
    return InfoBatch(drop, samples, epochs, seed, CPU)


def test_the_expected_gradient_of_an_epoch_is_that_of_all_samples():
    chance = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, 5, generator=chance), torch.randint(4, (60,), generator=chance)
    weight = torch.randn(4, 5, generator=chance).requires_grad_()
    [full] = torch.autograd.grad(F.cross_entropy(inputs @ weight.T, labels, reduction="sum"), weight)
    losses = F.cross_entropy(inputs @ weight.T, labels, reduction="none").detach()
    gradients, counts = [], []
    for seed in range(2000):
        rule = a_rule(0.4, 60, seed=seed)
        rule.losses = losses.clone()
        rows = rule.start(3).nonzero()[:, 0]
        loss = rule.cross_entropy(inputs[rows] @ weight.T, labels[rows], rows, "sum")
        gradients.append(torch.autograd.grad(loss, weight)[0])
        counts.append(len(rows))
    stacked = torch.stack(gradients)
    error = (stacked.mean(0) - full).abs() / (stacked.std(0) / 2000**0.5 + 1e-4)
    assert float(error.max()) < 4.5  # standard errors, of 20 numbers
    easy = int((losses < losses.mean()).sum())
    assert sum(counts) / 2000 == pytest.approx(60 - 0.4 * easy, abs=0.3)
    assert float(stacked.std(0).max()) > 0.1  # single epochs differ


def test_easy_samples_are_dropped_and_rescaled_and_no_others():
    rule = a_rule()
    rule.losses = torch.arange(200.0)
    kept = rule.start(1)
    assert kept[100:].all()
    assert 30 < int(kept[:100].sum()) < 70
    assert rule.weights[100:].eq(1).all()
    assert rule.weights[:100].eq(2).all()
    assert torch.equal(rule.start(1), kept)  # (seed, epoch) decide
    assert not torch.equal(rule.start(2), kept)


def test_the_expected_share_is_that_of_a_training_with_the_assumed_losses():
    for drop, epochs in ((0.5, 20), (0.9, 9), (0.5, 2), (0.0, 5)):
        rule, passed = a_rule(drop, 4000, epochs), 0
        for epoch in range(epochs):
            passed += int(rule.start(epoch).sum())
            rule.losses = (torch.arange(4000) >= EASY * 4000).float()  # those of 0 are below the mean
        assert passed / (4000 * epochs) == pytest.approx(expected_share(drop, epochs), abs=0.01)
    assert expected_share(0.5, 20) == pytest.approx(0.72)  # as measured on the digits


def test_a_sample_of_unknown_loss_is_never_dropped_nor_counted_in_the_mean():
    rule = a_rule(0.9, 4)
    assert rule.start(0).all()  # nothing is known yet
    rule.losses = torch.tensor([1.0, 3.0, torch.inf, torch.inf])
    for epoch in range(7):
        kept = rule.start(epoch)
        assert kept[1:].all()
        assert rule.weights.tolist() == [pytest.approx(10.0), 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("epochs", "dropping"), [(1, 0), (5, 4), (8, 7), (40, 35)])
def test_the_last_epochs_use_all_samples(epochs, dropping):
    rule = a_rule(epochs=epochs)
    rule.losses = torch.arange(200.0)
    assert [not rule.start(epoch).all() for epoch in range(epochs)] == [epoch < dropping for epoch in range(epochs)]
    assert rule.weights.eq(1).all()


def test_the_last_loss_of_each_sample_is_remembered_without_its_weight():
    rule, logits, labels = a_rule(samples=5), torch.randn(3, 4), torch.tensor([0, 1, 2])
    rule.weights[:] = 2
    own = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(rule.cross_entropy(logits, labels, torch.tensor([4, 0, 2])), 2 * own.mean())
    assert torch.equal(rule.losses[[4, 0, 2]], own)
    assert rule.losses[[1, 3]].isinf().all()
    before = rule.losses.clone()
    total = rule.cross_entropy(logits + 1, labels.flip(0), torch.tensor([4, 0, 2]), "sum", remember=False)
    assert torch.allclose(total, 2 * F.cross_entropy(logits + 1, labels.flip(0), reduction="sum"))
    assert torch.equal(rule.losses, before)


def test_without_a_probability_it_does_nothing():
    rule, logits, labels = a_rule(0.0, 3), torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert rule.start(0).all()
    assert torch.equal(rule.cross_entropy(logits, labels, torch.arange(3)), F.cross_entropy(logits, labels))
    assert rule.losses.isinf().all()
    assert rule.start(1).all()

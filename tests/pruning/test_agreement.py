"""How far the trials of a criterion agree."""

from __future__ import annotations

import numpy as np
import pytest

from distill_at_scale.pruning.scoring.reliability import MAX_CLASSES, MAX_SAMPLES, TrialAgreement


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

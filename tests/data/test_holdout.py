"""Samples that are held out where a source has no test split, and chosen classes."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
from ingest_cases import digits_config, prepare

from distill_at_scale.config import load as configuration
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources import SOURCES


def held_out(config: configuration.Config) -> set[str]:
    return set(ingest.plan(config).listings["test"]["sample_id"].to_pylist())


def test_a_holdout_takes_its_share_of_every_class():
    plan = ingest.plan(digits_config(holdout=0.25))
    train, test = (Counter(plan.listings[split]["label"].to_pylist()) for split in ("train", "test"))
    for label, whole in enumerate((178, 182, 177)):
        assert (train[label], test[label]) == (whole - int(whole * 0.25 + 0.5), int(whole * 0.25 + 0.5))
    ids = plan.listings["train"]["sample_id"].to_pylist() + plan.listings["test"]["sample_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 537


def test_a_holdout_is_decided_by_the_seed():
    assert held_out(digits_config(0)) == held_out(digits_config(0))
    assert held_out(digits_config(0)) != held_out(digits_config(1))


def test_a_holdout_does_not_depend_on_the_order_of_the_listing(monkeypatch):
    before = held_out(digits_config())
    plain = SOURCES["digits"].listing
    monkeypatch.setattr(
        SOURCES["digits"], "listing", lambda self, split: plain(self, split).take(np.arange(1797)[::-1].copy())
    )
    assert held_out(digits_config()) == before


def test_a_holdout_too_small_for_a_single_sample_is_refused_or_leaves_no_test_split(tmp_path):
    with contextlib.suppress(UserError):
        assert not prepare(digits_config(holdout=0.001), tmp_path).has_test()


def test_classes_choose_a_subset_in_the_given_order(tmp_path):
    prepared = prepare(digits_config(classes=["7", "2"]), tmp_path)
    assert prepared.class_names == ["7", "2"]
    labels_by_id = {
        row["sample_id"]: row["label"] for row in SOURCES["digits"](digits_config().data).listing("train").to_pylist()
    }
    ids, labels = prepared.index("train")
    assert {(labels_by_id[i], label) for i, label in zip(ids, labels.tolist(), strict=True)} == {(7, 0), (2, 1)}
    assert sum(prepared.counts("train")) + sum(prepared.counts("test")) == 179 + 177


@pytest.mark.parametrize(
    ("classes", "message"), [(["3", "x"], "'x' is not a class"), (["3", "3"], "each once"), ([], "at least one")]
)
def test_classes_that_make_no_sense_are_refused(classes, message):
    with pytest.raises(UserError, match=message):
        ingest.plan(digits_config(classes=classes))

"""The list of rejected samples: whose they are, and the kinds of their reasons."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import chunks as parts
from distill_at_scale.data.ingest import merge as merging
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import part_path
from distill_at_scale.data.ingest.reasons import kinds_of
from distill_at_scale.data.sources.base import listing
from distill_at_scale.pipeline import validate


def same_ids(listings: dict[str, list[int]]) -> ingest.IngestPlan:
    """A plan whose splits use the same ids, as WebDataset's keys and Hugging Face's paths may."""
    tables = {
        split: listing([f"{i}.png" for i in range(len(labels))], labels, [split] * len(labels), [0] * len(labels))
        for split, labels in listings.items()
    }
    return ingest.IngestPlan(["cat", "dog"], ["cat", "dog"], tables, "")


def rejected(folder: Path, split: str, *bad: tuple[str, str]) -> None:
    table = pa.Table.from_pylist(
        [{"sample_id": i, "location": split, "reason": why, "used": False} for i, why in bad], parts.REJECTED
    )
    pq.write_table(table, parts.rejected_path(part_path(folder, split, 0)))


def test_a_rejected_test_sample_does_not_count_against_a_training_sample_of_the_same_id(tmp_path):
    plan = same_ids({"train": [0, 1], "test": [0, 1]})
    rejected(tmp_path, "train")
    rejected(tmp_path, "test", ("1.png", "empty"))
    bad = merging.write_rejected(plan, tmp_path, tmp_path / "rejected.parquet", 4)
    assert bad.to_pylist() == [
        {"sample_id": "1.png", "location": "test", "reason": "empty", "used": False, "split": "test"}
    ]
    assert pq.read_table(tmp_path / "rejected.parquet").equals(bad)
    assert "1 of 4 samples cannot be used" in validate.summary(plan, bad, tmp_path)[0]
    rejected(tmp_path, "train", ("1.png", "damaged"))
    bad = merging.write_rejected(plan, tmp_path, tmp_path / "rejected.parquet", 4)
    with pytest.raises(UserError, match="no training sample of the class 'dog' can be used"):
        validate.summary(plan, bad, tmp_path)


def test_the_reason_why_a_class_lost_everything_is_that_of_a_training_sample(tmp_path):
    plan = same_ids({"train": [0, 1], "test": [0, 1]})
    rejected(tmp_path, "train", ("1.png", "damaged"))
    rejected(tmp_path, "test", ("1.png", "empty"))
    bad = merging.write_rejected(plan, tmp_path, tmp_path / "rejected.parquet", 4)
    assert "'1.png': damaged" in merging._all_rejected(plan, 1, bad, tmp_path)


def test_kinds_of_reasons_keep_the_words_and_numbers_that_all_reasons_share():
    convert = "floating-point pixels; convert the image to 8 or 16 bits"
    large = [f"{size},000 bytes, more than data.max_bytes = 1,000; see '{size}.png'" for size in (5, 6, 7)]
    assert kinds_of([convert, *large, convert, "cut at 3", "cut at 4"]) == {
        "… bytes, more than data.max_bytes = 1,000; see …": [1, 2, 3],
        convert: [0, 4],
        "cut at …": [5, 6],
    }

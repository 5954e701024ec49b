"""Class-wise draws of the kept samples, and the normalisation of pixels."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler

NORM = Normalization((0.5, 0.25), (0.2, 0.1))


@pytest.fixture
def pool():
    """Two classes; pixel values are the sample's place."""
    held = {
        c: torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 2, 2, 2) + 100 * c
        for c, n in ((0, 10), (1, 4))
    }
    return ClassSampler(held, Normalization((0.0, 0.0), (1 / 255, 1 / 255)), seed=3)


def test_normalising_is_channel_wise_and_can_be_inverted():
    pixels = torch.randint(256, (5, 2, 3, 3), dtype=torch.uint8)
    images = NORM.apply(pixels)
    for channel in range(2):
        slow = (pixels[:, channel].float() / 255 - NORM.mean[channel]) / NORM.std[channel]
        assert torch.allclose(images[:, channel], slow)
    assert torch.equal((NORM.invert(images) * 255).round().to(torch.uint8), pixels)


def test_a_draw_has_no_repeats_and_knows_its_places(pool):
    first, second = pool.draw([0, 1], 4, "test", 0)
    assert (first.label, second.label) == (0, 1)
    assert len(set(first.rows.tolist())) == 4
    assert torch.allclose(first.images[:, 0, 0, 0], first.rows.float())
    assert torch.allclose(second.images[:, 0, 0, 0], second.rows.float() + 100)


def test_a_draw_gives_at_most_what_is_kept(pool):
    assert sorted(pool.draw([1], 256, "test")[0].rows.tolist()) == [0, 1, 2, 3]


def test_a_draw_is_decided_by_purpose_and_index_alone(pool):
    again = pool.draw([1, 0], 3, "test", 7)[1].rows
    assert torch.equal(pool.draw([0], 3, "test", 7)[0].rows, again)
    others = [pool.draw([0], 10, *key)[0].rows.tolist() for key in (("test", 7), ("test", 8), ("other", 7))]
    assert len({tuple(rows) for rows in others}) == 3


def test_a_pool_holds_the_kept_samples_of_its_classes_only(digits_run):
    prepared = PreparedDataset(digits_run.dir / "prepared")
    pool = ClassSampler.load(prepared, digits_run.dir / "manifest.parquet", [0, 2], 0, torch.device("cpu"))
    table, facts = manifest.read(digits_run.dir / "manifest.parquet")
    assert [pool.count(0), pool.count(2)] == [facts["kept_per_class"][0], facts["kept_per_class"][2]]
    assert sorted(pool.pixels) == [0, 2]
    kept = [row["sample_id"] for row in table.to_pylist() if row["kept"] and row["label"] == 2]
    assert torch.equal(pool.pixels[2], torch.from_numpy(prepared.load("train", only=kept)[0]))


def test_a_class_of_which_nothing_is_kept_is_named(digits_run, tmp_path):
    table, facts = manifest.read(digits_run.dir / "manifest.parquet")
    kept = [row["kept"] and row["label"] != 1 for row in table.to_pylist()]
    manifest.write(tmp_path / "m.parquet", table.set_column(4, "kept", pa.array(kept)), facts)
    with pytest.raises(UserError, match="keeps no sample of the class '1'"):
        ClassSampler.load(
            PreparedDataset(digits_run.dir / "prepared"), tmp_path / "m.parquet", [0, 1], 0, torch.device("cpu")
        )

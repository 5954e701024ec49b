"""What all sources share: ids, paths, digests; and the embedded digits."""

from __future__ import annotations

import numpy as np
import pytest
from source_cases import imagefolder, parquet, touch, write_parquet

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING, listing


def test_digits_are_the_embedded_set():
    source = SOURCES["digits"](DataSection())
    table = source.listing("train")
    assert source.splits() == ["train"]
    assert table.schema == LISTING
    assert table.num_rows == 1797
    assert np.bincount(table["label"].to_numpy()).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    images = np.stack(source.read(table.slice(0, 20)))
    assert (images.shape, images.dtype, images.min(), images.max()) == ((20, 8, 8), np.uint8, 0, 255)
    assert source.digest("train") == SOURCES["digits"](DataSection()).digest("train")


def test_digits_are_the_same_where_scikit_learn_keeps_its_file_elsewhere(monkeypatch):
    expected = SOURCES["digits"](DataSection()).digest("train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert SOURCES["digits"](DataSection()).digest("train") == expected


def test_a_repeated_id_is_named():
    with pytest.raises(UserError, match="'b' occurs twice"):
        listing(["a", "b", "b"], [0, 0, 0], ["x"] * 3, [0, 1, 2])


@pytest.mark.parametrize("name", ["parquet", "imagefolder"])
def test_a_missing_path_is_an_error(name, tmp_path):
    with pytest.raises(UserError, match=r"data\.path is not set"):
        SOURCES[name](DataSection(source=name))
    with pytest.raises(UserError, match="no such folder"):
        SOURCES[name](DataSection(source=name, path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="holds no"):
        SOURCES[name](DataSection(source=name, path=str(tmp_path)))


def test_a_path_that_is_missing_or_unset_is_an_error():
    for name in ("imagefolder", "parquet", "imagenet", "tiny_imagenet", "torchvision"):
        with pytest.raises(UserError, match=r"data\.path is not set"):
            SOURCES[name](DataSection(source=name))
        with pytest.raises(UserError, match="there is no such folder"):
            SOURCES[name](DataSection(source=name, path="/nowhere/at/all"))


def test_the_digest_does_not_depend_on_the_path(tmp_path):
    for place in ("here", "there"):
        write_parquet(tmp_path / place / "train.parquet", [0, 1])
        touch(tmp_path / f"images-{place}", "train/a/1.png", "train/b/2.png")
    assert parquet(tmp_path / "here").digest("train") == parquet(tmp_path / "there").digest("train")
    first, second = imagefolder(tmp_path / "images-here"), imagefolder(tmp_path / "images-there")
    assert first.digest("train") == second.digest("train")

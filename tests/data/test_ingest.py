"""From a source to the prepared format: class-sorted, resumable, with broken samples in quarantine."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_cases import decode, digits_config, folder_config, prepare
from PIL import Image

from distill_at_scale.config import load as configuration
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.data.ingest import chunks as parts
from distill_at_scale.data.ingest import merge as merging
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import ingest_chunk, part_path, recipe_of
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import pixels_of
from distill_at_scale.data.sources import SOURCES


def png(level: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def content(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of six flat training pictures and a test picture; picture k of class c has grey level 20 c + k."""
    root = tmp_path / "pictures"
    for c, name in enumerate(("cat", "dog")):
        for split, count in (("train", 6), ("val", 1)):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                (root / split / name / f"{k}.png").write_bytes(png(20 * c + k))
    return root


@pytest.fixture
def prepared(pictures: Path, tmp_path: Path) -> PreparedDataset:
    return prepare(folder_config(pictures), tmp_path)


def test_every_sample_keeps_its_id_label_and_pixels(prepared):
    ids, labels = prepared.index("train")
    assert ids == [f"train/{c}/{k}.png" for c in ("cat", "dog") for k in range(6)]
    assert labels.tolist() == [0] * 6 + [1] * 6
    pixels, _ = prepared.load("train")
    assert pixels.shape == (12, 3, 8, 8)
    assert pixels[:, 0, 0, 0].tolist() == [*range(6), *range(20, 26)]
    assert (pixels == pixels[:, :1, :1, :1]).all()


def test_rows_are_sorted_by_class_and_id_with_one_class_per_row_group(digits_run):
    prepared = PreparedDataset(digits_run.dir / "prepared")
    for split in ("train", "test"):
        groups = prepared.groups(split)
        assert [g.label for g in groups] == sorted(g.label for g in groups)
        for group in groups:
            table = prepared.read(group, split)
            assert set(table["label"].to_pylist()) == {group.label}
            assert table.num_rows == group.rows <= 32
        chunks = prepared.chunks(split)
        assert [c.index for c in chunks] == list(range(len(chunks)))
        assert all(prepared.read(chunk, split).num_rows == chunk.rows <= 32 for chunk in chunks)
        ids, labels = prepared.index(split)
        assert list(zip(labels.tolist(), ids, strict=True)) == sorted(zip(labels.tolist(), ids, strict=True))


def test_the_dataset_file_describes_what_is_there(prepared):
    assert prepared.class_names == ["cat", "dog"]
    assert prepared.shape == (3, 8, 8)
    assert (prepared.counts("train"), prepared.counts("test")) == ([6, 6], [1, 1])
    levels = np.array([*range(6), *range(20, 26)])
    assert prepared.mean == pytest.approx([levels.mean() / 255] * 3, abs=1e-6)
    assert prepared.std == pytest.approx([levels.std() / 255] * 3, abs=1e-6)


def test_the_shards_do_not_depend_on_the_order_of_the_work(tmp_path):
    config = digits_config()
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "b", backwards=True)
    assert content(tmp_path / "a" / "prepared") == content(tmp_path / "b" / "prepared")


def test_the_fingerprint_follows_the_content(pictures, tmp_path):
    first = prepare(folder_config(pictures), tmp_path / "a").fingerprint
    assert prepare(folder_config(pictures), tmp_path / "b").fingerprint == first
    (pictures / "train" / "cat" / "3.png").write_bytes(png(99))
    assert prepare(folder_config(pictures), tmp_path / "c").fingerprint != first


def test_a_finished_part_is_not_read_again(pictures, tmp_path):
    config = folder_config(pictures)
    plan = ingest.plan(config)
    first = decode(plan, config, tmp_path / "pieces")
    before = content(tmp_path / "pieces")

    class Unreadable(SOURCES["imagefolder"]):
        def read(self, rows):
            raise AssertionError("a finished part was read again")

    source = Unreadable(config.data)
    again = [
        ingest_chunk(source, recipe_of(config), rows, part_path(tmp_path / "pieces", split, i))
        for split, i, rows in plan.chunks(4)
    ]
    assert (sum(u for u, _ in again), sum(b for _, b in again)) == first == (14, 0)
    assert content(tmp_path / "pieces") == before


def test_a_part_without_its_list_of_rejected_samples_is_not_finished(tmp_path):
    """A copy of a folder that is being written may lack the list."""
    part = part_path(tmp_path, "train", 0)
    part.touch()
    assert not parts.is_finished(part, check=False)
    parts.rejected_path(part).touch()
    assert parts.is_finished(part, check=False)


def test_an_interrupted_ingest_ends_with_the_same_shards(pictures, tmp_path):
    config = folder_config(pictures)
    plan, parts = ingest.plan(config), tmp_path / "b" / "pieces"
    parts.mkdir(parents=True)
    split, index, rows = plan.chunks(4)[1]
    ingest_chunk(ingest.open_source(config.data), recipe_of(config), rows, part_path(parts, split, index))
    (parts / ".train-000000.arrow.0a1b.tmp").write_bytes(b"cut off when the process was killed")
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "b")
    assert content(tmp_path / "a" / "prepared") == content(tmp_path / "b" / "prepared")


@pytest.fixture
def broken(pictures: Path) -> dict[str, str]:
    """Four broken files of the class cat: {id: pattern of the reason}."""
    cat = pictures / "train" / "cat"
    (cat / "0.png").write_bytes(png(0, 64)[:70])
    (cat / "1.png").write_bytes(b"")
    (cat / "2.png").write_bytes(b"just text")
    (cat / "3.png").write_bytes(png(0, 600))
    return {
        "train/cat/0.png": "damaged",
        "train/cat/1.png": "empty",
        "train/cat/2.png": "not an image",
        "train/cat/3.png": "max_pixels",
    }


def test_broken_files_are_set_aside_with_reasons_and_the_rest_is_used(pictures, broken, tmp_path):
    config = folder_config(pictures, max_pixels=100_000)
    assert decode(ingest.plan(config), config, tmp_path / "pieces") == (10, 4)
    prepared = prepare(config, tmp_path)
    assert prepared.counts("train") == [2, 6]
    assert prepared.meta["rejected"] == 4
    rejected = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert [row["sample_id"] for row in rejected] == sorted(broken)
    for row in rejected:
        assert broken[row["sample_id"]] in row["reason"]
        assert row["location"] == row["sample_id"]


def test_a_file_that_vanished_is_set_aside(pictures, tmp_path):
    config = folder_config(pictures)
    plan = ingest.plan(config)
    (pictures / "train" / "dog" / "0.png").unlink()
    assert decode(plan, config, tmp_path / "pieces") == (13, 1)


def test_a_class_that_loses_everything_is_an_error_that_names_it(pictures, tmp_path):
    (pictures / "train" / "cat" / "0.png").write_bytes(b"")
    for k in range(6):
        (pictures / "train" / "dog" / f"{k}.png").write_bytes(b"just text")
    with pytest.raises(UserError, match=r"'dog' were rejected.*not an image"):
        prepare(folder_config(pictures), tmp_path)
    assert not (tmp_path / "prepared").exists()


def test_a_class_without_training_samples_is_an_error_that_names_it(pictures):
    for path in (pictures / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="'dog' has no training sample"):
        ingest.plan(folder_config(pictures))


def test_a_test_split_that_loses_everything_leaves_the_rest(pictures, tmp_path):
    for path in (pictures / "val").rglob("*.png"):
        path.write_bytes(b"")
    prepared = prepare(folder_config(pictures), tmp_path)
    assert prepared.counts("train") == [6, 6]
    assert not prepared.has_test()


def test_no_holdout_is_taken_if_the_source_has_a_test_split(pictures):
    assert ingest.plan(folder_config(pictures, holdout=0.5)).listings["train"].num_rows == 12


def test_a_test_split_without_the_chosen_classes_does_not_stop_the_ingest(pictures, tmp_path):
    (pictures / "val" / "cat" / "0.png").unlink()
    prepared = prepare(folder_config(pictures, classes=["cat"]), tmp_path)
    assert (prepared.counts("train"), prepared.has_test()) == ([6], False)


def test_pixels_pass_the_ingest_unchanged(digits_run):
    source = SOURCES["digits"](digits_run.config.data)
    prepared = PreparedDataset(digits_run.dir / "prepared")
    table = prepared.read(prepared.chunks()[0])
    for name, image in zip(table["sample_id"].to_pylist(), pixels_of(table), strict=True):
        assert np.array_equal(image[0], source.images[int(name.removeprefix("digits/"))])


def shuffled(config: configuration.Config, monkeypatch) -> configuration.Config:
    """The digits in an order that mixes all classes, as in many Parquet files and archives."""
    plain, order = SOURCES["digits"].listing, np.random.default_rng(0).permutation(1797)
    monkeypatch.setattr(SOURCES["digits"], "listing", lambda self, split: plain(self, split).take(order))
    return config


@pytest.mark.parametrize("span", [1, 64 * 50, 10**9])
def test_the_shards_do_not_depend_on_the_order_of_the_source_or_the_memory_of_the_merge(tmp_path, monkeypatch, span):
    prepare(digits_config(), tmp_path / "a")
    monkeypatch.setattr(merging, "SPAN_BYTES", span)
    prepare(shuffled(digits_config(), monkeypatch), tmp_path / "b")
    assert content(tmp_path / "a" / "prepared") == content(tmp_path / "b" / "prepared")


def test_large_images_are_kept_as_jpegs(tmp_path, monkeypatch):
    root, draw = tmp_path / "photos", np.random.default_rng(0)
    for k in range(6):
        path = root / "train" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
        smooth.save(path)
    raw, jpeg = (
        prepare(folder_config(root, size=144, resize="crop", store=store), tmp_path / store)
        for store in ("raw", "auto")
    )
    assert raw.index()[0] == jpeg.index()[0]
    assert jpeg.read(jpeg.groups()[0]).column_names == ["sample_id", "label", "jpeg"]
    first, second = raw.load("train")[0], jpeg.load("train", only=pa.array(jpeg.index()[0]))[0]
    assert first.shape == second.shape == (6, 3, 144, 144)
    assert np.abs(first.astype(int) - second).mean() < 3
    assert np.array_equal(jpeg.take("train", 1, [0, 2]), jpeg.load("train", labels=[1])[0][[0, 2]])


def test_the_metadata_is_plain_json(prepared):
    meta = json.loads((prepared.folder / "dataset.json").read_text(encoding="utf-8"))
    assert set(meta) >= {"class_names", "shape", "counts", "mean", "std", "rejected", "fingerprint"}


def reading(error: OSError) -> type:
    """The source `imagefolder`, which raises an error for the first sample of the class cat."""

    class Failing(SOURCES["imagefolder"]):
        def read(self, rows):
            if "train/cat/0.png" in rows["sample_id"].to_pylist():
                raise error
            return super().read(rows)

    return Failing


def test_an_error_of_the_network_stops_the_ingest_and_sets_no_sample_aside(pictures, tmp_path):
    config = folder_config(pictures)
    split, index, rows = ingest.plan(config).chunks(4)[0]
    target, recipe = part_path(tmp_path, split, index), recipe_of(config)
    for error in (OSError("AWS Error SLOW_DOWN during GetObject operation"), OSError(errno.EIO, "Input/output error")):
        with pytest.raises(OSError, match=r"SLOW_DOWN|Input/output"):
            ingest_chunk(reading(error)(config.data), recipe, rows, target)
        assert not target.exists()
    gone = FileNotFoundError(errno.ENOENT, "the archive ends inside the sample")
    assert ingest_chunk(reading(gone)(config.data), recipe, rows, target) == (3, 1)


def test_at_most_four_reads_are_in_memory(tmp_path, monkeypatch):
    """One is decoded, two wait, one is being read."""
    config = digits_config()
    rows, started, decoded, most = ingest.plan(config).listings["train"].slice(0, 60), [], [], []

    class Counting(SOURCES["digits"]):
        def read(self, rows):
            started.append(rows.num_rows)
            most.append(len(started) - len(decoded) // 5)
            return super().read(rows)

    monkeypatch.setattr(parts, "READ_AT_ONCE", 5)
    recipe = recipe_of(config)
    for _ in parts._decoded(
        Counting(config.data), recipe, rows, lambda name, pixels: decoded.append(name), TimeSpent()
    ):
        pass
    assert (len(started), len(decoded)) == (12, 60)
    assert max(most) <= 4


def test_what_the_source_holds_is_described_in_one_line(tmp_path):
    for file in ("train/cat/0", "train/cat/1", "train/dog/2", "train/emu/3", "val/cat/4", "val/dog/5", "val/emu/6"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.png").write_bytes(b"x")
    plan = ingest.plan(folder_config(tmp_path))
    assert {split: counts.tolist() for split, counts in plan.counts.items()} == {"train": [2, 1, 1], "test": [1, 1, 1]}
    assert plan.describe() == (
        "3 classes (cat, dog, emu); train: 4 samples, 1 (dog) to 2 (cat) per class; test: 3 samples, 1 per class"
    )
    held_out = ingest.plan(digits_config(holdout=0.25, classes=None)).describe()
    assert held_out.startswith("10 classes (0, 1, ..., 9); train: ")
    assert "; test (held out): " in held_out
    alone = ingest.plan(folder_config(tmp_path, classes=["cat"], train_split="val"))
    assert alone.describe() == "1 class (cat); train (the val split): 1 sample, 1 per class"

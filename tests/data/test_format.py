"""The prepared format: reading all or some of it gives what was written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import pixels_of, schema, to_table, write_meta, write_shards

SHAPE = (3, 4, 4)
PIXELS = np.random.default_rng(0).integers(0, 256, (10, *SHAPE), np.uint8)
IDS = [f"s{k}" for k in range(10)]
LABELS = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]


def write(folder, group=4):
    """Ten samples of three classes, passed in as tables cut at arbitrary rows."""
    table = to_table(IDS, LABELS, PIXELS)
    cuts = [(0, 3), (3, 2), (5, 2), (7, 3)]
    write_shards(folder / "train", (table.slice(*cut) for cut in cuts), schema(SHAPE), group)
    write_meta(
        folder,
        {
            "class_names": ["a", "b", "c"],
            "shape": list(SHAPE),
            "counts": {"train": [6, 2, 2]},
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
            "chunk": 6,
        },
        "x",
    )
    return PreparedDataset(folder)


@pytest.fixture
def prepared(tmp_path):
    return write(tmp_path)


def test_a_table_holds_the_pixels_it_was_given():
    table = to_table(IDS, LABELS, PIXELS)
    assert table.schema == shards.schema(SHAPE)
    assert np.array_equal(pixels_of(table), PIXELS)
    assert np.array_equal(pixels_of(table.slice(3, 2)), PIXELS[3:5])
    assert np.array_equal(pixels_of(pa.concat_tables([table.slice(5), table.slice(0, 5)])), np.roll(PIXELS, 5, axis=0))


def test_row_groups_hold_one_class_and_at_most_a_group(prepared):
    assert [(g.number, g.label, g.rows) for g in prepared.groups()] == [(0, 0, 4), (1, 0, 2), (2, 1, 2), (3, 2, 2)]
    assert prepared.read(prepared.groups()[1])["sample_id"].to_pylist() == IDS[4:6]


def test_a_chunk_is_a_run_of_row_groups(prepared):
    assert [(c.index, c.first, c.groups, c.rows) for c in prepared.chunks()] == [(0, 0, 2, 6), (1, 2, 2, 4)]
    assert [prepared.read(c)["sample_id"].to_pylist() for c in prepared.chunks()] == [IDS[:6], IDS[6:]]


def test_the_pixel_column_holds_the_plain_bytes_and_their_shape(prepared):
    table = pq.read_table(prepared.folder / "train" / "shard-00000.parquet")
    assert table.schema.field("pixels").type == pa.binary(48)
    assert table.schema.field("pixels").metadata == {b"shape": b"[3, 4, 4]"}
    assert table["pixels"][0].as_py() == PIXELS[0].tobytes()


def test_loading_everything_gives_every_sample_in_order(prepared):
    pixels, labels = prepared.load("train")
    assert np.array_equal(pixels, PIXELS)
    assert labels.tolist() == LABELS
    assert labels.dtype == np.int64
    ids, result = prepared.index()
    assert (ids, result.tolist()) == (IDS, LABELS)


def test_loading_some_ids_or_classes_gives_just_those(prepared):
    pixels, labels = prepared.load("train", only=["s9", "s2", "s6", "unknown"])
    assert np.array_equal(pixels, PIXELS[[2, 6, 9]])
    assert labels.tolist() == [0, 1, 2]
    pixels, labels = prepared.load("train", labels=[1, 2])
    assert np.array_equal(pixels, PIXELS[6:])
    pixels, labels = prepared.load("train", only=[], labels=[0])
    assert pixels.shape == (0, *SHAPE)
    assert labels.shape == (0,)


@pytest.mark.parametrize("places", [[], [0], [5], [1, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_places_within_a_class(prepared, places):
    assert np.array_equal(prepared.take("train", 0, places), PIXELS[places])
    assert np.array_equal(prepared.take("train", 2, [1]), PIXELS[[9]])


def in_footer(path, old, new):
    """Replace bytes in a file's footer by as many others."""
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little") + 8
    assert old in data[-size:]
    path.write_bytes(data[:-size] + data[-size:].replace(old, new))


def test_statistics_in_a_footer_are_not_believed(prepared):
    shard = prepared.folder / "train" / "shard-00000.parquet"
    in_footer(shard, b"\x04\x01\0\0\0", b"\x04\x02\0\0\0")  # four bytes: the label 1, as the least and largest value
    assert pq.read_metadata(shard).row_group(2).column(1).statistics.min == 2
    assert [group.label for group in PreparedDataset(prepared.folder).groups()] == [0, 0, 1, 2]
    assert PreparedDataset(prepared.folder).load("train")[1].tolist() == LABELS


READS = [
    lambda data: data.load("train"),
    lambda data: data.index(),
    lambda data: data.take("train", 1, [0]),
    lambda data: data.read(data.chunks()[1]),
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0, 1, 2, 1, 2], [0, 0, 0, 0, 0, 0, 2, 2, 1, 1], [0] * 10, [3] * 10])
def test_labels_that_are_not_as_counted_are_refused_when_they_are_read(prepared, labels, read):
    with pq.ParquetWriter(prepared.folder / "train" / "shard-00000.parquet", schema(SHAPE)) as out:
        for first, last in ((0, 4), (4, 6), (6, 8), (8, 10)):
            out.write_table(to_table(IDS, labels, PIXELS).slice(first, last - first))
    with pytest.raises(UserError, match=r"shard-00000.*other classes than .*dataset.json counts; ingest again"):
        read(PreparedDataset(prepared.folder))


def test_shards_with_other_rows_or_columns_than_counted_are_refused(prepared):
    all_rows, shard = to_table(IDS, LABELS, PIXELS), prepared.folder / "train" / "shard-00000.parquet"
    for table, message in [
        (all_rows.slice(0, 8), "lacks rows"),
        (pa.concat_tables([all_rows, all_rows.slice(8)]), "other rows"),
        (all_rows.drop_columns(["sample_id"]), "is not a shard"),
        (all_rows.set_column(1, "label", pa.array(LABELS, pa.int64())), "is not a shard"),
    ]:
        pq.write_table(table, shard, row_group_size=2)
        with pytest.raises(UserError, match=message):
            PreparedDataset(prepared.folder).groups()
    pq.write_table(all_rows, shard, row_group_size=10)  # a group of several classes
    with pytest.raises(UserError, match="other rows"):
        PreparedDataset(prepared.folder).groups()


def test_a_missing_split_is_empty(prepared):
    assert prepared.chunks("test") == []
    assert prepared.counts("test") == [0, 0, 0]
    assert not prepared.has_test()
    assert prepared.load("test")[0].shape == (0, *SHAPE)


def test_large_data_is_cut_into_several_shards(tmp_path, monkeypatch):
    single = write(tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 90)
    cut = write(tmp_path / "many")
    assert len(list((tmp_path / "many" / "train").glob("shard-*.parquet"))) == 4
    assert [(g.label, g.rows) for g in cut.groups()] == [(g.label, g.rows) for g in single.groups()]
    assert all(len({c.file}) == 1 for c in cut.chunks())
    assert sum(c.rows for c in cut.chunks()) == 10
    assert np.array_equal(cut.load("train")[0], single.load("train")[0])
    assert np.array_equal(cut.take("train", 1, [0, 1]), PIXELS[6:8])


def test_a_folder_without_prepared_data_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="distill-at-scale ingest"):
        PreparedDataset(tmp_path)


def test_the_fingerprint_covers_metadata_and_content(tmp_path):
    result = []
    for meta, content in (({"a": 1}, "x"), ({"a": 1}, "y"), ({"a": 2}, "x"), ({"a": 1}, "x")):
        write_meta(tmp_path, meta, content)
        result.append(PreparedDataset(tmp_path).fingerprint)
    assert len(set(result)) == 3
    assert result[0] == result[3]


def test_clips_are_scored_in_larger_units_than_they_are_decoded():
    assert shards.scoring_chunk((3, 64, 64), 256) == 256
    assert shards.scoring_chunk((8, 3, 64, 64), 64) == 682  # 64 MB
    assert shards.scoring_chunk((16, 3, 112, 112), 64) == 111
    assert shards.scoring_chunk((8, 1, 8, 8), 64) == 1024
    assert shards.scoring_chunk((256, 3, 128, 128), 64) == 64

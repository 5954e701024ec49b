"""Kinetics from CVDF's archives, read in place and forwards: the same clips as from folders; damage is an error."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from kinetics_cases import HEADER, aside, labels, put

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.archives import gzip_tar, tar
from distill_at_scale.data.ingest.chunks import Recipe, ingest_chunk
from distill_at_scale.data.ingest.plan import map_arrow
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.storage.filesystem import Store

TRAIN = HEADER + "".join(f"{'ab'[i % 2]},train{i:06d},{i},{i + 10},train,0\n" for i in range(7))
VAL = HEADER + "a,val00000000,3,13,val,0\nb,val00000001,3,13,val,0\n"


def clip(i):
    """Some bytes that do not compress, of a length that fills no block."""
    return np.random.default_rng(i).bytes(1000 + 777 * i)


def name(i, folder=""):
    return f"{folder}train{i:06d}_{i:06d}_{i + 10:06d}.mp4"


def tar_of(contents, kind=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for member, content in contents:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(*contents):
    return gzip.compress(tar_of(contents), 1)


def source(root, **keys):
    return SOURCES["kinetics_tar"](DataSection(source="kinetics_tar", path=str(root), **keys))


@pytest.fixture
def cvdf(tmp_path):
    return put(tmp_path, {
        "train/part_0.tar.gz": zipped(*((name(i), clip(i)) for i in (3, 0, 1))),
        "train/part_1.tgz": zipped(
            (name(2, "./a/"), clip(2)), (name(5), clip(50)), ("notes.txt", b"x"), ("._" + name(1), b"x")
        ),
        "train/part_2.tar": tar_of([(name(4, "a/"), clip(4))]),
        "val/part_0.tar.gz": zipped(("val00000000_000003_000013.mp4", b""), ("val00000001_000003_000013.mp4", b"v")),
        "test/part_0.tar.gz": b"never opened, as there is val",
        "replacement/replacement_for_corrupted_k400.tgz": zipped((name(5, "replacement_for_corrupted_k400/"), clip(5))),
        "annotations/train.csv": TRAIN,
        "annotations/val.csv": VAL,
    })  # fmt: skip


def numbers(table):
    return [int(i.rpartition("train")[2][:6]) for i in table["sample_id"].to_pylist()]


def test_clips_come_in_the_order_of_the_archives_with_the_labels_of_the_lists(cvdf):
    here = source(cvdf)
    assert here.splits() == ["train", "test"]
    assert "val is the test split; not used: test/part_0.tar.gz (" in here.notes()[0]
    assert here.class_names == ["a", "b"]
    table = here.listing("train")
    assert numbers(table) == [5, 3, 0, 1, 2, 4]
    assert table["label"].to_pylist() == [1, 1, 0, 1, 0, 0]
    assert labels(here, "test") == {"val/val00000000_000003_000013.mp4": 0, "val/val00000001_000003_000013.mp4": 1}
    assert here.read(table) == [clip(i) for i in (5, 3, 0, 1, 2, 4)]
    assert here.read(here.listing("test")) == [b"", b"v"]
    assert aside(here) == [
        ("train/a/train000006_000006_000016.mp4", 0, "listed in train.csv line 8, no file; download it"),
        ("train/part_1.tgz/" + name(5), 1, "the same clip as 'replacement/replacement_for_corrupted_k400.tgz/"
         f"replacement_for_corrupted_k400/{name(5)}', which is used; remove one of the two"),
    ]  # fmt: skip


def test_ids_are_the_paths_that_unpacking_gives(cvdf):
    there = source(cvdf)
    for archive in sorted(cvdf.glob("*/*")):
        if archive.parent.name in ("train", "val", "replacement"):
            with tarfile.open(archive) as opened:
                opened.extractall(archive.parent, filter="data")
    unpacked = SOURCES["kinetics"](DataSection(source="kinetics", path=str(cvdf)))
    for split in ("train", "test"):
        assert labels(unpacked, split) == labels(there, split)


def test_rows_are_read_in_any_order_and_an_archive_is_opened_once_for_chunks_in_order(cvdf, monkeypatch):
    opened = []
    open_stream = gzip_tar.open_stream
    monkeypatch.setattr(gzip_tar, "open_stream", lambda store, file: opened.append(file) or open_stream(store, file))
    here = source(cvdf)
    table = here.listing("train")
    order = np.random.default_rng(1).permutation(6)
    wanted = [clip(i) for i in numbers(table)]
    assert here.read(table.take(pa.array(order))) == [wanted[i] for i in order]
    opened.clear()
    assert [here.read(table.slice(i, 1)) for i in range(6)] == [[w] for w in wanted]
    assert [file.rpartition("/")[2] for file in opened] == [
        "replacement_for_corrupted_k400.tgz",
        "part_0.tar.gz",
        "part_1.tgz",
    ]
    assert here.read(table.slice(4, 1)) == [wanted[4]]  # once more from where the archive stands
    assert len(opened) == 3
    assert here.read(table.slice(3, 1)) == [wanted[3]]  # of another archive
    assert len(opened) == 4
    assert here.read(table.slice(1, 1)) == [wanted[1]]  # further back
    assert len(opened) == 5


def test_a_pickled_source_reads_without_an_index(cvdf):
    here = source(cvdf)
    table = here.listing("train")
    here.read(table)
    packed = pickle.dumps(here)
    assert b"part_0" not in packed
    assert pickle.loads(packed).read(table) == here.read(table)


class Lengths:
    """A decoder whose clips show how many bytes they had."""

    shape, tally = (2, 1, 2, 2), Counter()

    def __call__(self, name, raw):
        return np.full(self.shape, len(raw) % 251, np.uint8), None


def test_chunks_are_ingested_from_archives(cvdf, tmp_path):
    here = source(cvdf)
    table = here.listing("train")
    counts = [
        ingest_chunk(here, Recipe(Lengths(), None), table.slice(start, 2), tmp_path / f"{start}.arrow")
        for start in (0, 2, 4)
    ]
    assert counts == [(2, 0)] * 3
    table_of_chunks = pa.concat_tables([map_arrow(tmp_path / f"{start}.arrow") for start in (0, 2, 4)])
    wanted = {i: size % 251 for i, size in zip(table["sample_id"].to_pylist(), table["size"].to_pylist(), strict=True)}
    assert {
        i: p[0]
        for i, p in zip(table_of_chunks["sample_id"].to_pylist(), table_of_chunks["pixels"].to_pylist(), strict=True)
    } == wanted


def test_an_index_through_gzip_is_that_of_the_plain_tar(tmp_path):
    long = "x" * 150 + "/" + name(3)
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        content = tar_of(
            [(name(1), clip(1)), (name(2), b""), (long[50:] if kind == tarfile.USTAR_FORMAT else long, clip(9))], kind
        )
        put(
            tmp_path,
            {
                "x.tar": content,
                "x.tar.gz": gzip.compress(content),
                "two.tgz": gzip.compress(content[:5000]) + gzip.compress(content[5000:]),
            },
        )
        store = Store(str(tmp_path))
        listed = []
        for file in ("x.tar", "x.tar.gz", "two.tgz"):
            with gzip_tar.open_archive(store, file) as window:
                listed.append(list(tar.members(window)))
        assert listed[0] == listed[1] == listed[2]
        assert len(listed[0]) == 3


def damaged(packed, tail=b""):
    """An archive, and what becomes of it."""
    content = tar_of([(name(i), clip(i)) for i in range(3)])
    return {
        "cut": packed[:-300],
        "without its last bytes": packed[:-4],
        "a wrong checksum": packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:],
        "no gzip": b"<html>no such file</html>",
        "empty": b"",
        "cut before it was compressed": gzip.compress(content[:-12_000]),
        "cut inside a clip": gzip.compress(content[:3000]),
        "something behind its end": gzip.compress(content + b"x"),
        "endless behind its end": gzip.compress(content + bytes(2**20 + 1)),
        "no tar": gzip.compress(b"label,youtube_id\n" * 100),
    }


MESSAGES = {
    "cut": "is damaged, cut or not gzip .*Truncated",
    "without its last bytes": "is damaged, cut or not gzip .*Truncated",
    "a wrong checksum": "is damaged, cut or not gzip .*incorrect data check",
    "no gzip": "is damaged, cut or not gzip .*incorrect header",
    "empty": "is damaged: there is no header and no end mark at byte 0, but it ends at byte 0: it is cut",
    "cut before it was compressed": r"is damaged: .*, but it ends at byte [\d,]+: it is cut",
    "cut inside a clip": r"is damaged: .*, but it ends at byte 3,000: it is cut \(after the member 'train000001",
    "something behind its end": "is damaged: [0-9,]+ bytes follow its end mark",
    "endless behind its end": "is damaged: .*bytes follow its end mark",
    "no tar": "is damaged: there is no valid header at byte 0",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_damaged_archive_is_one_error_that_names_it(cvdf, how):
    put(cvdf, {"train/part_7.tar.gz": damaged(zipped(*((name(i), clip(i)) for i in range(3))))[how]})
    with pytest.raises(UserError, match=f"train/part_7.tar.gz {MESSAGES[how]}.*Download or build the archive again"):
        source(cvdf).splits()


def test_an_archive_inside_an_archive_or_of_another_kind_is_one_error(cvdf):
    put(cvdf, {"train/part_8.tar.gz": zipped(("a/inner.tar.gz", b"x"))})
    with pytest.raises(UserError, match=r"part_8\.tar\.gz holds the archive 'a/inner\.tar\.gz'; unpack it"):
        source(cvdf).splits()
    put(cvdf, {"train/part_8.tar.gz": zipped(), "train/part_9.tar.xz": b"x"})
    with pytest.raises(UserError, match=r"part_9\.tar\.xz cannot be read in place, only .tar.gz"):
        source(cvdf).splits()


def test_a_root_without_archives_is_one_error(tmp_path):
    put(tmp_path, {"train.csv": TRAIN, name(1): b"x"})
    with pytest.raises(UserError, match=r"holds no archives; the layout is train/part_0\.tar\.gz"):
        source(tmp_path).splits()


def test_unfinished_downloads_are_set_aside_and_a_damaged_member_name_is_text(cvdf):
    put(cvdf, {"train/part_9.tar.gz.part": b"x", "train/part_4.tar.gz": zipped(("../../" + name(6) + ".part", b"x"))})
    listed = aside(source(cvdf))
    assert ("train/part_9.tar.gz.part", -1, "a download that was not finished; finish it, or remove the file") in listed
    assert (
        f"train/part_4.tar.gz/../../{name(6)}.part",
        -1,
        "a download that was not finished; finish it, or remove the file",
    ) in listed


def test_a_clip_in_two_parts_is_used_once(cvdf):
    put(cvdf, {"train/part_4.tar.gz": zipped((name(0), b"another"), (name(1), clip(1)))})
    here = source(cvdf)
    assert here.read(here.listing("train"))[2] == clip(0)
    used = f"the same clip as 'train/part_0.tar.gz/{name(0)}', which is used; remove one of the two"
    assert (f"train/part_4.tar.gz/{name(0)}", 0, used) in aside(here)
    assert len(aside(here)) == 4


def test_an_archive_that_changes_after_listing_concerns_samples_or_stops_with_its_name(cvdf):
    here = source(cvdf)
    table = here.listing("train")
    rows = table.slice(3, 1)
    assert table["location"][3].as_py() == "train/part_0.tar.gz"
    path = cvdf / "train/part_0.tar.gz"
    content = path.read_bytes()
    path.write_bytes(gzip.compress(bytes(600)))
    with pytest.raises(FileNotFoundError, match="the archive ends inside the sample"):
        here.read(rows)
    path.write_bytes(content[:-1500])
    with pytest.raises(UserError, match=r"part_0\.tar\.gz is damaged, cut or not gzip"):
        here.read(rows)
    path.unlink()
    with pytest.raises(UserError, match=r"part_0\.tar\.gz is not there any more; put it back"):
        here.read(rows)
    path.write_bytes(content)
    assert here.read(rows) == [clip(1)]


def test_an_archive_that_may_not_be_read_stops_the_run(cvdf, monkeypatch):
    here = source(cvdf)
    rows = here.listing("train").slice(3, 1)

    def refuse(store, file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "open_native", refuse)
    with pytest.raises(Unreachable, match=r"data\.path = .* cannot be read: .*Permission denied"):
        here.read(rows)
    with pytest.raises(Unreachable, match=r"\.t(ar\.)?gz cannot be read: .*Permission denied; check the file"):
        source(cvdf).splits()


def test_the_digest_follows_archives_and_members(cvdf):
    before = source(cvdf).digest("train")
    assert source(cvdf).digest("train") == before
    put(cvdf, {"train/part_2.tar": tar_of([(name(4, "a/"), clip(4) + b"x")])})
    assert source(cvdf).digest("train") != before
    assert source(cvdf).digest("test") == source(cvdf).digest("test") != before


def test_a_set_on_s3_is_the_set_on_disk(s3, cvdf):
    s3.upload(cvdf, "kinetics-parts", "k400_targz/")
    here, there = source(cvdf), source(s3("kinetics-parts/k400_targz"))
    for split in ("train", "test"):
        table = there.listing(split)
        assert table.equals(here.listing(split))
        assert there.set_aside(split).equals(here.set_aside(split))
        assert there.digest(split) == here.digest(split)
        order = pa.array(np.random.default_rng(0).permutation(table.num_rows))
        assert there.read(table.take(order)) == here.read(table.take(order))
    s3.client.delete_object(Bucket="kinetics-parts", Key="k400_targz/train/part_0.tar.gz")
    rows = there.listing("train").slice(1, 1)
    with pytest.raises(UserError, match=r"s3://kinetics-parts/k400_targz/train/part_0\.tar\.gz is not there any more"):
        source(s3("kinetics-parts/k400_targz")).read(rows)


def test_a_damaged_archive_on_s3_is_named(s3, cvdf):
    put(cvdf, {"train/part_0.tar.gz": (cvdf / "train/part_0.tar.gz").read_bytes()[:-9]})
    s3.upload(cvdf, "kinetics-cut")
    with pytest.raises(UserError, match=r"s3://kinetics-cut/train/part_0\.tar\.gz is damaged, cut or not gzip"):
        source(s3("kinetics-cut")).listing("train")

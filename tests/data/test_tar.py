"""The index of a tar: all dialects that Python writes, all kinds of damage, and hostile names."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import tarfile

import pytest

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.archives import tar
from distill_at_scale.data.sources.base import listing
from distill_at_scale.storage.filesystem import Store

BLOCK = 512
CONTENTS = {"a.jpg": b"x" * 700, "folder/b.jpg": b"y" * 512, "empty": b"", "c.cls": b"7"}


def info(name, kind=tarfile.REGTYPE, size=0, **fields):
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    for key, value in fields.items():
        setattr(header, key, value)
    return header


def tar_of(contents, kind=tarfile.GNU_FORMAT, extra=(), **keys):
    """A tar of {name: bytes}, and of members without bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, **keys) as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in dict(contents).items():
            archive.addfile(info(name, size=len(content)), io.BytesIO(content))
    return buffer.getvalue()


def contents_of(raw, start=0, end=None):
    """{name: bytes} as our index finds them."""
    return {m.name: raw[m.offset : m.offset + m.size] for m in tar.members(io.BytesIO(raw), start, end)}


def resealed(raw, at=0):
    """The same archive with the checksum of one header corrected."""
    header = bytearray(raw[at : at + BLOCK])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return raw[:at] + bytes(header) + raw[at + BLOCK :]


class Counted(io.BytesIO):
    """A file that counts the bytes read."""

    reads = total = 0

    def read(self, size=-1):
        content = super().read(size)
        self.reads, self.total = self.reads + 1, self.total + len(content)
        return content


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_format(kind):
    assert contents_of(tar_of(CONTENTS, kind)) == CONTENTS


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["n" * 101, "long/" * 60 + "x.jpg", "ü" * 90 + ".jpg", "n" * 5000])
def test_long_names_are_read_whole(kind, name):
    assert contents_of(tar_of({name: b"1", "next": b"2"}, kind)) == {name: b"1", "next": b"2"}


def test_a_name_split_into_prefix_and_rest_is_joined():
    name = "f" * 90 + "/" + "g" * 90
    assert contents_of(tar_of({name: b"1"}, tarfile.USTAR_FORMAT)) == {name: b"1"}


def test_the_old_format_without_a_magic_is_read():
    raw = tar_of({"a.jpg": b"123"}, tarfile.USTAR_FORMAT)
    v7 = resealed(raw[:156] + b"\0" + raw[157:257] + bytes(BLOCK - 257) + raw[BLOCK:])
    assert contents_of(v7) == {"a.jpg": b"123"}


def test_sizes_and_names_of_pax_headers_count():
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}
    ) as archive:
        archive.addfile(info("x", size=3, pax_headers={"path": "given.jpg", "size": "3"}), io.BytesIO(b"abc"))
        archive.addfile(info("y", size=2), io.BytesIO(b"de"))
    assert contents_of(buffer.getvalue()) == {"given.jpg": b"abc", "y": b"de"}


def test_a_size_beyond_eleven_octal_digits_is_read():
    raw = tar_of({"a": b"abc"})
    large = raw[:124] + b"\x80" + (3).to_bytes(11, "big") + raw[136:]
    assert contents_of(resealed(large)) == {"a": b"abc"}


def test_folders_links_and_devices_are_passed_over():
    kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    extra = [info(f"none{i}", kind, size=9999, linkname="../" * 30 + "etc/passwd") for i, kind in enumerate(kinds)]
    assert contents_of(tar_of(CONTENTS, extra=extra)) == CONTENTS


def test_names_that_lead_outside_are_only_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {"../../x": b"1", "/etc/passwd": b"2", "C:\\x": b"3", "a/../../b": b"4"}
    assert contents_of(tar_of(bad)) == bad
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_not_valid_text_is_escaped():
    raw = tar_of({"abc": b"1"})
    assert list(contents_of(resealed(b"a\xffc" + raw[3:]))) == ["a\\xffc"]


def test_an_archive_inside_an_archive_is_read_in_place():
    inner = tar_of(CONTENTS)
    outer = tar_of({"n1.tar": inner, "n2.tar": tar_of({"z": b"zz"})})
    first, second = tar.members(io.BytesIO(outer))
    assert contents_of(outer, first.offset, first.offset + first.size) == CONTENTS
    assert contents_of(outer, second.offset, second.offset + second.size) == {"z": b"zz"}


def test_only_headers_are_read_of_large_members_and_small_members_are_read_together():
    large = Counted(tar_of({f"{i}.jpg": bytes(2**20) for i in range(8)}))
    small = Counted(tar_of({f"{i}.jpg": bytes(100) for i in range(5000)}))
    assert len(list(tar.members(large))) == 8
    assert large.total < 100_000
    assert len(list(tar.members(small))) == 5000
    assert small.reads < 40


def test_what_systems_add_is_no_member():
    contents = {
        "./a/1.jpg": b"1",
        "__MACOSX/a/1.jpg": b"x",
        "a/._1.jpg": b"x",
        "./@eaDir/1.jpg/T.jpg": b"x",
        ".git/1.jpg": b"x",
    }
    assert contents_of(tar_of(contents)) == {"./a/1.jpg": b"1"}


def test_an_empty_archive_has_no_members():
    assert contents_of(tar_of({})) == {}


def error_of(raw, start=0, end=None):
    with pytest.raises(UserError) as caught:
        list(tar.members(tar.Window(io.BytesIO(raw), "folder/x.tar"), start, end))
    assert "folder/x.tar" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 100, BLOCK, BLOCK + 699, BLOCK + 700, 3 * BLOCK, 3 * BLOCK + 7, 4 * BLOCK])
def test_an_archive_cut_anywhere_is_refused(length):
    message = error_of(tar_of(CONTENTS)[:length])
    assert "it is cut" in message
    assert f"ends at byte {length:,}" in message
    assert "Download or build the archive again" in message


def test_a_cut_names_the_member_and_its_offset():
    assert "'a.jpg' has 700 bytes from byte 512 on" in error_of(tar_of(CONTENTS)[:900])
    assert "after the member 'a.jpg'" in error_of(tar_of(CONTENTS)[: 3 * BLOCK])


def test_an_inner_archive_that_its_size_cuts_is_refused():
    outer = tar_of({"n1.tar": tar_of(CONTENTS), "n2.tar": tar_of(CONTENTS)})
    assert "it is cut" in error_of(outer, BLOCK, BLOCK + 3 * BLOCK)


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end():
    raw = bytearray(tar_of(CONTENTS))
    raw[3 * BLOCK + 5] ^= 1
    assert f"no valid header at byte {3 * BLOCK:,} (after the member 'a.jpg')" in error_of(bytes(raw))


def test_a_hole_in_a_half_loaded_archive_is_not_taken_for_the_end():
    raw = tar_of({f"{i}.jpg": bytes([i + 1]) * 4000 for i in range(10)})
    assert "follow its end mark" in error_of(raw[:9216] + bytes(9216) + raw[18432:])
    assert "follow its end mark" in error_of(raw[:9216] + bytes(2**21))


def test_joined_archives_are_refused():
    assert "joined" in error_of(tar_of(CONTENTS) + tar_of(CONTENTS))


@pytest.mark.parametrize(
    "field",
    [b"\xff" * 12, b"-0000000001\0", b"99999999999\0", b"\x80" + b"\xff" * 11],
    ids=["gnu", "sign", "digits", "huge"],
)
def test_sizes_that_make_no_sense_are_refused(field):
    raw = tar_of(CONTENTS)
    assert "is damaged" in error_of(resealed(raw[:124] + field + raw[136:]))


@pytest.mark.parametrize("content", [b"0 path=x\n", b"path=x\n", b"99 path=x\n", b"8 path=x", b"9999999999999 a=b\n"])
def test_a_broken_pax_header_is_refused(content):
    raw = tar_of({"h": content, "x": b"1"}, tarfile.USTAR_FORMAT)
    assert "pax header at byte 512" in error_of(resealed(raw[:156] + b"x" + raw[157:]))


@pytest.mark.parametrize("size", ["-512", "1e3", "9" * 5000, "٣"])
def test_a_pax_size_that_is_not_a_number_is_refused(size):
    record = f" size={size}\n".encode()
    length = next(n for n in range(6000) if n == len(record) + len(str(n)))
    raw = tar_of({"h": str(length).encode() + record, "x": b"1"}, tarfile.USTAR_FORMAT)
    assert "the size of its member 'x'" in error_of(resealed(raw[:156] + b"x" + raw[157:]))


def test_sparse_files_are_refused():
    raw = tar_of({"s": b"1"})
    assert "sparse" in error_of(resealed(raw[:156] + b"S" + raw[157:]))


def test_a_long_name_of_gigabytes_is_not_read():
    raw = tar_of({"n" * 200: b"1"})
    assert "4,294,967,295 bytes" in error_of(resealed(raw[:124] + b"37777777777\0" + raw[136:]))


def test_compressed_archives_are_refused_with_the_next_action():
    message = error_of(gzip.compress(tar_of(CONTENTS)) + bytes(1000))
    assert "compressed (gzip)" in message
    assert "unpack it to a plain .tar" in message


def test_files_that_are_not_tars_are_refused():
    assert "no valid header at byte 0" in error_of(b"<html>not found</html>" + b" " * 1000)


def test_no_damage_leads_to_anything_but_an_error_or_fewer_bytes():
    rng = random.Random(0)
    raw = tar_of({**CONTENTS, "n" * 150: b"q" * 99}, tarfile.PAX_FORMAT)
    for _ in range(2000):
        bad = bytearray(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        for _ in range(rng.randrange(4)):
            if bad:
                bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            members = list(tar.members(io.BytesIO(bytes(bad))))
        except UserError:
            continue
        assert all(m.size >= 0 and m.offset + m.size <= len(bad) for m in members)


def rows_of(file, raw):
    parts = list(tar.members(io.BytesIO(raw)))
    return listing([m.name for m in parts], [0] * len(parts), [file] * len(parts), [m.offset for m in parts],
                   [m.size for m in parts])  # fmt: skip


@pytest.fixture(params=["local", "remote"])
def store_of(request):
    """A store for a folder, which is a path or stands for remote storage."""

    def make_store(folder):
        store = Store(str(folder) if request.param == "local" else folder.as_uri())
        store.local = request.param == "local"
        return store

    return make_store


def test_rows_are_read_in_the_requested_order(tmp_path, store_of):
    contents = {f"{i}.jpg": bytes([i % 251]) * (37 * i % 3000) for i in range(300)} | {
        "large": b"L" * 200_000,
        "end": b"e",
    }
    (tmp_path / "x.tar").write_bytes(tar_of(contents))
    rows = rows_of("x.tar", tar_of(contents))
    order = random.Random(1).sample(range(len(contents)), len(contents))
    assert tar.read(store_of(tmp_path), rows.take(order)) == [list(contents.values())[i] for i in order]
    assert tar.read(store_of(tmp_path), rows.slice(0, 0)) == []


def test_rows_of_several_archives_and_repeated_rows_are_read(tmp_path, store_of):
    (tmp_path / "a.tar").write_bytes(tar_of({"x": b"1"}))
    (tmp_path / "b.tar").write_bytes(tar_of({"y": b"22"}))
    both = [rows_of("b.tar", tar_of({"y": b"22"})), rows_of("a.tar", tar_of({"x": b"1"}))]
    assert [tar.read(store_of(tmp_path), rows)[0] for rows in both] == [b"22", b"1"]
    assert tar.read(store_of(tmp_path), both[0].take([0, 0])) == [b"22", b"22"]


def test_a_short_read_concerns_that_sample_alone(tmp_path, store_of):
    rows = rows_of("x.tar", tar_of(CONTENTS))
    (tmp_path / "x.tar").write_bytes(tar_of(CONTENTS)[:2100])
    store = store_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="ends inside the sample"):
        tar.read(store, rows)
    assert tar.read(store, rows.slice(0, 1)) == [b"x" * 700]
    with pytest.raises(FileNotFoundError, match=r"x\.tar"):
        tar.read(store, rows.slice(1, 1))


def test_an_archive_that_vanished_stops_the_run(tmp_path, store_of):
    with pytest.raises(UserError, match=r"x\.tar is not there any more; put it back"):
        tar.read(store_of(tmp_path), rows_of("x.tar", tar_of(CONTENTS)))


def test_neighbours_are_fetched_together_and_distant_samples_alone():
    pieces = [
        tar.ByteRange(0, 100, 0),
        tar.ByteRange(612, 100, 1),
        tar.ByteRange(10**6, 5 * 2**20, 2),
        tar.ByteRange(7 * 2**20, 2**22, 3),
    ]
    assert [len(span) for span in tar._spans(pieces)] == [2, 1, 1]


def test_the_digest_of_an_index_covers_every_column_and_not_the_chunks():
    rows = rows_of("x.tar", tar_of(CONTENTS))
    chunked = type(rows).from_batches(rows.to_batches(max_chunksize=1))
    assert tar.index_digest(rows) == tar.index_digest(chunked)
    assert tar.index_digest(rows) != tar.index_digest(rows_of("y.tar", tar_of(CONTENTS)))
    assert tar.index_digest(rows) != tar.index_digest(rows_of("x.tar", tar_of({**CONTENTS, "c.cls": b"77"})))


def test_a_file_that_cannot_be_opened_is_named(tmp_path, store_of):
    with pytest.raises(UserError, match=r"x\.tar cannot be read"), tar.open_archive(store_of(tmp_path), "x.tar"):
        pass


def test_a_throttled_read_does_not_reject_samples(tmp_path):
    """Network errors of pyarrow are OSErrors without a number."""

    class Throttled:
        def size(self):
            return 10**6

        def read_at(self, size, offset):
            raise OSError("When reading information for key 'x.tar': AWS Error SLOW_DOWN during GetObject operation")

        def close(self):
            pass

    store = Store(str(tmp_path))
    store.local, store.open = False, lambda file: Throttled()
    with pytest.raises(Unreachable, match="SLOW_DOWN"):
        tar.read(store, rows_of("x.tar", tar_of(CONTENTS)))


def test_an_archive_that_cannot_be_indexed_now_is_unreachable(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(CONTENTS))
    with (
        pytest.raises(Unreachable, match=r"x\.tar cannot be read: reset"),
        tar.open_archive(Store(str(tmp_path)), "x.tar"),
    ):
        raise OSError("reset")


def test_an_archive_without_permission_does_not_reject_samples(tmp_path):
    def refuse(file):
        raise PermissionError(errno.EACCES, "Permission denied", file)

    store = Store(str(tmp_path))
    store.open = refuse
    with pytest.raises(Unreachable, match=r"Permission denied: 'x\.tar'\. Check the permissions"):
        tar.read(store, rows_of("x.tar", tar_of(CONTENTS)))

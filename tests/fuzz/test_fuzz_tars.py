"""Broken tars and gzipped tars: for accepted ones, Python's own tarfile finds the same members at the same places."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zlib
from pathlib import Path

import mutating
import pyarrow as pa

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import gzip_tar, tar
from distill_at_scale.data.sources.image.webdataset import index_shard
from distill_at_scale.storage.filesystem import Store, is_hidden

SUM = slice(148, 156)


def archive(kind: int, names: list[str]) -> bytes:
    buffer, chance = io.BytesIO(), random.Random(5)
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as out:
        for name in names:
            content = b"3" if name.endswith("cls") else chance.randbytes(chance.choice((0, 1, 511, 512, 700)))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return buffer.getvalue().rstrip(b"\0") + bytes(1536)


def archives() -> list[bytes]:
    names = [f"{folder}{i}.{kind}" for folder in ("", "a/") for i in range(2) for kind in ("jpg", "cls")]
    long = ["deep/" * 30 + "x.png", "deep/" * 30 + "x.cls", "ä.jpg", "ä.cls", "../up.jpg", "../up.cls"]
    return [archive(kind, chosen) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
            for chosen in (names, long) if kind != tarfile.USTAR_FORMAT or chosen is names]  # fmt: skip


def broken_header(data: bytes, chance: random.Random) -> bytes:
    """One header with a broken field and a checksum that is right, so that the field is looked at."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return mutating.flip(data, chance)
    at = chance.choice(starts)
    header = bytearray(data[at : at + 512])
    first, last = chance.choice(((0, 100), (124, 136), (124, 136), (124, 136), (156, 157), (257, 265), (345, 500)))
    value = chance.choice((b"\x80" + bytes(10) + b"\x05", b"\xff" * 12, b"-0000000512\0", b"7" * 11 + b"\0", b"0" * 12,
                           chance.randbytes(last - first), b"Lxg0125S"[chance.randrange(8) :][:1]))  # fmt: skip
    header[first:last] = value[: last - first].ljust(last - first, b"\0")
    header[SUM] = b" " * 8
    header[SUM] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def moved_blocks(data: bytes, chance: random.Random) -> bytes:
    return b"".join(mutating.shuffled([data[at : at + 512] for at in range(0, len(data), 512)], chance))


def as_tarfile_has_it(data: bytes) -> list[tuple[int, int]] | None:
    """Offsets and sizes of all files; None where tarfile reads less than we do and says so."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as members:
            files = [member for member in members if member.isreg() and not member.name.endswith("/")]
    except tarfile.ReadError:
        return None
    return [(member.offset_data, member.size) for member in files if not is_hidden(member.name)]


def test_of_broken_tars_tarfile_finds_the_same():
    def attempt(data: bytes) -> bool:
        try:
            members = list(tar.members(io.BytesIO(data)))
        except UserError:
            return False
        assert all(0 <= offset <= offset + size <= len(data) for _, offset, size in members)
        if members and (theirs := as_tarfile_has_it(data)) is not None:
            assert [(offset, size) for _, offset, size in members] == theirs
        return True

    mutating.run("tars", 0.12, archives(), attempt, [broken_header, broken_header, moved_blocks])


def test_broken_shards_yield_whole_samples(tmp_path: Path):
    store = Store(str(tmp_path))

    def attempt(data: bytes) -> bool:
        (tmp_path / "train.tar").write_bytes(data)
        try:
            rows, _ = index_shard(store, "train.tar", ["cls"])
        except UserError:
            return False
        assert len(set(rows["key"].to_pylist())) == rows.num_rows
        listing = pa.table({"location": rows["shard"], "row": rows["row"], "size": rows["size"]})
        assert tar.read(store, listing) == [
            data[o : o + s] for o, s in zip(*rows.select(["row", "size"]).to_pydict().values(), strict=True)
        ]
        return True

    mutating.run("shards", 0.04, archives(), attempt, [broken_header, moved_blocks])


def test_broken_gzipped_tars_hold_what_unpacking_them_gives(tmp_path: Path):
    store = Store(str(tmp_path))

    def broken_inside(packed: bytes, chance: random.Random) -> bytes:
        try:
            return gzip.compress(broken_header(gzip.decompress(packed), chance), 1, mtime=0)
        except (OSError, EOFError, zlib.error):
            return mutating.flip(packed, chance)

    def attempt(packed: bytes) -> bool:
        (tmp_path / "a.tar.gz").write_bytes(packed)
        try:
            with gzip_tar.open_archive(store, "a.tar.gz") as window:
                members = list(tar.members(window))
        except UserError:
            return False
        assert members == list(tar.members(io.BytesIO(gzip.decompress(packed))))
        return True

    packed = [gzip.compress(data, 1, mtime=0) for data in archives()]
    mutating.run("gzipped", 0.04, packed, attempt, [broken_inside, broken_inside])

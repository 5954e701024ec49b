"""Kinetics as CVDF hands it out: `train/part_0.tar.gz` …, `val/`, `test/`, `replacement/` and the official CSVs beside.

Archives (.tar.gz, .tgz, .tar) are read in place; nothing is unpacked or cached on a disk. gzip cannot seek, so a listing is one
pass over all archives of the splits, some at a time, and reading goes forwards (`gzip_tar.py`). Members lie flat or in
folders. Ids are the paths that unpacking each archive where it lies would give, classes and labels those of `kinetics.py`.
A row's location is the archive, its row the offset in the unpacked tar.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.archives import gzip_tar, tar
from distill_at_scale.data.sources.video.kinetics import Kinetics
from distill_at_scale.data.sources.video.kinetics_files import FILES, SPLIT, UNFINISHED, VIDEO

ARCHIVE = re.compile(r"\.(tar\.gz|tgz|tar)$", re.IGNORECASE)
OTHER = re.compile(r"\.(tar\.(bz2?|xz|zst|lz4|z)|tbz2?|txz|tzst|zip|rar|7z)$", re.IGNORECASE)
INNER = re.compile(rf"{ARCHIVE.pattern}|{OTHER.pattern}", re.IGNORECASE)
REMOTE_THREADS = 16
LAYOUT = "train/part_0.tar.gz, …, val/part_0.tar.gz, … with the official CSVs beside"


class KineticsTar(Kinetics):
    """As Kinetics, from archives. Raises UserError for one that is cut, damaged or holds archives, too."""

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self._reader = gzip_tar.Reader(self.store)

    def digest(self, split: str) -> str:
        """A hash of the archives' sizes and of names, labels, offsets and sizes of the clips that can be used."""
        table = self.listing(split)
        archives = sorted(pc.unique(table["location"]).to_pylist())
        return digest([[a, self._sizes[a]] for a in archives] + [tar.index_digest(table)])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return self._reader.read(rows)

    def files(self) -> pa.Table:
        """Every member of every archive (schema FILES), in the order of the archives; and unfinished downloads of archives."""
        paths, sizes = self.store.table()
        self._sizes = dict(zip(paths.to_pylist(), sizes.to_pylist(), strict=True))
        archives = self._archives()
        threads = (os.cpu_count() or 1) if self.store.local else REMOTE_THREADS
        parts = list(tar.map_in_threads(self._members, archives, threads))
        unfinished = pc.match_substring_regex(paths, UNFINISHED)
        paths, sizes = paths.filter(unfinished), sizes.filter(unfinished)
        none = pa.array([0] * len(paths), pa.int64())
        return pa.concat_tables([*parts, pa.table([paths, paths, paths, none, sizes], schema=FILES)]).combine_chunks()

    def _archives(self) -> list[str]:
        """Those of the test split only where there are none of val, as theirs would not be used."""
        found = [path for path in self._sizes if ARCHIVE.search(path)]
        words = {path: word[1].lower()[:3] for path in found if (word := re.search(SPLIT, f"{path}/"))}
        if (other := next((p for p in self._sizes if OTHER.search(p) and re.search(SPLIT, f"{p}/")), None)) is not None:
            raise UserError(
                f"{self.store.place(other)} cannot be read in place; only .tar.gz, .tgz and .tar can: unpack it"
            )
        if not found:
            raise UserError(f"{self.store.place()} holds no archives; the layout is {LAYOUT}")
        return [path for path in found if words.get(path) != "tes" or "val" not in words.values()]

    def _members(self, archive: str) -> pa.Table:
        folder = archive.rpartition("/")[0]
        with gzip_tar.open_archive(self.store, archive) as window:
            found = [m for m in tar.members(window) if _is_clip(m.name, window.place)]
        names = [re.sub(r"^(\.?/)+", "", member.name) for member in found]
        columns: list[Any] = [
            [f"{folder}/{name}" if folder else name for name in names],
            [f"{archive}/{name}" for name in names],
            [archive] * len(found),
            [member.offset for member in found],
            [member.size for member in found],
        ]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, FILES, strict=True)], schema=FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_sizes"}


def _is_clip(name: str, place: str) -> bool:
    """Whether a member may be a clip; hidden files, such as macOS adds, are none."""
    if INNER.search(name):
        raise UserError(f"{place} holds the archive {name!r}; unpack it, and put what it holds beside the others")
    base = name.rpartition("/")[2]
    return not base.startswith(".") and bool(re.search(VIDEO, name) or re.search(UNFINISHED, name))

"""Kinetics-400/600/700 with the official CSVs, as downloaded clips (`Kinetics`) or in CVDF's archives (`KineticsTar`).

Clips lie in `<split>/<label>/<id>_<start>_<end>.mp4`, or flat. Labels come from the lists (`kinetics_csv.py`), never from
folders; whatever does not fit is set aside with its reason (`kinetics_files.py`). Sample ids are POSIX paths relative to the
root, classes the sorted labels of the training list. The test split is val, else a test split whose list has labels. Files
in CVDF's `replacement/` replace others. Listing opens no clip; the decoder rejects an empty or broken file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.archives import gzip_tar, tar
from distill_at_scale.data.sources.base import SET_ASIDE, FileSource, rows_to_table, unused_split
from distill_at_scale.data.sources.video.kinetics_csv import WORDS, read_annotations
from distill_at_scale.data.sources.video.kinetics_files import FILES, SPLIT, UNFINISHED, VIDEO, Matched

ARCHIVE = re.compile(r"\.(tar\.gz|tgz|tar)$", re.IGNORECASE)
OTHER_ARCHIVE = re.compile(r"\.(tar\.(bz2?|xz|zst|lz4|z)|tbz2?|txz|tzst|zip|rar|7z)$", re.IGNORECASE)
REMOTE_THREADS = 16


class Kinetics(FileSource):
    """Reads lists and file names on first use and caches them.

    Raises UserError if lists are missing or malformed, if there are no clips, and if none is listed.
    """

    clips = True

    @cached_property
    def matched(self) -> Matched:
        rows = read_annotations(self.store, self.config.annotations)
        distilled = "train" if self.config.train_split == "train" else "test"
        return Matched(rows, self.files(), self.store.place(), distilled)

    @property
    def class_names(self) -> list[str]:
        return self.matched.class_names

    def splits(self) -> list[str]:
        """The splits that have files; a list without files makes no split."""
        return list(self.matched.splits)

    def listing(self, split: str) -> pa.Table:
        return self.matched.listings[split]

    def set_aside(self, split: str) -> pa.Table:
        """Listed clips without a file, and files that are unlisted, in the wrong split, duplicate or unfinished."""
        return self.matched.set_aside.get(split, SET_ASIDE.empty_table())

    def notes(self) -> list[str]:
        clips = self.matched.unused
        return [unused_split("val", [f"test ({clips:,} clips)"])] if clips else []

    def files(self) -> pa.Table:
        """All files below the root (schema FILES)."""
        paths, sizes = self.store.table()
        return pa.table([paths, paths, paths, np.zeros(len(paths), np.int64), sizes], schema=FILES)

    def __getstate__(self) -> dict[str, Any]:
        """Drops lists and files, which an actor that only reads does not need."""
        return {key: value for key, value in self.__dict__.items() if key not in ("matched", "_sizes", "_unused")}


class KineticsTar(Kinetics):
    """Kinetics in CVDF's archives `train/part_0.tar.gz` …, `val/`, `test/`, `replacement/`, with the official CSVs.

    Archives (.tar.gz, .tgz, .tar) are read in place; nothing is unpacked to disk. gzip has no random access, so listing is one
    pass over all archives of the splits, several at a time, and reading moves forwards (`gzip_tar.py`). Sample ids are the
    paths that unpacking each archive in its folder would give. In a listing, `location` is the archive and `row` the offset
    in the unpacked tar. Raises UserError for an archive that is cut, damaged or holds archives.
    """

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self._reader = gzip_tar.Reader(self.store)

    def digest(self, split: str) -> str:
        """A hash of the archives' sizes and of names, labels, offsets and sizes of the usable clips."""
        table = self.listing(split)
        archives = sorted(pc.unique(table["location"]).to_pylist())
        return digest([[a, self._sizes[a]] for a in archives] + [tar.index_digest(table)])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return self._reader.read(rows)

    def notes(self) -> list[str]:
        return [unused_split("val", self._unused)] if self.splits() and self._unused else []

    def files(self) -> pa.Table:
        """All members of all archives (schema FILES) in archive order, then unfinished downloads of archives."""
        paths, sizes = self.store.table()
        self._sizes = dict(zip(paths.to_pylist(), sizes.to_pylist(), strict=True))
        threads = (os.cpu_count() or 1) if self.store.local else REMOTE_THREADS
        archives = [path for path in self._sizes if ARCHIVE.search(path)]
        words = {path: WORDS[match["word"].lower()] for path in archives if (match := re.search(SPLIT, f"{path}/"))}
        other = next((p for p in self._sizes if OTHER_ARCHIVE.search(p) and re.search(SPLIT, f"{p}/")), None)
        if other is not None:
            place = self.store.place(other)
            raise UserError(f"{place} cannot be read in place, only .tar.gz, .tgz and .tar; unpack it")
        if not archives:
            hint = "the layout is train/part_0.tar.gz, …, val/part_0.tar.gz, … with the official CSVs beside"
            raise UserError(f"{self.store.place()} holds no archives; {hint}")
        # those of the test split only if val has none, as they would not be used
        self._unused = [path for path in archives if words.get(path) == "test" and "val" in words.values()]
        archives = [path for path in archives if path not in self._unused]
        parts = list(tar.map_in_threads(self._members, archives, threads))
        unfinished = pc.match_substring_regex(paths, UNFINISHED)
        paths, sizes = paths.filter(unfinished), sizes.filter(unfinished)
        parts.append(pa.table([paths, paths, paths, np.zeros(len(paths), np.int64), sizes], schema=FILES))
        return pa.concat_tables(parts).combine_chunks()

    def _members(self, archive: str) -> pa.Table:
        """The members of an archive that may be clips (schema FILES)."""
        folder, rows = archive.rpartition("/")[0], []
        with gzip_tar.open_archive(self.store, archive) as window:
            for member in tar.members(window):
                if ARCHIVE.search(member.name) or OTHER_ARCHIVE.search(member.name):
                    raise UserError(f"{window.place} holds the archive {member.name!r}; unpack it beside the others")
                if re.search(VIDEO, member.name) or re.search(UNFINISHED, member.name):
                    name = re.sub(r"^(\.?/)+", "", member.name)
                    sample_id = f"{folder}/{name}" if folder else name
                    rows.append((sample_id, f"{archive}/{name}", archive, member.offset, member.size))
        return rows_to_table(rows, FILES)

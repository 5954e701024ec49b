"""Matches the clips of Kinetics' lists with files.

A file is the clip `<id>_<start>_<end>` that its name says, whatever the padding and the folder. Columns stay Arrow and numpy: a
quarter of a million clips take a second or two. No file is opened. Whatever cannot be used is set aside with its reason;
files without a video extension, and clips of a test split that is not used, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import INT64, LISTING, SET_ASIDE, TEXT, listing, set_aside_table
from distill_at_scale.data.sources.media import VIDEO_EXTENSIONS
from distill_at_scale.data.sources.video.kinetics_csv import WORDS

Array = np.ndarray[Any, Any]

# `place` is the file's path; in an archive the archive's path, "/" and the member's name.
FILES = pa.schema({"sample_id": TEXT, "place": TEXT, "location": TEXT, "row": INT64, "size": INT64})
EXTENSIONS = tuple(extension.removeprefix(".") for extension in VIDEO_EXTENSIONS)
VIDEO = rf"(?i)\.({'|'.join(EXTENSIONS)})$"
UNFINISHED = (  # yt-dlp, aria2, wget, browsers; x.temp.mp4 and x.f137.mp4 are parts of yt-dlp's
    rf"(?i)\.({'|'.join(EXTENSIONS)}|m4a|tar|tgz|tar\.gz)\.(part|ytdl|aria2|crdownload|download|partial|tmp|temp)([-.][^/]*)?$"
    rf"|\.(temp|part|f[0-9]+)\.({'|'.join(EXTENSIONS)}|m4a)$"
)
CLIP = r"(?i)^(?:.*/)?(?P<id>[^/]+)_0*(?P<start>[0-9]{1,9})_0*(?P<end>[0-9]{1,9})\.[a-z0-9]+$"
SPLIT = (  # the outermost folder with a word that names a split
    rf"(?i)(?:^|/)(?P<folder>(?:[^/]*[^a-z/])?(?P<word>{'|'.join(sorted(WORDS, key=len, reverse=True))})(?:[^a-z/][^/]*)?)/"
)
REPLACEMENT = r"(?i)(?:^|/)replacement[^/]*/"
FOLDER = r"(?:^|/)(?P<folder>[^/]+)/[^/]+$"
SPLITS = ("train", "val", "test")
LAYOUT = "train/<label>/<id>_<start>_<end>.mp4, or flat"


@dataclass
class Matched:
    """The outcome for each listed clip and each file.

    Splits are numbers here: indices in SPLITS, -1 for none. Raises UserError if no file is a clip or no clip is listed, and
    for a label that the training list lacks.

    Args:
        rows: the listed clips (schema kinetics_csv.ROWS).
        files: the files (schema FILES), in the order in which they are read fastest.
        place: the data's root, for messages.
        distilled: the split that gets files that neither a folder nor a list assigns to one.
    """

    rows: pa.Table
    files: pa.Table
    place: str
    distilled: str = "train"

    def __post_init__(self) -> None:
        is_clip = pc.or_(pc.match_substring_regex(self.files["place"], VIDEO), self._match(UNFINISHED))
        self.files = self.files.filter(is_clip).combine_chunks()
        # the clip of each file as the lists write it, null if its name is no clip's
        parts = pc.extract_regex(self.files["place"], CLIP)
        self.keys = pc.binary_join_element_wise(*(pc.struct_field(parts, name) for name in ("id", "start", "end")), "_")
        self._has_label = _mask(pc.is_valid(self.rows["label"]))
        self.row_split = pc.index_in(self.rows["word"], pa.array(SPLITS)).to_numpy().astype(np.int64)
        paths = self.files["place"]
        words = pc.index_in(pc.utf8_lower(_extract(paths, SPLIT, "word")), pa.array(list(WORDS)))
        splits = np.append([SPLITS.index(split) for split in WORDS.values()], -1)[_indices(words)]
        labels = pc.unique(_alphanumeric(self.rows["label"]).drop_null())  # "training dog" names no split
        is_label = _mask(pc.is_in(_alphanumeric(_extract(paths, SPLIT, "folder")), labels, skip_nulls=True))
        self.is_replacement = _mask(self._match(REPLACEMENT))
        self.file_split = np.where(self.is_replacement | is_label, -1, splits)
        self.finished = ~_mask(self._match(UNFINISHED))
        # `row` is the row that lists each finished file, -1 for none; in a split's folder only rows of that split count
        self.row_anywhere = _indices(pc.index_in(self.keys, self.rows["key"], skip_nulls=True))
        words = pa.array([None if split < 0 else SPLITS[split] for split in self.file_split.tolist()], pa.string())
        file_keys = pc.binary_join_element_wise(words, self.keys, "/")
        row_keys = pc.binary_join_element_wise(self.rows["word"], self.rows["key"], "/")
        in_split = _indices(pc.index_in(file_keys, row_keys, skip_nulls=True))
        self.row = np.where(self.finished, np.where(self.file_split < 0, self.row_anywhere, in_split), -1)
        if not self.files.num_rows:
            raise UserError(f"{self.place} holds no clips ({', '.join(EXTENSIONS)}); the layout is {LAYOUT}")
        if not (self.row >= 0).any():
            lists = f"{self.rows['file'][0].as_py()} or another list"
            problem = f"none of the {len(paths):,} clips in {self.place} is listed in {lists}"
            raise UserError(f"{problem}; the first is {paths[0].as_py()!r}, and the layout is {LAYOUT}")
        if not self.splits:
            raise UserError(f"{self.place} holds only clips of a test split without labels; add train/ or val/")

    def _match(self, pattern: str) -> pa.ChunkedArray:
        return pc.match_substring_regex(self.files["place"], pattern)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Split with files -> index in SPLITS; val wins over a labelled test."""
        listed = self.row[self.row >= 0]
        present = set(self.row_split[listed[self._has_label[listed]]].tolist())
        val = 1 in present or (2 not in present and (self.file_split == 1).any())  # no list may have the clips of val
        train = {"train": 0} if 0 in present or (self.file_split == 0).any() else {}
        return train | ({"test": 1} if val else {"test": 2} if 2 in present else {})

    @cached_property
    def unused(self) -> int:
        """The number of clips in a test split that is not used."""
        of_row = np.where(self.row >= 0, self.row_split[self.row], -1)
        is_test = np.where(self.file_split >= 0, self.file_split, of_row) == SPLITS.index("test")
        return 0 if SPLITS.index("test") in self.splits.values() else int(is_test.sum())

    @cached_property
    def class_names(self) -> list[str]:
        """The sorted labels of the training list, of all lists if there is none."""
        train = self.rows.filter(pa.array(self.row_split == 0))
        return sorted(pc.unique((train if train.num_rows else self.rows)["label"].drop_null()).to_pylist())

    @cached_property
    def labels(self) -> Array:
        """The label of each listed clip, -1 if it has none."""
        labels = _indices(pc.index_in(self.rows["label"], pa.array(self.class_names), skip_nulls=True))
        is_used = np.isin(self.row_split, list(self.splits.values())) & self._has_label
        if (unknown := np.flatnonzero(is_used & (labels < 0))).size:
            row = self.rows.slice(unknown[0], 1).to_pylist()[0]
            where, problem = f"{row['file']}, line {row['line']}", f"the label {row['label']!r} does not occur"
            raise UserError(f"{where}: {problem} in the training list; correct it, or complete that list")
        return labels

    @cached_property
    def listings(self) -> dict[str, pa.Table]:
        """The usable clips by split (schema LISTING), in the order of `files`."""
        best, agrees, _, _ = self._best
        listings = {}
        for split, number in self.splits.items():
            chosen = np.sort(best[agrees & (self.row_split[self.row[best]] == number)])
            table = self.files.take(pa.array(chosen))
            columns = [table[name] if name in FILES.names else None for name in LISTING.names]
            columns[1] = pa.array(self.labels[self.row[chosen]], pa.int32())
            listings[split] = listing(*columns)
        return listings

    @cached_property
    def set_aside(self) -> dict[str, pa.Table]:
        """The unusable files and clips by split (schema SET_ASIDE).

        A file goes to the split of its folder, else to that of its row, else to the one that is distilled.
        """
        aside: dict[str, list[pa.Table]] = {split: [] for split in self.splits}
        for files, reasons, labels in self._unusable():
            rows, table = self.row[files], self.files.take(pa.array(files))
            split_of_row = np.where(rows >= 0, self.row_split[rows], -1)
            splits = np.where(self.file_split[files] >= 0, self.file_split[files], split_of_row)
            splits[splits < 0] = self.splits.get(self.distilled, next(iter(self.splits.values())))
            columns = [table["place"], pa.array(labels, pa.int32()), table["location"], reasons]
            for split, number in self.splits.items():
                aside[split].append(pa.table(columns, schema=SET_ASIDE).filter(pa.array(splits == number)))
        for split, number in self.splits.items():  # the rows without a file, under the name that the file would have
            is_missing = (self.row_split == number) & (self.labels >= 0)
            is_missing[self.row[self.row >= 0]] = False
            missing = np.flatnonzero(is_missing)
            listed = self.rows.take(pa.array(missing))
            parts = pc.extract_regex(listed["key"], "^(?P<id>.*)_(?P<start>[0-9]+)_(?P<end>[0-9]+)$")
            start, end = (pc.utf8_lpad(pc.struct_field(parts, name), 6, "0") for name in ("start", "end"))
            clips = pc.binary_join_element_wise(pc.struct_field(parts, "id"), start, end, "_")
            ids = _text(SPLITS[number], "/", listed["label"], "/", clips, ".mp4")
            elsewhere = pc.is_in(listed["key"], self.keys.filter(pa.array(self.finished)))
            why = pc.if_else(elsewhere, ", its file is in another split; move it", ", no file; download it")
            lists = pc.replace_substring_regex(listed["file"], f"^{re.escape(self.place)}/", "")
            reasons = _text("listed in ", self._lines(missing), why)
            aside[split].append(set_aside_table(ids, self.labels[missing], reasons, lists))
        return {split: pa.concat_tables(tables).combine_chunks() for split, tables in aside.items()}

    def _unusable(self) -> Iterator[tuple[Array, Any, Array]]:
        """(files, reasons, labels) by kind of fault; the label is -1 if unknown."""
        is_listed, is_named = self.row_anywhere >= 0, _mask(pc.is_valid(self.keys))
        without_row = self.finished & (self.row < 0)
        for mask, reason in (
            (~self.finished, "a download that was not finished; finish it, or remove the file"),
            (without_row & ~is_listed & is_named, "not listed in any CSV; complete the CSV, or remove the file"),
            (without_row & ~is_listed & ~is_named, "no CSV can list a name that is not <id>_<start>_<end>; rename it"),
        ):
            files = np.flatnonzero(mask)
            yield files, pa.repeat(reason, len(files)), np.full(len(files), -1)
        files, paths = np.flatnonzero(without_row & is_listed), self.files["place"]
        rows, folders = self.row_anywhere[files], _extract(paths.take(pa.array(files)), SPLIT, "folder")
        reasons = _text("in ", folders, "/, but ", self._lines(rows), " lists it; move the file")
        yield files, reasons, self.labels[rows]
        best, agrees, others, instead = self._best
        files = np.concatenate([best[~agrees], others[self._disagrees[others]]])
        rows, folders = self.row[files], _extract(paths.take(pa.array(files)), FOLDER, "folder")
        labels = self.rows["label"].take(pa.array(rows))
        parts = ("the folder says '", folders, "', ", self._lines(rows), " says '", labels)
        reasons = _text(*parts, "'; move the file, or correct the list")
        yield files, reasons, self.labels[rows]
        agrees = ~self._disagrees[others]
        used = paths.take(pa.array(instead[agrees]))
        reasons = _text("the same clip as '", used, "', which is used; remove one of the two")
        yield others[agrees], reasons, self.labels[self.row[others[agrees]]]

    @cached_property
    def _disagrees(self) -> Array:
        """Whether a file's folder is named like another label than its row's; only letters and digits are compared."""
        folders = _alphanumeric(_extract(self.files["place"], FOLDER, "folder"))
        labels = _alphanumeric(self.rows["label"])
        is_label = _mask(pc.is_in(folders, pc.unique(labels.drop_null())))
        expected = labels.take(pa.array(np.maximum(self.row, 0)))
        return is_label & (self.row >= 0) & ~_mask(pc.equal(folders, expected))

    @cached_property
    def _best(self) -> tuple[Array, Array, Array, Array]:
        """The file used for each row that has one, whether its folder agrees, the rows' other files, and the file used in
        place of each of those.

        Of several files, one with an agreeing folder comes first, then one that is not empty, then a replacement.
        """
        used = np.flatnonzero((self.row >= 0) & np.isin(self.row_split[self.row], list(self.splits.values())))
        is_empty = self.files["size"].to_numpy()[used] <= 0
        keys = (used, ~self.is_replacement[used], is_empty, self._disagrees[used], self.row[used])
        order = used[np.lexsort(keys)]
        is_first = np.ones(len(order), bool)
        is_first[1:] = self.row[order[1:]] != self.row[order[:-1]]
        best, instead = order[is_first], order[is_first][np.cumsum(is_first)[~is_first] - 1]
        return best, ~self._disagrees[best], order[~is_first], instead

    def _lines(self, rows: Array) -> Any:
        table = self.rows.take(pa.array(rows))
        names = pc.replace_substring_regex(table["file"], "^.*/", "")
        return _text(names, " line ", table["line"].cast(pa.string()))


def _mask(values: Any) -> Array:
    """Arrow booleans as numpy, null as false."""
    return np.asarray(pc.fill_null(values, False), bool)


def _indices(values: Any) -> Array:
    """Arrow indices as numpy, null as -1."""
    return np.asarray(pc.fill_null(values, -1)).astype(np.int64)


def _extract(texts: Any, pattern: str, group: str) -> Any:
    return pc.struct_field(pc.extract_regex(texts, pattern), group)


def _alphanumeric(labels: Any) -> Any:
    """Lower-case letters and digits alone: `petting_animal_not_cat` equals `petting animal (not cat)`."""
    return pc.replace_substring_regex(pc.utf8_lower(labels), r"[^\pL\pN]+", "")


def _text(*parts: Any) -> Any:
    return pc.binary_join_element_wise(*parts, "")

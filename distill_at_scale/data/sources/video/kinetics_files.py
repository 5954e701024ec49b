"""Lists of clips and the files that are there: which file is which clip, and what does not fit.

A file is the clip `<id>_<start>_<end>` that its name says, whatever the padding and the folder. Columns stay Arrow and numpy:
a quarter of a million clips cost a second or two. Nothing is opened. What cannot be used is set aside with its reason; only
files that are no video, and clips of a test split that is not used, are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import LISTING, SET_ASIDE, labelled, listing
from distill_at_scale.data.sources.video.base import VIDEO_EXTENSIONS

Array = np.ndarray[Any, Any]

FILES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("place", pa.string()),  # the file's path; in an archive the archive's path, "/" and the member's name
        ("location", pa.string()),
        ("row", pa.int64()),
        ("size", pa.int64()),
    ]
)
EXTENSIONS = tuple(extension.removeprefix(".") for extension in VIDEO_EXTENSIONS)
VIDEO = rf"(?i)\.({'|'.join(EXTENSIONS)})$"
UNFINISHED = (  # yt-dlp, aria2, wget, browsers; x.temp.mp4 and x.f137.mp4 are parts of yt-dlp's
    rf"(?i)\.({'|'.join(EXTENSIONS)}|m4a|tar|tgz|tar\.gz)\.(part|ytdl|aria2|crdownload|download|partial|tmp|temp)([-.][^/]*)?$"
    rf"|\.(temp|part|f[0-9]+)\.({'|'.join(EXTENSIONS)}|m4a)$"
)
CLIP = r"(?i)^(?:.*/)?(?P<id>[^/]+)_0*(?P<start>[0-9]{1,9})_0*(?P<end>[0-9]{1,9})\.[a-z0-9]+$"
SPLIT = r"(?i)(?:^|/)(?P<word>train|validate|validation|valid|val|test)(?:[^a-z/][^/]*)?/"
REPLACEMENT = r"(?i)(?:^|/)replacement[^/]*/"
FOLDER = r"(?:^|/)(?P<folder>[^/]+)/[^/]+$"
WORDS = ("train", "val", "test")
LAYOUT = "train/<label>/<id>_<start>_<end>.mp4, or flat"


@dataclass
class Matched:
    """What became of every listed clip and of every file.

    `rows` (schema kinetics_csv.ROWS) are the listed clips, `files` (schema FILES) what lies there, in the order in which it is
    best read; `place` is the data's root in messages. Raises UserError where no file is a clip or no clip is listed, and for
    a label that the training list lacks.
    """

    rows: pa.Table
    files: pa.Table
    place: str
    distilled: str = "train"  # the split to which files belong that no folder and no list gives to one
    _aside: dict[str, list[pa.Table]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = self.files.filter(
            pc.or_(pc.match_substring_regex(self.files["place"], VIDEO), self._is(UNFINISHED))
        ).combine_chunks()
        self.row_word = pc.index_in(self.rows["word"], pa.array(WORDS)).to_numpy().astype(np.int64)
        paths = self.files["place"]
        found = pc.struct_field(pc.extract_regex(paths, SPLIT), "word")
        short = pc.utf8_lower(pc.replace_substring_regex(found, "(?i)^val.*", "val"))
        self.replaces = _mask(self._is(REPLACEMENT))
        self.word = np.where(self.replaces, -1, _places(pc.index_in(short, pa.array(WORDS))))
        self.finished = ~_mask(self._is(UNFINISHED))
        self.row = self._rows_of_files()
        if not self.files.num_rows:
            raise UserError(f"{self.place} holds no clips ({', '.join(EXTENSIONS)}); the layout is {LAYOUT}")
        if not (self.row >= 0).any():
            first = paths[0].as_py()
            raise UserError(
                f"none of the {len(paths):,} clips in {self.place} is listed in {self.rows['file'][0].as_py()} or another "
                f"list; the first is {first!r}, and the layout is {LAYOUT}"
            )
        if not self.splits:
            raise UserError(
                f"{self.place} holds only clips of a test split whose list has no labels; add train/ or val/"
            )

    def _is(self, pattern: str) -> pa.ChunkedArray:
        return pc.match_substring_regex(self.files["place"], pattern)

    @cached_property
    def keys(self) -> pa.Array:
        """The clip of each file as the lists write it, null where its name is none."""
        parts = pc.extract_regex(self.files["place"], CLIP)
        return pc.binary_join_element_wise(*(pc.struct_field(parts, name) for name in ("id", "start", "end")), "_")

    def _rows_of_files(self) -> Array:
        """The row that lists each finished file, or -1; in a folder of a split, only rows of that split."""
        self.anywhere = _places(pc.index_in(self.keys, self.rows["key"], skip_nulls=True))
        words = pa.array([None if word < 0 else WORDS[word] for word in self.word.tolist()], pa.string())
        own_key = pc.binary_join_element_wise(words, self.keys, "/")
        listed = pc.binary_join_element_wise(self.rows["word"], self.rows["key"], "/")
        own = _places(pc.index_in(own_key, listed, skip_nulls=True))
        return np.where(self.finished, np.where(self.word < 0, self.anywhere, own), -1)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Our splits that have files -> the word of each (a place in WORDS); of val and a labelled test, val."""
        listed = self.row[self.row >= 0]
        words = set(self.row_word[listed[self._has_label[listed]]].tolist())
        tests = {WORDS[word]: WORDS[word] for word in words & {1, 2}}
        if not tests and (self.word == 1).any():
            tests = {"val": "val"}  # whose clips no list has
        train = {"train": 0} if 0 in words or (self.word == 0).any() else {}
        return train | ({"test": WORDS.index(labelled(tests)[0])} if tests else {})

    @cached_property
    def _has_label(self) -> Array:
        return _mask(pc.is_valid(self.rows["label"]))

    @cached_property
    def class_names(self) -> list[str]:
        """The sorted labels of the training list, of all lists where there is none."""
        train = self.rows.filter(pa.array(self.row_word == 0))
        return sorted(pc.unique((train if train.num_rows else self.rows)["label"].drop_null()).to_pylist())

    @cached_property
    def labels(self) -> Array:
        """The label of every listed clip, -1 where it has none."""
        found = _places(pc.index_in(self.rows["label"], pa.array(self.class_names), skip_nulls=True))
        used = np.isin(self.row_word, list(self.splits.values())) & self._has_label
        if (odd := np.flatnonzero(used & (found < 0))).size:
            row = self.rows.slice(odd[0], 1).to_pylist()[0]
            raise UserError(
                f"{row['file']}, line {row['line']}: the label {row['label']!r} does not occur in the training list; "
                "correct it, or complete that list"
            )
        return found

    @cached_property
    def listings(self) -> dict[str, pa.Table]:
        """The clips that can be used, by split (schema LISTING), in the order of `files`."""
        best, good = self._best
        found = {}
        for split, word in self.splits.items():
            mine = np.sort(best[good & (self.row_word[self.row[best]] == word)])
            table = self.files.take(pa.array(mine))
            columns = [table[name] if name in FILES.names else None for name in LISTING.names]
            columns[1] = pa.array(self.labels[self.row[mine]], pa.int32())
            found[split] = listing(*columns)
        return found

    @cached_property
    def aside(self) -> dict[str, pa.Table]:
        """What cannot be used, by split (schema SET_ASIDE)."""
        listed = self.anywhere >= 0
        names = _mask(pc.is_valid(self.keys))
        elsewhere = self.finished & (self.row < 0) & listed
        unlisted = self.finished & (self.row < 0) & ~listed
        self._set_aside(np.flatnonzero(~self.finished), "a download that was not finished")
        self._set_aside(np.flatnonzero(unlisted & names), "not listed in any CSV")
        self._set_aside(np.flatnonzero(unlisted & ~names), "its name is not <id>_<start>_<end>, so no CSV can list it")
        wrong = np.flatnonzero(elsewhere)
        folders = pc.struct_field(pc.extract_regex(self.files["place"].take(pa.array(wrong)), SPLIT), "word")
        said = self._lines(self.anywhere[wrong])
        self._set_aside(
            wrong, _text("lies in ", folders, "/, but ", said, " lists it"), self.labels[self.anywhere[wrong]]
        )
        self._second_files()
        self._missing()
        empty = [SET_ASIDE.empty_table()]
        return {split: pa.concat_tables(self._aside.get(split, empty)).combine_chunks() for split in self.splits}

    @cached_property
    def _disagrees(self) -> Array:
        """Whether the folder of a file is called as another label than that of its row; `_` counts as a space."""
        folder = _plain(pc.struct_field(pc.extract_regex(self.files["place"], FOLDER), "folder"))
        known = _plain(self.rows["label"])
        claims = _mask(pc.is_in(folder, pc.unique(known.drop_null())))
        given = known.take(pa.array(np.maximum(self.row, 0)))
        return claims & (self.row >= 0) & ~_mask(pc.equal(folder, given))

    @cached_property
    def _best(self) -> tuple[Array, Array]:
        """The file that is taken for each row that has one (places in `files`), and whether its folder agrees.

        Of several, a replacement is taken; before that counts whether it has bytes and a folder that agrees.
        """
        used = np.flatnonzero((self.row >= 0) & np.isin(self.row_word[self.row], list(self.splits.values())))
        empty = self.files["size"].to_numpy()[used] <= 0
        order = used[np.lexsort((used, ~self.replaces[used], empty, self._disagrees[used], self.row[used]))]
        first = np.ones(len(order), bool)
        first[1:] = self.row[order[1:]] != self.row[order[:-1]]
        self._others, self._instead = order[~first], order[first][np.cumsum(first)[~first] - 1]
        return order[first], ~self._disagrees[order[first]]

    def _second_files(self) -> None:
        """Sets aside files in the folder of another label, and further files of a clip."""
        best, good = self._best
        wrong = np.concatenate([best[~good], self._others[self._disagrees[self._others]]])
        folders = pc.struct_field(pc.extract_regex(self.files["place"].take(pa.array(wrong)), FOLDER), "folder")
        rows = self.rows.take(pa.array(self.row[wrong]))
        said = self._lines(self.row[wrong])
        reasons = _text("the folder says '", folders, "', ", said, " says '", rows["label"], "'")
        self._set_aside(wrong, reasons, self.labels[self.row[wrong]])
        right = ~self._disagrees[self._others]
        more, instead = self._others[right], self.files["place"].take(pa.array(self._instead[right]))
        self._set_aside(more, _text("the same clip as '", instead, "', which is used"), self.labels[self.row[more]])

    def _missing(self) -> None:
        """Sets aside rows without a file of their own, under the name that it would have."""
        without = np.ones(self.rows.num_rows, bool)
        without[self.row[self.row >= 0]] = False
        for split, word in self.splits.items():
            mine = np.flatnonzero(without & (self.row_word == word) & (self.labels >= 0))
            rows = self.rows.take(pa.array(mine))
            ids = _text(WORDS[word], "/", rows["label"], "/", _padded(rows["key"]), ".mp4")
            elsewhere = pc.is_in(rows["key"], self.keys.filter(pa.array(self.finished)))
            why = pc.if_else(elsewhere, ", its file is in another split", ", no file")
            lists = pc.replace_substring_regex(rows["file"], f"^{re.escape(self.place)}/", "")
            self._add(split, ids, self.labels[mine], lists, _text("listed in ", self._lines(mine), why))

    def _lines(self, rows: Array) -> Any:
        """`val.csv line N` for some rows."""
        table = self.rows.take(pa.array(rows))
        names = pc.replace_substring_regex(table["file"], "^.*/", "")
        return _text(names, " line ", table["line"].cast(pa.string()))

    def _set_aside(self, files: Array, reasons: Any, labels: Array | None = None) -> None:
        """Files go to the split of their folder; without one to that of their row, else to the one that is distilled."""
        labels = np.full(len(files), -1) if labels is None else labels
        rows = self.row[files]
        words = np.where(self.word[files] >= 0, self.word[files], np.where(rows >= 0, self.row_word[rows], -1))
        words[words < 0] = (
            self.splits[self.distilled] if self.distilled in self.splits else next(iter(self.splits.values()))
        )
        table = self.files.take(pa.array(files))
        told = pa.array([reasons] * len(files), pa.string()) if isinstance(reasons, str) else reasons
        for split, word in self.splits.items():
            mine = pa.array(words == word)
            self._add(
                split,
                table["place"].filter(mine),
                labels[words == word],
                table["location"].filter(mine),
                told.filter(mine),
            )

    def _add(self, split: str, ids: Any, labels: Array, locations: Any, reasons: Any) -> None:
        columns = [ids, pa.array(labels, pa.int32()), locations, reasons]
        self._aside.setdefault(split, []).append(pa.table(columns, schema=SET_ASIDE))


def _mask(values: Any) -> Array:
    """Arrow booleans as numpy, null as false."""
    return np.asarray(pc.fill_null(values, False), bool)


def _places(values: Any) -> Array:
    """Arrow places as numpy, null as -1."""
    return np.asarray(pc.fill_null(values, -1)).astype(np.int64)


def _plain(labels: Any) -> Any:
    """Lower-case letters and digits of a label alone: `petting_animal_not_cat` is `petting animal (not cat)`."""
    return pc.replace_substring_regex(pc.utf8_lower(labels), r"[^\pL\pN]+", "")


def _padded(keys: Any) -> Any:
    """`id_28_38` -> `id_000028_000038`."""
    parts = pc.extract_regex(keys, "^(?P<id>.*)_(?P<start>[0-9]+)_(?P<end>[0-9]+)$")
    start, end = (pc.utf8_lpad(pc.struct_field(parts, name), 6, "0") for name in ("start", "end"))
    return pc.binary_join_element_wise(pc.struct_field(parts, "id"), start, end, "_")


def _text(*parts: Any) -> Any:
    """Texts and columns of texts, joined row by row."""
    return pc.binary_join_element_wise(*parts, "")

"""The annotation lists of Kinetics-400/600/700: the clips of each split, with label and line.

Official lists have the columns label, youtube_id, time_start, time_end, split and perhaps is_cc, in any order; the header
names them. They may be quoted, have a byte-order mark, CRLF, empty lines, and times such as 28.0. The split is the column's,
else the one in the file's name. A list of the test split may have no labels. Not covered: lists in JSON.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pyarrow as pa

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import INT32, SPLIT_WORDS, TEXT, rows_to_table
from distill_at_scale.data.sources.label_files import LabelFile, named_file, resolve
from distill_at_scale.storage.filesystem import Store, join_path

ROWS = pa.schema({"word": TEXT, "key": TEXT, "label": TEXT, "file": TEXT, "line": INT32})
WORDS = {  # a word that names a split -> train, val or test
    word: "val" if split in ("dev", "eval") else split for split, words in SPLIT_WORDS.items() for word in words
}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
KEY = "data.annotations"
NAME = re.compile(rf"(?:(?P<before>.*)[-_. ])?(?P<word>{'|'.join(WORDS)})", re.IGNORECASE)
ALL_SPLITS_NAME = re.compile(r"(annotations?|labels|k(inetics)?[-_]?[4-7]00([-_]?2020)?)\.csv", re.IGNORECASE)
FOLDER = re.compile(r"annot|label|csv|kinetics|k[-_]?[4-7]00|deepmind", re.IGNORECASE)
LEVELS = 3  # of such folders
ID, TIME = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"0*([0-9]{1,9})(?:\.0*)?")
KEY_OF_CLIP = re.compile(r"[A-Za-z0-9_-]+_[0-9]+_[0-9]+")
GET_LISTS = (
    "put the official train.csv and val.csv (label,youtube_id,time_start,time_end,split) there or into annotations/, "
    f"or set {KEY}"
)


class Row(NamedTuple):
    """A line of a list; the fields are the columns of ROWS."""

    word: str  # train, val or test
    key: str  # <id>_<start>_<end>, without padding
    label: str | None  # None if a test list has none
    file: str  # the list, for messages
    line: int


def read_annotations(store: Store, named: str | None) -> pa.Table:
    """The clips of all lists (schema ROWS), the training split first; a clip that is listed twice counts once.

    Args:
        store: the root of the data.
        named: data.annotations: a list, or a folder with lists, relative to the root, absolute, or a URI; None finds the lists
            by their usual names.

    Raises:
        UserError: there is no list, a list lacks a column or has a malformed line, or two lines give a clip of a split
            different labels.
    """
    clips: dict[tuple[str, str], Row] = {}
    for file in _find_lists(store, named):
        for row in read_list(file):
            first = clips.setdefault((row.word, row.key), row)
            if first.label != row.label:
                where, other = f"{row.file}, line {row.line}", f"{first.file}, line {first.line}, says {first.label!r}"
                raise UserError(f"{where}: the clip {row.key} is {row.label!r}, but {other}; correct one of the two")
    if not clips:
        raise UserError(f"the lists of clips in {store.place()} hold no clips; download them again, or set {KEY}")
    order = list(dict.fromkeys(WORDS.values()))
    rows = sorted(clips.values(), key=lambda row: order.index(row.word))
    return rows_to_table(rows, ROWS)


def read_list(file: LabelFile) -> Iterator[Row]:
    """Yields the clips of a list; raises UserError, naming file and line, for a missing column or a malformed line."""
    lines = _lines(file)
    _, header = next(lines, (1, []))
    positions = {name.strip().lower(): i for i, name in reversed(list(enumerate(header)))}
    name_match = NAME.fullmatch(os.path.splitext(file.place.rpartition("/")[2])[0])
    default_word = WORDS[name_match["word"].lower()] if name_match else None
    missing = [name for name in COLUMNS if name not in positions and not (name == "label" and default_word == "test")]
    if missing:
        advice = "its first line must name the columns label,youtube_id,time_start,time_end,split"
        raise UserError(f"{file.place} has no column {missing[0]!r}; {advice}, but it is {','.join(header)[:200]!r}")
    width = len(header)
    columns = [positions.get(name, width) for name in (*COLUMNS, "split")]
    for line, values in lines:
        if any(value.strip() for value in values[width:]):
            raise _malformed(file, line, "it has more columns than the first line; quote a label that holds a comma")
        values += [""] * (width + 1 - len(values))
        label, clip_id, start, end, split = (values[column].strip() for column in columns)
        key, word = f"{clip_id}_{_seconds(start)}_{_seconds(end)}", WORDS.get(split.lower() or default_word or "")
        if not KEY_OF_CLIP.fullmatch(key):
            if not ID.fullmatch(clip_id):
                raise _malformed(file, line, f"youtube_id is {clip_id!r}; it has letters, digits, - and _ only")
            raise _malformed(file, line, f"the times are {start!r} and {end!r}; write whole seconds")
        if word is None:
            raise _malformed(file, line, f"split is {split!r}; it must be train, val or test")
        if not label and word != "test":
            raise _malformed(file, line, "it has no label")
        yield Row(word, key, label or None, file.place, line)


@cache
def _seconds(text: str) -> str:
    """`028` and `28.0` are 28; "?" for anything but whole seconds."""
    match = TIME.fullmatch(text)
    return match[1] if match else "?"


def _lines(file: LabelFile) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, with the number of the line where it begins."""
    reader = csv.reader(io.StringIO(file.text(), newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        for values in reader:
            if any(values) and any(value.strip() for value in values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise _malformed(file, line, f"{error}; close every quotation mark and double one inside a label") from None


def _malformed(file: LabelFile, line: int, what: str) -> UserError:
    return UserError(f"{file.place}, line {line}: {what}; correct the line or download the list again")


def _find_lists(store: Store, named: str | None) -> list[LabelFile]:
    """The lists of each split from the first folder that has any; else the first list that may hold all splits.

    In a folder train.csv comes before k400_train.csv, and .csv before .txt.
    """
    advice = GET_LISTS
    if named is not None:
        if named.partition("?")[0].lower().endswith((".csv", ".txt")):
            return [named_file(store, named, KEY)]
        store, advice = Store(resolve(store, named), KEY), "give a file such as train.csv, or a folder with such files"
    folders = level = [""]  # the root and the folders below it that are named like annotations, upper ones first
    for _ in range(LEVELS):
        level = [join_path(folder, name) for folder in level for name in store.names(folder)[0] if FOLDER.search(name)]
        folders = folders + level[:100]
    lists: dict[str, list[str]] = {}
    for_all_splits: list[str] = []
    for folder in folders:
        names = store.names(folder)[1]
        ranked: dict[str, list[tuple[tuple[bool, bool], str]]] = {}
        for name in names:
            stem, extension = os.path.splitext(name)
            match = NAME.fullmatch(stem)
            if match and extension.lower() in (".csv", ".txt"):
                rank = extension.lower() != ".csv", match["before"] is not None
                ranked.setdefault(WORDS[match["word"].lower()], []).append((rank, name))
        for word, chosen in ranked.items():
            first = min(chosen)[0]
            lists.setdefault(word, [join_path(folder, name) for rank, name in chosen if rank == first])
        for_all_splits += [join_path(folder, name) for name in names if ALL_SPLITS_NAME.fullmatch(name)]
    paths = [path for word in lists for path in lists[word]] or for_all_splits[:1]
    if not paths:
        raise UserError(f"{store.place()} holds no list of clips: {advice}")
    files = []
    for path in paths:
        try:
            files.append(LabelFile(store.place(path), store.read(path)))
        except OSError as error:
            raise UserError(f"{store.place(path)} cannot be read ({error.strerror or error}); check the file") from None
    return files

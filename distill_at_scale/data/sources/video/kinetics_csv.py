"""The annotation lists of Kinetics-400/600/700: which clips there are, by split, with label and the line that says so.

Official lists have the columns label, youtube_id, time_start, time_end, split and perhaps is_cc, in any order; the header
names them. They may be quoted or not, have a byte-order mark, CRLF, empty lines, and times such as 28.0; the split is that of
the column, else that of the file's name. A list of the test split may have no labels. JSON lists are left out.
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
from distill_at_scale.data.sources.image.imagenet_labels import File, named_file
from distill_at_scale.data.sources.video.label_lists import inside
from distill_at_scale.storage.filesystem import Store, joined

ROWS = pa.schema(
    [
        ("word", pa.string()),  # train, val or test
        ("key", pa.string()),  # <id>_<start>_<end>, without padding
        ("label", pa.string()),  # null where a test list has none
        ("file", pa.string()),  # the list, for messages
        ("line", pa.int32()),
    ]
)
WORDS = {"train": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val", "test": "test"}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
KEY = "data.annotations"
NAME = re.compile(r"(?:(?P<before>.*)[-_. ])?(?P<word>train|val|valid|validate|validation|test)", re.IGNORECASE)
FOR_ALL = re.compile(r"(annotations?|labels|k(inetics)?[-_]?[4-7]00([-_]?2020)?)\.csv", re.IGNORECASE)
FOLDER = re.compile(r"annot|label|csv|kinetics|k[-_]?[4-7]00|deepmind", re.IGNORECASE)
LEVELS = 3  # of such folders
ID, TIME = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"0*([0-9]{1,9})(?:\.0*)?")
KEY_OF_CLIP = re.compile(r"[A-Za-z0-9_-]+_[0-9]+_[0-9]+")
GET = (
    "put the official train.csv and val.csv (label,youtube_id,time_start,time_end,split) there or into annotations/, "
    f"or set {KEY}"
)


class Row(NamedTuple):
    """A line of a list; the fields are the columns of ROWS."""

    word: str
    key: str
    label: str | None
    file: str
    line: int


def read_annotations(store: Store, named: str | None) -> pa.Table:
    """Every clip of every list (schema ROWS), the training split first; one that is listed twice counts once.

    `named` is the configuration's data.annotations: a file, or a folder that holds lists, relative to the root of the data,
    absolute, or a URI; None finds them by their usual names. Raises UserError where there is no list, where one lacks a
    column or has a line that cannot be read, and where two lines give one clip of a split different labels.
    """
    known: dict[tuple[str, str], Row] = {}
    for file in _files(store, named):
        for row in read_list(file):
            first = known.setdefault((row.word, row.key), row)
            if first.label != row.label:
                raise UserError(
                    f"{row.file}, line {row.line}: the clip {row.key} is {row.label!r}, but {first.file}, line {first.line}, "
                    f"says {first.label!r}; correct one of the two"
                )
    if not known:
        raise UserError(f"the lists of clips in {store.place()} hold no clips; download them again, or set {KEY}")
    order = list(dict.fromkeys(WORDS.values()))
    rows = sorted(known.values(), key=lambda row: order.index(row.word))
    columns = zip(zip(*rows, strict=True), ROWS, strict=True)
    return pa.table([pa.array(values, field.type) for values, field in columns], schema=ROWS)


def read_list(file: File) -> Iterator[Row]:
    """The clips of one list.

    Raises UserError, naming file and line, for a missing column and for whatever cannot be read.
    """
    lines = _lines(file)
    _, header = next(lines, (1, []))
    places = {name.strip().lower(): i for i, name in reversed(list(enumerate(header)))}
    of_file = _word(file.place)
    missing = [name for name in COLUMNS if name not in places and not (name == "label" and of_file == "test")]
    if missing:
        raise UserError(
            f"{file.place} has no column {missing[0]!r}; its first line must name the columns "
            f"label,youtube_id,time_start,time_end,split, but it is {','.join(header)[:200]!r}"
        )
    width = len(header)
    wanted = [places.get(name, width) for name in (*COLUMNS, "split")]
    for line, values in lines:
        if any(value.strip() for value in values[width:]):
            raise _wrong(file, line, "it has more columns than the first line; quote a label that holds a comma")
        values += [""] * (width + 1 - len(values))
        yield _row(file, line, of_file, *(values[place].strip() for place in wanted))


def _row(
    file: File, line: int, of_file: str | None, label: str, name: str, start: str, end: str, split: str
) -> Row:  # fmt: skip
    key, word = f"{name}_{_seconds(start)}_{_seconds(end)}", WORDS.get(split.lower() or of_file or "")
    if not KEY_OF_CLIP.fullmatch(key):
        if not ID.fullmatch(name):
            raise _wrong(file, line, f"youtube_id is {name!r}; it has letters, digits, - and _ only")
        raise _wrong(file, line, f"the times are {start!r} and {end!r}; write whole seconds")
    if word is None:
        raise _wrong(file, line, f"split is {split!r}; it must be one of {', '.join(WORDS)}")
    if not label and word != "test":
        raise _wrong(file, line, "it has no label")
    return Row(word, key, label or None, file.place, line)


@cache
def _seconds(text: str) -> str:
    """`028` and `28.0` are 28; "?" for anything but whole seconds."""
    found = TIME.fullmatch(text)
    return found[1] if found else "?"


def _lines(file: File) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line that is not empty, with the number of the line where it begins."""
    try:
        text = file.content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file.place} is not a text file in UTF-8; download it again") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        for values in reader:
            if any(values) and any(value.strip() for value in values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise _wrong(file, line, f"{error}; close every quotation mark and write one inside a label twice") from None


def _wrong(file: File, line: int, what: str) -> UserError:
    return UserError(f"{file.place}, line {line}: {what}; correct the line or download the list again")


def _word(name: str) -> str | None:
    """The split that the name of a list ends with: kinetics_700_2020_train.csv."""
    found = NAME.fullmatch(os.path.splitext(name.rpartition("/")[2])[0])
    return WORDS[found["word"].lower()] if found else None


def _files(store: Store, named: str | None) -> list[File]:
    if named is None:
        return _found(store, GET)
    if named.partition("?")[0].lower().endswith((".csv", ".txt")):
        return [named_file(store, named, KEY)]
    advice = "give a file such as train.csv, or a folder that holds such files"
    other = Store(inside(store.path, named), KEY)
    return _found(other, advice)


def _found(store: Store, advice: str) -> list[File]:
    """The lists of each split from the first folder that has one; else the first that may hold all splits."""
    lists: dict[str, list[str]] = {}
    common: list[str] = []
    for folder in _annotation_folders(store):
        names = store.names(folder)[1]
        for word, chosen in _by_word(names).items():
            lists.setdefault(word, [joined(folder, name) for name in chosen])
        common += [joined(folder, name) for name in names if FOR_ALL.fullmatch(name)]
    files = [file for word in lists for file in lists[word]] or common[:1]
    if not files:
        raise UserError(f"{store.place()} holds no list of clips: {advice}")
    return [_read(store, file) for file in files]


def _read(store: Store, file: str) -> File:
    try:
        return File(store.place(file), store.read(file))
    except OSError as error:
        raise UserError(f"{store.place(file)} cannot be read ({error.strerror or error}); check the file") from None


def _by_word(names: list[str]) -> dict[str, list[str]]:
    """The lists among the files of one folder, by split: train.csv before k400_train.csv, and .csv before .txt."""
    best: dict[str, tuple[tuple[bool, bool], list[str]]] = {}
    for name in names:
        stem, extension = os.path.splitext(name)
        found = NAME.fullmatch(stem)
        if found and extension.lower() in (".csv", ".txt"):
            rank = (extension.lower() != ".csv", found["before"] is not None)
            kept = best.get(WORDS[found["word"].lower()])
            if kept is None or rank < kept[0]:
                best[WORDS[found["word"].lower()]] = (rank, [name])
            elif rank == kept[0]:
                kept[1].append(name)
    return {word: chosen for word, (_, chosen) in best.items()}


def _annotation_folders(store: Store) -> list[str]:
    """The root and the folders below it whose names are those of annotations, the upper ones first."""
    found, level = [""], [""]
    for _ in range(LEVELS):
        level = [joined(folder, name) for folder in level for name in store.names(folder)[0] if FOLDER.search(name)]
        found += level[:100]
    return found

"""The contract of a source, and the listing that every source returns.

A listing is an Arrow table with the columns sample_id (string, unique), label (int32), location (string), row (int64)
and size (int64, bytes; 0 where unknown): whatever the source needs to find the sample again. In an archive `row` is the
byte offset. Rows come in the order in which they are best read. Splits are called "train" and "test".

A source whose list of samples may disagree with its files (clips that are gone from the web, files without a label)
has a method `set_aside(split)` as well: a table (schema SET_ASIDE, label -1 where it is unknown) of what is listed or
lies there and cannot be used. Such samples are not in the listing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import Store

LISTING = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("location", pa.string()),
        ("row", pa.int64()),
        ("size", pa.int64()),
    ]
)
SET_ASIDE = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("location", pa.string()), ("reason", pa.string())]
)
Column: TypeAlias = Any  # a sequence, or a numpy or Arrow array
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
LARGEST_LABEL = 10**6  # of classes that have numbers for names


class Source(Protocol):
    """A source of videos also says `clips = True`; one of other arrays `tensors = True`, and their `shape`."""

    class_names: list[str]

    def __init__(self, config: DataSection) -> None: ...

    def splits(self) -> list[str]:
        """The splits that the layout holds: ["train"] or ["train", "test"]."""

    def listing(self, split: str) -> pa.Table:
        """Every sample of a split (schema LISTING)."""

    def digest(self, split: str) -> str:
        """A hash that changes when the samples of the split change; must not read all pixels."""

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        """The raw form of some rows of a listing, in order: encoded bytes, or a uint8 array H x W (x C).

        Of a source of other arrays: arrays of numbers; one of type object is rejected.
        """


def listing(
    ids: Column, labels: Column, locations: Column, rows: Column, sizes: Column | None = None
) -> pa.Table:  # fmt: skip
    """Builds a listing from columns: sequences, numpy or Arrow arrays, all of one length; without sizes they are 0.

    Raises UserError for a repeated id, naming it and where it occurs.
    """
    given = [ids, labels, locations, rows, np.zeros(len(ids), np.int64) if sizes is None else sizes]
    table = pa.table([_column(c, field.type) for c, field in zip(given, LISTING, strict=True)], schema=LISTING)
    if (twice := repeated(table["sample_id"])) is not None:
        places = table["location"].filter(pc.equal(table["sample_id"], twice)).to_pylist()[:2]
        raise UserError(
            f"the sample id {twice!r} occurs twice (in {' and '.join(places)}); ids must be unique within a split: "
            "remove or rename one of the two"
        )
    return table


def repeated(values: pa.ChunkedArray) -> str | None:
    """A text that occurs more than once, or None; sorts, which takes less time and memory than a table of all texts."""
    sorted_values = values.take(pc.sort_indices(values)).combine_chunks()
    if len(sorted_values) < 2:
        return None
    same = sorted_values[1:].filter(pc.equal(sorted_values[1:], sorted_values[:-1]))
    return same[0].as_py() if len(same) else None


def _column(values: Column, kind: pa.DataType) -> Any:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values.cast(kind)
    return pa.array(values, kind)


def data_store(config: DataSection) -> Store:
    """The folder or URI named by data.path.

    Raises UserError where it is missing from the configuration, and Unreachable where there is none or it does not answer.
    """
    if config.path is None:
        raise UserError(f"data.path is not set; the source {config.source!r} needs the folder that holds the data")
    return Store(config.path)


def split_of(name: str) -> str | None:
    """Which split a folder or file name belongs to: `train*` or `val*|validation*|test*`."""
    word = split_word(name)
    return next((split for split, words in SPLIT_NAMES.items() if word in words), None)


def split_word(name: str) -> str | None:
    """The word of SPLIT_NAMES that a folder or file name begins with."""
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return word if any(word in words for words in SPLIT_NAMES.values()) else None


def labelled(tests: Mapping[str, str | None]) -> list[str]:
    """Of the files or folders of the test split, given with their words, those to use.

    They are those of a validation split where there are any: where there are both, "test" often comes without labels.
    """
    return [name for name, word in tests.items() if word != "test"] or list(tests)

"""The contract of a source, and the listing that every source returns.

A listing is an Arrow table with the columns sample_id (string, unique), label (int32), location (string), row (int64)
and size (int64, bytes; 0 where unknown): whatever the source needs to find the sample again. In an archive `row` is the
byte offset. Rows come in the order in which they are best read. Splits are called "train" and "test".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from distill_at_scale.config import DataSection
from distill_at_scale.errors import UserError

LISTING = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("location", pa.string()),
        ("row", pa.int64()),
        ("size", pa.int64()),
    ]
)
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class Source(Protocol):
    class_names: list[str]

    def __init__(self, config: DataSection) -> None: ...

    def splits(self) -> list[str]:
        """The splits that the layout holds: ["train"] or ["train", "test"]."""

    def listing(self, split: str) -> pa.Table:
        """Every sample of a split (schema LISTING)."""

    def digest(self, split: str) -> str:
        """A hash that changes when the samples of the split change; must not read all pixels."""

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        """The raw form of some rows of a listing, in order: encoded bytes, or a uint8 array H x W (x C)."""


def listing(
    ids: Sequence[str], labels: Sequence[int], locations: Sequence[str], rows: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> pa.Table:  # fmt: skip
    """Builds a listing.

    Raises UserError for a repeated id, naming it.
    """
    table = pa.table([pa.array(ids, pa.string()), np.asarray(labels, np.int32), pa.array(locations, pa.string()),
                      np.asarray(rows, np.int64), np.asarray([0] * len(ids) if sizes is None else sizes, np.int64)],
                     schema=LISTING)  # fmt: skip
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise UserError(f"the sample id {twice!r} occurs twice; ids must be unique within a split")
    return table


def data_root(config: DataSection) -> Path:
    """The folder named by data.path.

    Raises UserError where it is missing from the configuration or from the disk.
    """
    if config.path is None:
        raise UserError(f"data.path is not set; the source {config.source!r} needs the folder that holds the data")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path = {config.path!r}: there is no such folder; give the data set's root folder")
    return root


def split_of(name: str) -> str | None:
    """Which split a folder or file name belongs to: `train*` or `val*|validation*|test*`."""
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLIT_NAMES.items() if word in words), None)

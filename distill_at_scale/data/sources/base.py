"""The contract of a source, and helpers that sources share.

A source says which samples exist and reads the raw bytes of some of them. It decodes nothing. `data.source` names one of the
table in `__init__.py`, or an object of your own as `package.module:Object`: a class, or anything else that returns a source
when called with the section `data` of the configuration (`DataSection`); its `options` are your own settings. Sources run in
many processes at once and must be picklable.

Required (see `Source` for the types):
- `class_names`: list[str], the class of label i at place i.
- `splits()`: ["train"] or ["train", "test"]; a source that holds only a test split returns ["test"].
- `listing(split)`: a `pyarrow.Table` with schema LISTING, a row for each sample:
    sample_id (string), unique within the split and the same in every run: scores, manifests and seeds refer to it;
    label (int32), in 0..len(class_names)-1;
    location (string) and row (int64), with which the source finds the sample again, such as a path and a row number, or an
    archive and a byte offset;
    size (int64), the stored bytes, 0 if unknown.
  Order the rows as they are read fastest: consecutive rows are read together. `listing(...)` below builds and checks the table.
- `digest(split)`: a short str that changes when ids, labels or content of the split change. It decides whether finished
  stages are reused, so it must be deterministic. It should not read all samples.
- `read(rows)`: takes some rows of a listing (a `pyarrow.Table`) and returns one item for each, in their order: encoded bytes
  (an image or video file), or a uint8 array [H, W] or [H, W, C] with C = 1 or 3. A source of tensors returns numeric arrays
  of `shape`.

Optional:
- `clips = True`: samples are videos, returned as encoded bytes.
- `tensors = True` and `shape` (tuple of 1 to 4 ints, channels first): samples are other arrays of numbers.
- `set_aside(split)`: a `pyarrow.Table` with schema SET_ASIDE of listed samples without a file and of files that cannot be
  used; label -1 if unknown. These samples are not in the listing; they go to `rejected.parquet` with their reason.
- `notes()`: list[str], lines for the user on choices that the source made, such as a split that it does not use.

Errors. Raise `UserError` for a layout that cannot be used (what is wrong, then what to do): the command prints it and stops.
Raise `Unreachable` for storage that does not answer: the read is tried again. Whatever else `read` raises for a sample rejects
that sample with the error as its reason, except an OSError of the disk or the network and MemoryError, which stop the run.
Return broken bytes as they are; the decoder rejects them. An item may also be a `SampleRejected` (data/codecs/image.py) with
the reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import Store

TEXT, INT32, INT64 = pa.string(), pa.int32(), pa.int64()
LISTING = pa.schema({"sample_id": TEXT, "label": INT32, "location": TEXT, "row": INT64, "size": INT64})
SET_ASIDE = pa.schema({"sample_id": TEXT, "label": INT32, "location": TEXT, "reason": TEXT})
Column: TypeAlias = Any  # a sequence, or a numpy or Arrow array
# the first that a data set has is its test split: "test" often has no labels
EVALUATION = ("val", "dev", "eval", "test")
SPLIT_WORDS = {  # words in the name of a file or folder that name its split
    "train": ("train", "training", "trainset", "trn", "tr"),
    "val": ("val", "valid", "validation", "validate", "valset"),
    "dev": ("dev", "devel", "development", "devset"),
    "eval": ("eval", "evaluation", "evaluate"),
    "test": ("test", "testing", "testset", "tst"),
}
UNCLEAR_WORDS = (  # words that name a part of a data set, but not one to train or to test on
    "trainval", "valtrain", "traindev", "minival", "minitrain", "holdout", "heldout", "unlabeled", "unlabelled", "extra",
    "query", "gallery", "distractor", "distractors", "challenge", "submission",
)  # fmt: skip
MAX_LABEL = 10**6  # of numbered classes


class Source(Protocol):
    """The module's docstring describes each member."""

    class_names: list[str]

    def __init__(self, data: DataSection) -> None: ...

    def splits(self) -> list[str]: ...

    def listing(self, split: str) -> pa.Table: ...

    def digest(self, split: str) -> str: ...

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]: ...


class FileSource:
    """Base of sources whose samples are single files; a subclass lists them."""

    def __init__(self, data: DataSection) -> None:
        self.config, self.store = data, data_store(data)

    def listing(self, split: str) -> pa.Table:
        raise NotImplementedError

    def digest(self, split: str) -> str:
        """A hash of ids, labels and sizes; opens no file."""
        table = self.listing(split)
        sha = hashlib.sha256("\n".join(table["sample_id"].to_pylist()).encode(errors="surrogateescape"))
        for column in ("label", "size"):
            sha.update(np.ascontiguousarray(table[column].to_numpy(), np.int64).tobytes())
        return sha.hexdigest()

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        return self.store.read_many(rows["location"].to_pylist())


def listing(ids: Column, labels: Column, locations: Column, rows: Column, sizes: Column | None = None) -> pa.Table:
    """Builds a listing from columns of one length; sizes default to 0.

    Raises UserError for a repeated id, naming it and its locations.
    """
    table = to_table([ids, labels, locations, rows, np.zeros(len(ids), np.int64) if sizes is None else sizes], LISTING)
    if (repeated := first_duplicate(table["sample_id"])) is not None:
        places = table["location"].filter(pc.equal(table["sample_id"], repeated)).to_pylist()[:2]
        problem = f"the sample id {repeated!r} occurs twice (in {' and '.join(places)})"
        raise UserError(f"{problem}; ids must be unique within a split: remove or rename one of the two")
    return table


def set_aside_table(ids: Column, labels: Column, reasons: Column, locations: Column | None = None) -> pa.Table:
    """A table with schema SET_ASIDE; locations default to the ids."""
    return to_table([ids, labels, ids if locations is None else locations, reasons], SET_ASIDE)


def to_table(columns: Sequence[Column], schema: pa.Schema) -> pa.Table:
    """A table from columns (sequences, numpy or Arrow arrays), cast to the schema's types."""
    arrays = [
        column.cast(field.type) if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.table(arrays, schema=schema)


def rows_to_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return to_table(list(zip(*rows, strict=True)) if rows else [[]] * len(schema), schema)


def first_duplicate(values: pa.ChunkedArray) -> str | None:
    """A string that occurs more than once, or None. Sorting takes less time and memory than a table of all strings."""
    sorted_values = values.take(pc.sort_indices(values)).combine_chunks()
    if len(sorted_values) < 2:
        return None
    same = sorted_values[1:].filter(pc.equal(sorted_values[1:], sorted_values[:-1]))
    return same[0].as_py() if len(same) else None


def data_store(config: DataSection) -> Store:
    """The folder or URI that data.path names.

    Raises UserError if data.path is not set, and Unreachable if there is no such folder or it does not answer.
    """
    if config.path is None:
        raise UserError(f"data.path is not set; the source {config.source!r} needs the folder that holds the data")
    return Store(config.path)


def split_word(path: str) -> str | None:
    """What a path (POSIX, below the root) says about its split: "train", "val", "dev", "eval", "test", "unclear" or None.

    The file or the last folder decides if its name has a word of SPLIT_WORDS, else the nearest folder above that has one. Case
    does not matter; words end at anything but letters, and at a capital after a small letter: `parquet_dev`, `my-train`,
    `train2017`, `TestImages`. A name is unclear if it has words of two splits, or one of UNCLEAR_WORDS and no other.
    """
    for name in reversed(path.split("/")):
        words = {word.lower() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name)}
        if splits := [split for split, known in SPLIT_WORDS.items() if words.intersection(known)]:
            return splits[0] if len(splits) == 1 else "unclear"
        if words.intersection(UNCLEAR_WORDS):
            return "unclear"
    return None


def by_split(paths: Sequence[str], store: Store) -> dict[str, list[str]]:
    """Groups the files of a data set by split: "train", "test" and "unused" -> paths, in their order.

    - Without a file that says "train", files that say nothing are training data.
    - The test split is the first of EVALUATION that has files. The files of the others are unused.

    Raises UserError for a file whose name is unclear, or that says nothing next to files that say "train": it may hold
    evaluation data.
    """
    words = {path: split_word(path) for path in paths}
    has_train, test = "train" in words.values(), next((s for s in EVALUATION if s in words.values()), "")
    for path, word in words.items():
        if word == "unclear" or (word is None and has_train):
            raise unclear_name(store, path)
    splits: dict[str, list[str]] = {}
    for path, word in words.items():
        splits.setdefault({None: "train", "train": "train", test: "test"}.get(word, "unused"), []).append(path)
    return splits


def unclear_name(store: Store, path: str) -> UserError:
    problem = f"{store.place(path)}: the name does not say whether this is training or test data"
    return UserError(f"{problem}; rename it (for example to train, val or test), or move it out of {store.place()}")


def unused_split(used: str, unused: Sequence[str]) -> str:
    """A line for `Source.notes` on evaluation splits that are not used: paths of one that is used, and of the others."""
    names = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
    return f"{used} is the test split; not used: {names} (the order of precedence is {', '.join(EVALUATION)})"

"""Reads a score table as two streams: numbers class by class, and ids in batches, so that memory never holds a class's ids.

Rows should be sorted by label and sample id, which is checked on the way; a small unsorted table is sorted in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.parquet import BATCH, open_table, reading
from distill_at_scale.pruning.selection.held_out import HeldOut

SORTABLE = 5_000_000  # an unsorted table of fewer rows is sorted in memory
ORDER = ("label", "sample_id")
NOTHING = HeldOut()


def label_runs(labels: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
    """(label, start, end) of each run of equal labels [n]."""
    if len(labels):
        ends = [*(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
        yield from ((int(labels[start]), start, end) for start, end in itertools.pairwise([0, *ends]))


class Unsorted(Exception):
    """The rows are not in ascending order of label and sample id; the message says where."""


@dataclass(frozen=True)
class ScoreReader:
    """A score table on disk or in memory, and the part of it that is held out.

    Raises UserError if it is missing, damaged, or has no columns sample_id and label.
    """

    source: Path | pa.Table
    held_out: HeldOut = NOTHING

    @cached_property
    def schema(self) -> pa.Schema:
        return self.source.schema if isinstance(self.source, pa.Table) else self._open().schema_arrow

    @cached_property
    def rows(self) -> int:
        return self.source.num_rows if isinstance(self.source, pa.Table) else self._open().metadata.num_rows

    def classes(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """`whole_classes` without the rows that are held out."""
        for label, rows in self.whole_classes(columns):
            held = self.held_out.mask(label, rows.num_rows)
            yield label, rows.filter(pa.array(~held)) if held.any() else rows

    def whole_classes(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(label, its rows with label and `columns`), labels ascending.

        Raises Unsorted if they are not, and UserError for labels that are missing or not class numbers.
        """
        last, batches = -1, self._batches(["label", *columns])
        runs = (
            (label, batch.slice(start, end - start))
            for batch in batches
            for label, start, end in label_runs(batch["label"].to_numpy())
        )
        for label, parts in itertools.groupby(runs, key=itemgetter(0)):
            if label < last:
                raise Unsorted(f"label {label} comes after label {last}")
            yield label, pa.Table.from_batches([part for _, part in parts])
            last = label

    def ids(self) -> Iterator[pa.Array]:
        """The sample ids of all rows, batch by batch, read ahead in a thread.

        Raises Unsorted if they do not ascend by label and id, and UserError for a missing or repeated id.
        """
        return prefetch(self._checked_ids(), 16)

    def _checked_ids(self) -> Iterator[pa.Array]:
        last: tuple[int, str] | None = None
        for batch in self._batches(ORDER):
            labels, ids = batch["label"].to_numpy(), batch["sample_id"]
            if ids.null_count:
                raise UserError(f"{self}: {ids.null_count} rows have no sample_id; run `score` again")
            first, end = ((int(labels[k]), ids[k].as_py()) for k in (0, -1))
            ascends = pc.less(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero((labels[1:] < labels[:-1]) | ((labels[1:] == labels[:-1]) & ~ascends))
            if wrong.size:
                before, row = ((int(labels[i]), ids[i].as_py()) for i in (int(wrong[0]), int(wrong[0]) + 1))
                self._refuse(row, before)
            if last is not None and first <= last:
                self._refuse(first, last)
            last = end
            yield ids

    def _refuse(self, row: tuple[int, str], before: tuple[int, str]) -> None:
        if row == before:
            raise UserError(f"{self}: the sample {row[1]!r} appears twice; run `score` again")
        raise Unsorted(f"{row[1]!r} of label {row[0]} comes after {before[1]!r} of label {before[0]}")

    def id_of(self, row: int) -> str:
        """The sample id of one row, for a message."""
        for batch in self._batches(ORDER):
            if row < batch.num_rows:
                return str(batch["sample_id"][row])
            row -= batch.num_rows
        raise IndexError(row)

    def sorted(self, why: Unsorted) -> ScoreReader:
        """The same rows in order, in memory. Raises UserError if they are too many for that."""
        if self.rows >= SORTABLE:
            raise UserError(
                f"the {self.rows} rows of {self} are not sorted by label and sample_id ({why}), and too many to sort them "
                "here; sort them by these two columns, or run `score` again"
            )
        table = pa.Table.from_batches(list(self._batches(self.schema.names)), self.schema)
        return replace(self, source=table.sort_by([(name, "ascending") for name in ORDER]))

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "the score table"

    def _open(self) -> pq.ParquetFile:
        return open_table(Path(self.source), "score", ("sample_id", "label"), "score table")

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, label among them, of all rows in file order, in batches that are not empty."""
        if isinstance(self.source, pa.Table):
            parts = self.source.select(columns).to_batches(BATCH)
        else:  # a reader per stream: two threads must not share a ParquetFile
            parts = self._open().iter_batches(BATCH, columns=list(columns))
        with reading(self.source, "score") if isinstance(self.source, Path) else nullcontext():
            for batch in filter(len, parts):
                labels = batch["label"]
                if not pa.types.is_integer(labels.type) or labels.null_count or pc.min(labels).as_py() < 0:
                    raise UserError(f"{self}: the column label must hold class numbers from 0 on; run `score` again")
                yield batch

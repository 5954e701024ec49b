"""A table of scored samples, read as two streams: the numbers class after class, and the ids some at a time.

Ids are most of the bytes and need no ranking, so memory holds the numbers of the largest class and never its ids. Rows
should come sorted by label and sample id, which is proved on the way; a smaller table that is not sorted is sorted in
memory. Left out: a class whose numbers do not fit into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from distill_at_scale.data.prepared.parquet import BATCH, batches, open_table, reading

SORTABLE = 5_000_000  # a table of fewer rows is sorted in memory if need be
ORDER = ("label", "sample_id")

Array = np.ndarray[Any, Any]


class Unsorted(Exception):
    """The rows are not in ascending order of label and sample id; the message says where."""


@dataclass(frozen=True)
class ScoreReader:
    """A score table, on disk or in memory.

    Raises UserError where it is missing, damaged, or has no columns sample_id and label.
    """

    source: Path | pa.Table

    @cached_property
    def schema(self) -> pa.Schema:
        return self.source.schema if isinstance(self.source, pa.Table) else self._file.schema_arrow

    @cached_property
    def rows(self) -> int:
        return self.source.num_rows if isinstance(self.source, pa.Table) else self._file.metadata.num_rows

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows, as they lie; read ahead in another thread."""
        return prefetch(self._batches(columns), 16)

    def classes(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(label, its rows with label and `columns`), labels ascending.

        Raises Unsorted where they are not, and UserError for labels that are missing or no class numbers.
        """
        last = -1
        for label, parts in itertools.groupby(self._runs(["label", *columns]), key=itemgetter(0)):
            if label < last:
                raise Unsorted(f"label {label} comes after label {last}")
            yield label, pa.Table.from_batches([part for _, part in parts])
            last = label

    def ids(self) -> Iterator[pa.Array]:
        """The sample ids of all rows, some at a time, proved to ascend by label and id; read ahead in another thread.

        Raises Unsorted where they do not, and UserError for an id that is missing, or there twice in its class.
        """
        return prefetch(self._proved_ids(), 16)

    def id_of(self, row: int) -> str:
        """The sample id of one row, for a message."""
        for batch in self._batches(["sample_id"]):
            if row < batch.num_rows:
                return str(batch["sample_id"][row])
            row -= batch.num_rows
        raise IndexError(row)

    def sorted(self, why: Unsorted) -> ScoreReader:
        """The same rows in order, in memory.

        Raises UserError where they are too many for that.
        """
        if self.rows >= SORTABLE:
            raise UserError(
                f"the {self.rows} rows of {self} are not sorted by label and sample_id ({why}), and too many to be sorted "
                "here; sort them by these two columns, or run `score` again"
            )
        table = pa.Table.from_batches(list(self._batches(self.schema.names)), self.schema)
        return ScoreReader(table.sort_by([(name, "ascending") for name in ORDER]))

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "the score table"

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return self._open()

    def _open(self) -> pq.ParquetFile:
        return open_table(Path(self.source), "score", ("sample_id", "label"), "score table")

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if isinstance(self.source, pa.Table):
            yield from self.source.select(columns).to_batches(BATCH)
        else:
            file = self._open()  # one of its own: two threads that read through one ParquetFile disturb each other
            with reading(self.source, "score"):
                yield from batches(file, columns)

    def _runs(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(label, slice of one batch and one label), as they lie."""
        for batch in self._batches(columns):
            if batch.num_rows:
                self._check_labels(batch["label"])
                labels = batch["label"].to_numpy()
                starts = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
                for start, end in itertools.pairwise(starts):
                    yield int(labels[start]), batch.slice(start, end - start)

    def _proved_ids(self) -> Iterator[pa.Array]:
        """Ids in order within and across batches; one row is carried over."""
        last: tuple[int, str] | None = None
        for batch in self._batches(ORDER):
            if batch.num_rows:
                self._check_labels(batch["label"])
                first, end = ((batch["label"][k].as_py(), batch["sample_id"][k].as_py()) for k in (0, -1))
                self._check_order(batch)
                if last is not None and first <= last:
                    self._complain(first, last)
                last = end
                yield batch["sample_id"]

    def _check_labels(self, labels: pa.Array) -> None:
        if not pa.types.is_integer(labels.type) or labels.null_count or pc.min(labels).as_py() < 0:
            raise UserError(f"{self}: the column label must hold class numbers from 0 on; run `score` again")

    def _check_order(self, batch: pa.RecordBatch) -> None:
        """Raises at the first row that does not come after the one before it."""
        labels, ids = batch["label"].to_numpy(), batch["sample_id"]
        if ids.null_count:
            raise UserError(f"{self}: {ids.null_count} rows have no sample_id; run `score` again")
        within = labels[1:] == labels[:-1]
        after = pc.less(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero((labels[1:] < labels[:-1]) | (within & ~after))).size:
            k = int(wrong[0])
            row, before = ((int(labels[i]), ids[i].as_py()) for i in (k + 1, k))
            self._complain(row, before)

    def _complain(self, row: tuple[int, str], before: tuple[int, str]) -> None:
        if row == before:
            raise UserError(f"{self}: the sample {row[1]!r} is there twice; run `score` again")
        raise Unsorted(f"{row[1]!r} of label {row[0]} comes after {before[1]!r} of label {before[0]}")

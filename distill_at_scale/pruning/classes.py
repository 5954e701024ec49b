"""A table of scored samples, class after class, in memory that holds the largest class and not the table.

Rows should come sorted by label and sample id, which is proved on the way; a smaller table that is not sorted is sorted
in memory. Left out: a single class that does not fit into memory (a class is handed out whole).
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

from distill_at_scale.data.rowgroups import BATCH, ahead, batches, open_table, reading
from distill_at_scale.errors import UserError

SORTABLE = 5_000_000  # a table of fewer rows is sorted in memory if need be
ORDER = ("label", "sample_id")

Array = np.ndarray[Any, Any]


class Unsorted(Exception):
    """The rows are not in ascending order of label and sample id; the message says where."""


@dataclass(frozen=True)
class Samples:
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
        return ahead(self._batches(columns))

    def classes(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(label, sample_id and `columns` of its rows), labels ascending, rows by ascending id.

        Raises Unsorted where the rows lie otherwise, and UserError for an id that is there twice, and for labels that are
        missing or no class numbers.
        """
        runs = _runs(ahead(self._proved(columns)))
        for label, parts in itertools.groupby(runs, key=itemgetter(0)):
            yield label, pa.Table.from_batches([part for _, part in parts])

    def sorted(self, why: Unsorted) -> Samples:
        """The same rows in order, in memory.

        Raises UserError where they are too many for that.
        """
        if self.rows >= SORTABLE:
            raise UserError(
                f"the {self.rows} rows of {self} are not sorted by label and sample_id ({why}), and too many to be sorted "
                "here; sort them by these two columns, or run `score` again"
            )
        table = pa.Table.from_batches(list(self._batches(self.schema.names)), self.schema)
        return Samples(table.sort_by([(name, "ascending") for name in ORDER]))

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "the score table"

    @cached_property
    def _file(self) -> Any:
        return open_table(Path(self.source), "score", ("sample_id", "label"), "score table")

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if isinstance(self.source, pa.Table):
            yield from self.source.select(columns).to_batches(BATCH)
        else:
            with reading(self.source, "score"):
                yield from batches(self._file, columns)

    def _proved(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches whose rows are in order, within and across them; at most one row is carried over."""
        last: tuple[int, str] | None = None
        for batch in self._batches([*ORDER, *columns]):
            if batch.num_rows:
                self._check_labels(batch["label"])
                first = (batch["label"][0].as_py(), batch["sample_id"][0].as_py())
                if last is not None and first <= last:
                    self._complain(first, last)
                self._check_order(batch)
                last = (batch["label"][-1].as_py(), batch["sample_id"][-1].as_py())
                yield batch

    def _check_labels(self, labels: pa.Array) -> None:
        if not pa.types.is_integer(labels.type) or labels.null_count or labels[0].as_py() < 0:
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


def _runs(ordered: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(label, slice of one batch and one label), in order."""
    for batch in ordered:
        labels = batch["label"].to_numpy()
        starts = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
        rows = batch.drop_columns("label")
        for start, end in itertools.pairwise(starts):
            yield int(labels[start]), rows.slice(start, end - start)

"""scores.parquet: joins the scored part files by sample id, checks that every sample is there once, and publishes the table.

Columns: sample_id, label, one float32 column per criterion, `score` (a copy of the first), and float32 lists
`<criterion>_values` [trials * epochs]. Rows are sorted by label and id; the metadata is ScoreColumns.facts, as JSON under
KEY. Memory holds some parts and a row group, or one class if a criterion compares the samples of a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.parquet import RowGroupWriter, check_rows, facts_of, open_table, reading
from distill_at_scale.pruning.scoring.columns import ExtraColumns, ScoreColumns, ScoredPart

ROWS = 2**16  # per row group
KEY = "scores"
REQUIRED = ("label", "sample_id", "score")


def write_scores(
    path: Path, parts: Sequence[Path], expected: Iterable[pa.Array], config: Config, extra: ExtraColumns | None = None
) -> dict[str, Any]:
    """Publish the scored parts as one table; its bytes depend on the rows alone.

    Args:
        parts: part files of the scorers, in the order of the prepared data.
        expected: for each part, the ids of its samples; sorted by label and id over all parts.
        extra: columns that do not come from proxies, by name.

    Returns:
        rows, mean_score.

    Raises:
        UserError: a part is missing or damaged; an expected id is missing, repeated, or was not expected.
    """
    rows = zip(parts, expected, prefetch(map(_read_part, parts), 16), strict=True)
    return _publish(path, ((part, _in_order(part, table, ids)) for part, ids, table in rows), config, extra)


def write_unscored(
    path: Path, rows: Iterable[pa.Table], config: Config, extra: ExtraColumns | None = None
) -> dict[str, Any]:
    """The same if no criterion needs proxies; `rows` have sample_id and label, sorted by label and id."""
    return _publish(path, ((path, table.select(["sample_id", "label"])) for table in rows), config, extra)


def _publish(path: Path, parts: Iterable[ScoredPart], config: Config, extra: ExtraColumns | None) -> dict[str, Any]:
    columns, sums, rows = ScoreColumns(config, extra or {}), [], 0
    statistics = ["label", "score", *columns.names]
    encoding = {"compression": "zstd", "use_dictionary": ["label"], "write_statistics": statistics}
    with publish(path) as temporary, RowGroupWriter(temporary, columns.schema, KEY, ROWS, **encoding) as out:
        for scores in columns.build(parts):
            out.append(scores)
            sums.append(float(scores["score"].to_numpy().sum(dtype=np.float64)))
            rows += scores.num_rows
        out.facts = columns.facts
    return {"rows": rows, "mean_score": math.fsum(sums) / rows if rows else math.nan}


def _read_part(part: Path) -> pa.Table:
    with reading(part, "score"):
        return pq.ParquetFile(part).read(use_threads=False)


def _in_order(part: Path, table: pa.Table, expected: pa.Array) -> pa.Table:
    """The rows of a part in the order of the expected ids; UserError unless it has each of them once and no other."""
    ids, remedy = table["sample_id"].combine_chunks(), "remove that file and run `score` again"
    if ids.equals(expected):
        return table
    if missing := _difference(expected, ids):
        raise UserError(f"{len(missing)} samples have no score, for example {min(missing)!r} in {part}; {remedy}")
    if unknown := _difference(ids, expected):
        raise UserError(
            f"{len(unknown)} scores belong to no sample of this data set, for example {min(unknown)!r} in {part}; {remedy}"
        )
    if len(ids) != len(expected):
        raise UserError(f"{len(ids) - len(expected)} samples are scored more than once in {part}; {remedy}")
    return table.take(pc.index_in(expected, ids))


def _difference(first: pa.Array, second: pa.Array) -> set[str]:
    return set(first.filter(pc.invert(pc.is_in(first, second))).to_pylist())


def read(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """All rows, with some columns or all, and the metadata; for tables that fit into memory.

    Raises UserError if the file is missing, is not a score table, or has no such column.
    """
    file = open_table(path, "score", [*REQUIRED, *(columns or [])], "score table")
    with reading(path, "score"):
        table = file.read(columns)
    if columns is None or {"sample_id", "label"} <= set(columns):
        check_rows(table, path, "score")
    return table, facts_of(file, KEY)


def facts(path: Path) -> dict[str, Any]:
    """The metadata alone, from the footer of the file."""
    return facts_of(open_table(path, "score", REQUIRED, "score table"), KEY)

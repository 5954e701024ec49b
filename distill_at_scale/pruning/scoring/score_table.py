"""scores.parquet: joining the scored pieces by sample id, proving that none is missing or doubled, and publishing.

Columns: sample_id, label, one float32 column per criterion, `score` (the first of them) and, behind every criterion that
has values per checkpoint, these as `<criterion>_values`, float32 lists [trials * epochs], trial by trial. Rows are sorted by
label and id. The file's metadata holds, under `scores`: trials and epochs that were trained, `criteria` in their order, each
one's `useful` end, the epochs that each looked at (`observed`), and how well the trials behind the first one agree.
Pieces stream through: memory holds some of them and a row group (for criteria of whole classes: one class), never the
table. Left out: how values become scores (`columns.py`), and what is kept (`pruning/selection/select.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.parquet import RowGroupWriter, check_rows, facts_of, open_table, reading
from distill_at_scale.pruning.scoring.columns import Column, ScoreColumns, ScoredPart

Array = np.ndarray[Any, Any]

ROWS = 2**16  # of a row group: pieces are merged and cut to it
KEY = "scores"
REQUIRED = ("label", "sample_id", "score")


def write_scores(
    path: Path,
    pieces: Sequence[Path],
    expected: Iterable[pa.Array],
    config: Config,
    more: Mapping[str, Column] | None = None,
) -> dict[str, Any]:
    """Publish the pieces as one table and return its facts: rows, mean_score.

    Piece by piece and in order, `expected` has the ids of its samples, sorted by label and id over all; `more` has scores
    that no checkpoint makes, by the names of their columns. The bytes depend on the rows alone. Raises UserError where a
    piece is missing or damaged, or where an expected id is missing, is there twice, or was not expected.
    """
    read = zip(pieces, expected, prefetch(map(_read_piece, pieces), 16), strict=True)
    return _publish(path, ((piece, in_order(piece, table, ids)) for piece, ids, table in read), config, more)


def write_unscored(
    path: Path, rows: Iterable[pa.Table], config: Config, more: Mapping[str, Column] | None = None
) -> dict[str, Any]:
    """The same where no criterion needs a checkpoint: `rows` have sample_id and label, sorted by label and id over all."""
    return _publish(path, ((path, table.select(["sample_id", "label"])) for table in rows), config, more)


def _publish(
    path: Path, parts: Iterable[ScoredPart], config: Config, more: Mapping[str, Column] | None
) -> dict[str, Any]:
    columns, sums, rows = ScoreColumns(config, more or {}), [], 0
    encoding = _encoding(columns.names)
    with publish(path) as temporary, RowGroupWriter(temporary, columns.schema, KEY, ROWS, **encoding) as out:
        for scores in columns.of(parts):
            out.append(scores)
            sums.append(float(scores["score"].to_numpy().sum(dtype=np.float64)))
            rows += scores.num_rows
        out.facts = columns.facts
    return {"rows": rows, "mean_score": math.fsum(sums) / rows if rows else math.nan}


def in_order(piece: Path, table: pa.Table, expected: pa.Array) -> pa.Table:
    """The rows of a piece in the order of the expected ids.

    Raises UserError unless it holds every expected id exactly once and no other.
    """
    found = table["sample_id"].combine_chunks()
    if found.equals(expected):
        return table
    if missing := _difference(expected, found):
        raise UserError(
            f"{len(missing)} samples have no score, for example {min(missing)!r} in {piece}; remove that file and run "
            "`score` again"
        )
    if extra := _difference(found, expected):
        raise UserError(
            f"{len(extra)} scores belong to no sample of this data set, for example {min(extra)!r} in {piece}; remove that "
            "file and run `score` again"
        )
    if len(found) != len(expected):
        raise UserError(
            f"{len(found) - len(expected)} samples are scored more than once in {piece}; remove that file and run `score` "
            "again"
        )
    return table.take(pc.index_in(expected, found))


def read(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """All rows, of some columns or of all, and the facts; for what fits into memory.

    Raises UserError where the file is missing or is no score table, or has no such column.
    """
    file = open_table(path, "score", [*REQUIRED, *(columns or [])], "score table")
    with reading(path, "score"):
        table = file.read(columns)
    if columns is None or {"sample_id", "label"} <= set(columns):
        check_rows(table, path, "score")
    return table, facts_of(file, KEY)


def facts(path: Path) -> dict[str, Any]:
    """The facts alone, from the file's footer."""
    return facts_of(open_table(path, "score", REQUIRED, "score table"), KEY)


def within_class_spearman(first: Array, second: Array, labels: Array) -> tuple[float, float]:
    """Mean and standard deviation over classes of Spearman's rank correlation between two score vectors."""
    values = [spearmanr(first[labels == c], second[labels == c]).statistic for c in np.unique(labels)]
    return float(np.mean(values)), float(np.std(values))


def _encoding(names: Iterable[str]) -> dict[str, Any]:
    return {"compression": "zstd", "use_dictionary": ["label"], "write_statistics": ["label", "score", *names]}


def _read_piece(piece: Path) -> pa.Table:
    with reading(piece, "score"):
        return pq.ParquetFile(piece).read(use_threads=False)


def _difference(first: pa.Array, second: pa.Array) -> set[str]:
    return set(first.filter(pc.invert(pc.is_in(first, second))).to_pylist())

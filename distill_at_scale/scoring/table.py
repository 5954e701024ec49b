"""scores.parquet: joining the scored pieces by sample id, proving that none is missing or doubled, and aggregating.

Columns: sample_id, label, one float32 column per criterion, `score` (the first of them) and, behind every criterion,
its values `<criterion>_values` as float32 lists [trials * epochs], trial by trial. Rows are sorted by label and id.
The schema's metadata holds, under `scores`, the shape of the lists and each criterion's direction. Pieces stream through:
memory holds some of them and a row group, never the table. Left out: what is kept (`pruning/static.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from distill_at_scale.config import Config
from distill_at_scale.data.prefetch import ahead
from distill_at_scale.data.rowgroups import RowGroupWriter, facts_of, open_table, reading
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import publish
from distill_at_scale.scoring.criteria.base import Criterion
from distill_at_scale.scoring.scorer import criteria_of

Array = np.ndarray[Any, Any]

ROWS = 2**16  # of a row group: pieces are merged and cut to it
KEY = "scores"
REQUIRED = ("label", "sample_id", "score")


def write_scores(path: Path, pieces: Sequence[Path], expected: Iterable[pa.Array], config: Config) -> dict[str, Any]:
    """Publish the pieces as one table and return its facts: rows, mean_score.

    Piece by piece and in order, `expected` has the ids of its samples, sorted by label and id over all. The bytes depend
    on the rows alone. Raises UserError where a piece is missing or damaged, or where an expected id is missing, is there
    twice, or was not expected.
    """
    criteria, sums, rows = criteria_of(config.score.criteria), [], 0
    encoding = _encoding([_column(name) for name in criteria])
    with (
        publish(path) as temporary,
        RowGroupWriter(temporary, _schema(criteria, config), KEY, ROWS, **encoding) as out,
    ):
        for piece, ids, table in zip(pieces, expected, ahead(map(_read_piece, pieces), 16), strict=True):
            scores = aggregate(piece, in_order(piece, table, ids), criteria, config.score.checkpoints)
            out.append(scores)
            sums.append(float(scores["score"].to_numpy().sum(dtype=np.float64)))
            rows += scores.num_rows
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


def aggregate(
    piece: Path, table: pa.Table, criteria: Mapping[str, Criterion], checkpoints: tuple[int, int]
) -> pa.Table:
    """The published columns of a piece's rows; `checkpoints` is (trials, epochs).

    Raises UserError where the values do not fit them, or a criterion does not make one score of every sample's.
    """
    columns: dict[str, Any] = {"sample_id": table["sample_id"], "label": table["label"]}
    for name, criterion in criteria.items():
        values = matrix(table[name])
        if values.shape[1] != math.prod(checkpoints):
            raise UserError(
                f"{piece} holds {values.shape[1]} values of {name} per sample, not {math.prod(checkpoints)}; remove the "
                "score work folder and run `score` again"
            )
        score = np.asarray(criterion.aggregate(values.reshape(-1, *checkpoints)), np.float32)
        if score.shape != (len(values),):
            raise UserError(
                f"the criterion {name} makes scores of shape {score.shape} of {len(values)} samples; its aggregate must "
                "return one number for each"
            )
        flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
        columns[_column(name)] = score
        columns[f"{_column(name)}_values"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table({**columns, "score": columns[_column(next(iter(criteria)))]})


def read(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """All rows, of some columns or of all, and the facts; for what fits into memory.

    Raises UserError where the file is missing or is no score table, or has no such column.
    """
    file = open_table(path, "score", [*REQUIRED, *(columns or [])], "score table")
    with reading(path, "score"):
        return file.read(columns), facts_of(file, KEY)


def facts(path: Path) -> dict[str, Any]:
    """The facts alone, from the file's footer."""
    return facts_of(open_table(path, "score", REQUIRED, "score table"), KEY)


def matrix(column: pa.ChunkedArray) -> Array:
    """A column of equally long lists as [n, values]; [0, 1] where there is no row.

    Raises ValueError where the lists differ in length.
    """
    flat = np.concatenate([np.zeros(0, np.float32), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
    if not len(column):
        return flat.reshape(0, 1)
    if not pa.types.is_fixed_size_list(column.type) and len(pc.unique(pc.list_value_length(column))) > 1:
        raise ValueError("the lists differ in length")
    return flat.reshape(len(column), -1)


def within_class_spearman(first: Array, second: Array, labels: Array) -> tuple[float, float]:
    """Mean and standard deviation over classes of Spearman's rank correlation between two score vectors."""
    values = [spearmanr(first[labels == c], second[labels == c]).statistic for c in np.unique(labels)]
    return float(np.mean(values)), float(np.std(values))


def _schema(criteria: Mapping[str, Criterion], config: Config) -> pa.Schema:
    names, (trials, epochs) = [_column(name) for name in criteria], config.score.checkpoints
    lists = pa.list_(pa.float32(), trials * epochs)
    useful = {_column(name): criterion.useful for name, criterion in criteria.items()}
    seed = {} if config.score.weights is not None else {"seed": config.run.seed}  # ready-made weights depend on none
    facts = {"trials": trials, "epochs": epochs, "useful": useful, **seed}
    return pa.schema(
        [("sample_id", pa.string()), ("label", pa.int32())]
        + [(name, pa.float32()) for name in (*names, "score")]
        + [(f"{name}_values", lists) for name in names],
        {KEY: json.dumps(facts, sort_keys=True)},
    )


def _encoding(names: Iterable[str]) -> dict[str, Any]:
    return {"compression": "zstd", "use_dictionary": ["label"], "write_statistics": ["label", "score", *names]}


def _read_piece(piece: Path) -> pa.Table:
    with reading(piece, "score"):
        return pq.ParquetFile(piece).read(use_threads=False)


def _difference(first: pa.Array, second: pa.Array) -> set[str]:
    return set(first.filter(pc.invert(pc.is_in(first, second))).to_pylist())


def _column(name: str) -> str:
    """The column of a criterion; a plug-in's module path is left out."""
    return name.rpartition(":")[2]

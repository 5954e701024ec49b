"""scores.parquet: joining the scored chunks by sample id, proving that none is missing or doubled, and aggregating.

Columns: sample_id, label, one float32 column per criterion, `score` (the first of them) and, behind every criterion,
its values `<criterion>_values` as float32 lists [trials * epochs], trial by trial. Rows are sorted by label and id.
The schema's metadata holds, under `scores`, the shape of the lists and each criterion's direction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from distill_at_scale.config import Config
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import publish
from distill_at_scale.scoring.scorer import criteria_of

Array = np.ndarray[Any, Any]


def join(pieces: Sequence[Path], expected: Sequence[str]) -> pa.Table:
    """All scored chunks as one table, sorted by label and id.

    Raises UserError where an expected id is missing, is there twice, or was not expected.
    """
    table = pa.concat_tables([pq.read_table(piece) for piece in pieces])
    prove_whole(table["sample_id"].to_pylist(), expected)
    return table.sort_by([("label", "ascending"), ("sample_id", "ascending")])


def prove_whole(found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises UserError unless `found` holds every expected id exactly once and no other."""
    wanted, have = set(expected), set(found)
    if missing := wanted - have:
        raise UserError(f"{len(missing)} samples have no score, for example {min(missing)!r}; run `score` again")
    if extra := have - wanted:
        raise UserError(f"{len(extra)} scores belong to no sample of this data set, for example {min(extra)!r}")
    if len(found) != len(have):
        raise UserError(
            f"{len(found) - len(have)} samples are scored more than once; remove the score work folder and run `score` again"
        )


def aggregate(joined: pa.Table, config: Config) -> pa.Table:
    """The table that is published as scores.parquet."""
    score = config.score
    columns: dict[str, Any] = {"sample_id": joined["sample_id"], "label": joined["label"]}
    matrices, directions = {}, {}
    for name, criterion in criteria_of(score.criteria).items():
        values = matrix(joined[name]).reshape(-1, score.trials, score.epochs)
        columns[_column(name)] = criterion.aggregate(values)
        matrices[f"{_column(name)}_values"] = joined[name]
        directions[_column(name)] = criterion.useful
    columns["score"] = columns[_column(score.criteria[0])]
    facts = {"trials": score.trials, "epochs": score.epochs, "useful": directions, "seed": config.run.seed}
    return pa.table(columns | matrices).replace_schema_metadata({"scores": json.dumps(facts, sort_keys=True)})


def write(path: Path, table: pa.Table) -> None:
    with publish(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The scores and their facts.

    Raises UserError where the file is missing or is no score table.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `distill-at-scale score CONFIG` first") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    if missing := {"sample_id", "label", "score"} - set(table.column_names):
        raise UserError(f"{path} is no score table: it lacks the columns {', '.join(sorted(missing))}")
    return table, json.loads((table.schema.metadata or {}).get(b"scores", b"{}"))


def matrix(column: pa.ChunkedArray) -> Array:
    """A list column as float32 [n, values]."""
    return (
        np.stack(column.combine_chunks().to_numpy(zero_copy_only=False))
        if len(column)
        else np.zeros((0, 1), np.float32)
    )


def within_class_spearman(first: Array, second: Array, labels: Array) -> tuple[float, float]:
    """Mean and standard deviation over classes of Spearman's rank correlation between two score vectors."""
    values = [spearmanr(first[labels == c], second[labels == c]).statistic for c in np.unique(labels)]
    return float(np.mean(values)), float(np.std(values))


def _column(name: str) -> str:
    """The column of a criterion; a plug-in's module path is left out."""
    return name.rpartition(":")[2]

"""Scores and lists of kept samples as files for others: Parquet and CSV by sample id, JSON by position.

Positions are those that `imported.py` reads: of the training split in the order of the source's own listing, so that what
is written here can be given as score.imported. A rejected sample has null. Left out: the values of every trial, which are
in scores.parquet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.imported import Positions
from distill_at_scale.pruning.selection.ranking import score_columns

SUFFIXES = (".parquet", ".csv", ".json")
KEPT = ("sample_id", "label", "score", "rank")
Array = np.ndarray[Any, Any]


def check(path: Path) -> None:
    """Raises UserError for a file of no known kind."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is of no known kind; name it {', '.join(f'*{s}' for s in SUFFIXES[:-1])} or *.json")


def scores(path: Path, scored: Path, config: Config) -> int:
    """Every criterion's scores, by id; as JSON those of select.criterion, an object "0": score. Returns their number.

    Raises UserError where the table is missing or has no such scores.
    """
    check(path)
    useful = score_table.facts(scored)["useful"]
    if path.suffix.lower() != ".json":
        found, _ = score_table.read(scored, ["sample_id", "label", *useful])
        _write_table(path, found, {"useful": useful})
        return found.num_rows
    name = score_columns(config.criterion)
    if not isinstance(name, str) or name not in useful:
        raise UserError(f"{path}: a file by position holds one criterion's scores; set select.criterion to one of "
                        f"{', '.join(useful)}, or write *.csv or *.parquet")  # fmt: skip
    found, _ = score_table.read(scored, ["sample_id", name])
    values = found[name].to_numpy()
    listed = _listed(path, found["sample_id"], config)
    places = pc.index_in(listed, found["sample_id"].combine_chunks())
    by_position = {str(i): _number(values, place) for i, place in enumerate(places.to_pylist())}
    _write_text(path, json.dumps(by_position))
    return found.num_rows


def kept(path: Path, selected: Path, config: Config) -> int:
    """The kept samples with score and rank, by id; as JSON the list of their positions, ascending. Returns their number.

    Raises UserError where the manifest is missing.
    """
    check(path)
    found, facts = manifest.read(selected)
    found = found.filter(found["kept"]).select(list(KEPT))
    if path.suffix.lower() != ".json":
        _write_table(path, found, facts)
    else:
        listed = _listed(path, found["sample_id"], config)
        inside = pc.is_in(listed, found["sample_id"].combine_chunks())
        _write_text(path, json.dumps(np.flatnonzero(inside.to_numpy()).tolist()))
    return found.num_rows


def _listed(path: Path, ids: pa.ChunkedArray, config: Config) -> pa.ChunkedArray:
    """What the positions stand for.

    Raises UserError where one of the ids has none.
    """
    listed = Positions(config).left
    lost = ids.filter(pc.invert(pc.is_in(ids, listed.combine_chunks())))
    if len(lost):
        raise UserError(
            f"{path}: {len(lost)} of {len(ids)} samples have no position in the source's listing, for example "
            f"{lost[0].as_py()!r} (data.transform = {config.data.transform}); write *.csv or *.parquet"
        )
    return listed


def _number(values: Array, place: int | None) -> float | None:
    """With the nine digits that a 32-bit number has at most."""
    return None if place is None else float(f"{values[place]:.9g}")


def _write_table(path: Path, found: pa.Table, facts: Mapping[str, Any]) -> None:
    found = found.replace_schema_metadata({"distill_at_scale": json.dumps(facts, sort_keys=True)})
    with publish(path) as temporary:
        if path.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(found, temporary)
        else:
            pq.write_table(found, temporary, compression="zstd")


def _write_text(path: Path, text: str) -> None:
    with publish(path) as temporary:
        temporary.write_text(text + "\n")

"""Export of scores and kept samples: Parquet and CSV by sample id, JSON by position.

Positions are those that `scoring/imported.py` reads, so an exported file can be used as score.imported elsewhere. A rejected
sample has null. Not covered: the values per trial; they are in scores.parquet.
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


def check(path: Path) -> None:
    """Raises UserError for an unknown file type."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} has an unknown file type; name it *.parquet, *.csv or *.json")


def scores(path: Path, scored: Path, config: Config) -> int:
    """Exports the scores of all criteria by id; as JSON those of select.criterion by position, as an object "0": score.

    Returns the number of samples. Raises UserError if the table is missing or has no such scores.
    """
    check(path)
    useful = score_table.facts(scored)["useful"]
    if path.suffix.lower() != ".json":
        table, _ = score_table.read(scored, ["sample_id", "label", *useful])
        _write_table(path, table, {"useful": useful})
        return table.num_rows
    name = score_columns(config.criterion)
    if not isinstance(name, str) or name not in useful:
        raise UserError(
            f"{path}: a file by position holds the scores of one criterion; set select.criterion to one of "
            f"{', '.join(useful)}, or write *.csv or *.parquet"
        )
    table, _ = score_table.read(scored, ["sample_id", name])
    rows = pc.index_in(_ids_by_position(path, table["sample_id"], config), table["sample_id"].combine_chunks())
    values = [float(f"{value:.9g}") for value in table[name].to_numpy()]  # nine digits identify a 32-bit number
    _write_json(path, {str(i): None if row is None else values[row] for i, row in enumerate(rows.to_pylist())})
    return table.num_rows


def kept(path: Path, selected: Path, config: Config) -> int:
    """Exports the kept samples with score and rank by id; as JSON the sorted list of their positions.

    Returns the number of kept samples. Raises UserError if the manifest is missing.
    """
    check(path)
    table, facts = manifest.read(selected)
    table = table.filter(table["kept"]).select(["sample_id", "label", "score", "rank"])
    if path.suffix.lower() != ".json":
        _write_table(path, table, facts)
    else:
        inside = pc.is_in(_ids_by_position(path, table["sample_id"], config), table["sample_id"].combine_chunks())
        _write_json(path, np.flatnonzero(inside.to_numpy()).tolist())
    return table.num_rows


def _ids_by_position(path: Path, ids: pa.ChunkedArray, config: Config) -> pa.ChunkedArray:
    """The id at each position. Raises UserError if one of `ids` has no position."""
    by_position = Positions(config).prepared
    lost = ids.filter(pc.invert(pc.is_in(ids, by_position.combine_chunks())))
    if len(lost):
        raise UserError(
            f"{path}: {len(lost)} of {len(ids)} samples have no position in the source's listing, for example "
            f"{lost[0].as_py()!r} (data.transform = {config.data.transform}); write *.csv or *.parquet"
        )
    return by_position


def _write_table(path: Path, table: pa.Table, facts: Mapping[str, Any]) -> None:
    table = table.replace_schema_metadata({"distill_at_scale": json.dumps(facts, sort_keys=True)})
    with publish(path) as temporary:
        if path.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(table, temporary)
        else:
            pq.write_table(table, temporary, compression="zstd")


def _write_json(path: Path, content: Any) -> None:
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

"""The manifest: which training samples are kept, and why; the only thing that distillation reads of the selection.

Columns: sample_id, label, score, rank (within its class, 0 = first to be kept) and kept. Rows are sorted by label
and id. The schema's metadata holds rule, rate asked and reached, seed and fingerprints as JSON under the key
`selection`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.errors import UserError
from distill_at_scale.rundir import publish

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("rank", pa.int32()),
        ("kept", pa.bool_()),
    ]
)


def write(path: Path, table: pa.Table, facts: dict[str, Any]) -> None:
    labelled = table.select(SCHEMA.names).cast(SCHEMA)
    with publish(path) as temporary:
        pq.write_table(labelled.replace_schema_metadata({"selection": json.dumps(facts, sort_keys=True)}), temporary)


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and its facts.

    Raises UserError where the file is missing or is no manifest.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `distill-at-scale select CONFIG` first") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise UserError(f"{path} is no manifest: it lacks the columns {', '.join(missing)}")
    return table, json.loads((table.schema.metadata or {}).get(b"selection", b"{}"))


def kept_ids(path: Path) -> list[str]:
    table, _ = read(path)
    return table.filter(pc.field("kept"))["sample_id"].to_pylist()

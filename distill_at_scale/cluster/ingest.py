"""Ingest on Ray Data: a pool of actors, each of which reads and decodes fixed chunks of the listing.

Only ids and locations travel in the blocks; an actor opens the source itself and publishes each chunk as a piece on
the run folder's (shared) disk.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_at_scale.cluster.pool import reporting, stream
from distill_at_scale.cluster.session import pack, unpack
from distill_at_scale.config import Config
from distill_at_scale.data.ingest import open_source
from distill_at_scale.data.pieces import (
    Recipe,
    check_chunk,
    finished,
    ingest_chunk,
    piece_path,
    recipe_of,
    rejected_path,
)
from distill_at_scale.data.sources.base import Source
from distill_at_scale.execution import Advance, Chunks


def run(config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool) -> int:
    """Decode every chunk that has no piece yet; returns the number of rejected samples, of earlier pieces too."""
    rejected, units = 0, []
    for split, index, rows in chunks:
        path = piece_path(pieces, split, index)
        if (rejected_path(path) if check else path).exists():
            used, bad = finished(path, rows, check)
            rejected += bad
            advance(used + bad)
        else:
            units.append(pa.table({"path": [str(path)], "rows": [to_bytes(rows)]}))
    arguments = {"packed": pack(config), "check": check}
    for result in stream(units, Ingester, arguments, config, gpus=0) if units else ():
        rejected += result["rejected"]
        advance(result["used"] + result["rejected"])
    return rejected


class Ingester:
    """An actor: one open source and one decoder, made on the first call."""

    def __init__(self, packed: dict[str, Any], check: bool):
        self.packed, self.make = packed, check_chunk if check else ingest_chunk

    @cached_property
    def tools(self) -> tuple[Source, Recipe]:
        config = unpack(self.packed)
        return open_source(config.data), recipe_of(config)

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        source, recipe = self.tools
        rows = from_bytes(unit["rows"][0].as_py())
        used, rejected = self.make(source, recipe, rows, Path(unit["path"][0].as_py()))
        return pa.table({"used": [used], "rejected": [rejected]})


def to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()

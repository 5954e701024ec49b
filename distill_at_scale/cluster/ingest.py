"""Ingest on Ray Data: a pool of actors, each of which reads and decodes fixed chunks of the listing.

Only ids and locations travel in the blocks; an actor opens the source itself and publishes each chunk as a piece on
the run folder's (shared) disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_at_scale.cluster.pool import reporting, stream
from distill_at_scale.cluster.session import pack, unpack
from distill_at_scale.config import Config
from distill_at_scale.data.decode import ImageDecoder
from distill_at_scale.data.ingest import decoder_of, ingest_chunk, open_source, piece_path
from distill_at_scale.data.sources.base import Source

Advance = Callable[[int], None]


def run(config: Config, chunks: Sequence[tuple[str, int, pa.Table]], pieces: Path, advance: Advance) -> int:
    """Decode every chunk that has no piece yet; returns the number of rejected samples, of earlier pieces too."""
    source, decoder, rejected, units = None, decoder_of(config), 0, []
    for split, index, rows in chunks:
        path = piece_path(pieces, split, index)
        if path.exists():
            source = source or open_source(config.data)
            used, bad = ingest_chunk(source, decoder, rows, path)
            rejected += bad
            advance(used + bad)
        else:
            units.append(pa.table({"path": [str(path)], "rows": [to_bytes(rows)]}))
    for result in stream(units, Ingester, {"packed": pack(config)}, config, gpus=0) if units else ():
        rejected += result["rejected"]
        advance(result["used"] + result["rejected"])
    return rejected


class Ingester:
    """An actor: one open source and one decoder, made on the first call."""

    def __init__(self, packed: dict[str, Any]):
        self.packed = packed

    @cached_property
    def tools(self) -> tuple[Source, ImageDecoder]:
        config = unpack(self.packed)
        return open_source(config.data), decoder_of(config)

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        source, decoder = self.tools
        rows = from_bytes(unit["rows"][0].as_py())
        used, rejected = ingest_chunk(source, decoder, rows, Path(unit["path"][0].as_py()))
        return pa.table({"used": [used], "rejected": [rejected]})


def to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()

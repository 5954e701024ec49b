"""Ingest on Ray Data: a pool of actors, each of which reads and decodes fixed chunks of the listing.

What travels in the blocks is where a chunk begins in the listing, which lies in the run folder (`Plan.on_disk`, beside the
pieces); an actor opens the source itself and publishes each chunk as a piece.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_at_scale.cluster.actor_pool import Tell, grouped, reporting, stream, work_of
from distill_at_scale.cluster.session import pack
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.data.ingest.chunks import (
    Recipe,
    check_chunk,
    finished,
    ingest_chunk,
    is_finished,
    piece_path,
    recipe_of,
    rejected_path,
)
from distill_at_scale.data.ingest.plan import listing_path, mapped, open_source
from distill_at_scale.data.sources.base import Source
from distill_at_scale.pipeline.executors.base import Advance, Chunks


def run(config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool, tell: Tell) -> int:
    """Decode every chunk that has no piece yet; returns the number of rejected samples, of earlier pieces too."""
    rejected, waiting = 0, []
    for split, index, rows in chunks:
        path = piece_path(pieces, split, index)
        if is_finished(path, check):
            used, bad = finished(path, rows, check)
            rejected += bad
            advance(used + bad)
        else:
            place = {
                "listing": str(listing_path(pieces, split)),
                "start": index * config.data.chunk,
                "count": rows.num_rows,
            }
            waiting.append({"path": str(path), **place})
    arguments = {"packed": pack(config), "check": check}
    units = grouped(waiting, config, gpus=0) if waiting else []
    for result in stream(units, Ingester, arguments, config, 0, tell) if waiting else ():
        rejected += result["rejected"]
        advance(result["samples"] + result["rejected"])
    return rejected


class Ingester:
    """An actor: one open source and one decoder, made on the first call."""

    does = "decode"

    def __init__(self, packed: dict[str, Any], check: bool):
        self.spent = TimeSpent()
        self.space, self.make = WorkerRunDir(packed), check_chunk if check else ingest_chunk

    @cached_property
    def tools(self) -> tuple[Source, Recipe]:
        config = self.space.config
        return open_source(config.data), recipe_of(config)

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        source, recipe = self.tools
        counts = [0, 0]
        for place in work_of(unit):
            listing, piece = self.space(place["listing"]), self.space(place["path"])
            self.space.fetch(listing)
            rows = mapped(listing).slice(place["start"], place["count"])
            used, rejected = self.make(source, recipe, rows, piece, self.spent)
            self.space.keep(rejected_path(piece), piece)
            counts = [counts[0] + used, counts[1] + rejected]
        return pa.table({"samples": [counts[0]], "rejected": [counts[1]]})

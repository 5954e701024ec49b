"""Score tables and their static selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.pruning.selection import select as static


def scores_of(sizes, seed=0, decimals=1):
    """Shuffled rows of some classes; scores are rounded, so that there are many ties."""
    chance = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = chance.permutation(len(labels))
    values = chance.random(len(labels)).round(decimals).astype(np.float32)
    ids = [f"s{k:05d}" for k in range(len(labels))]
    table = pa.table({"sample_id": ids, "label": labels.astype(np.int32), "loss": values, "score": values})
    return table.take(order)


def kept(selection):
    return {row["sample_id"] for row in selection.table.to_pylist() if row["kept"]}


@dataclass
class Selection:
    table: pa.Table
    facts: dict


def choose(source, minimum=1, low=True, criterion="loss", seed=0, held_out_seed=0, **section):
    out = []
    facts = static.select(source, out, SelectSection(**section), criterion, low, minimum, seed, held_out_seed)
    return Selection(pa.concat_tables(out).combine_chunks(), facts)


def skewed(seed, decimals=1, top=120):
    """Some classes of very different sizes, one label unused, values of both signs, many ties, rows shuffled."""
    chance = np.random.default_rng([7, seed])
    sizes = (top / (chance.permutation(7) + 1) ** 1.5).astype(int) + 1
    sizes[chance.integers(0, 6)] = 0
    table = scores_of(sizes, seed, decimals)
    values = ((table["loss"].to_numpy() - 0.5) * 4).round(decimals).astype(np.float32)
    return table.set_column(2, "loss", pa.array(values))


def on_disk(folder, table, rows=50):
    path = folder / "scores.parquet"
    pq.write_table(table.sort_by([("label", "ascending"), ("sample_id", "ascending")]), path, row_group_size=rows)
    return path

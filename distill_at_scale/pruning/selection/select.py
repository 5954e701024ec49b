"""Level 1, static pruning: scores -> manifest of kept samples (arXiv 2305.18381, section 3).

Samples are ranked within each class or over all classes, ties by sample id, and the first are kept. `orders.py` has the orders
that do not follow the ranking alone. Rows stream through: memory holds the numbers of the largest class and, for the global
scope, a 32-bit key per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DRAWN, ORDER_KEYS, SelectSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.manifest import HELD_OUT
from distill_at_scale.data.prepared.parquet import RowGroupWriter
from distill_at_scale.pruning.selection import orders
from distill_at_scale.pruning.selection.held_out import HeldOut
from distill_at_scale.pruning.selection.quotas import Cut, build_cut
from distill_at_scale.pruning.selection.ranking import Ranking, build_ranking, ranks_of
from distill_at_scale.pruning.selection.score_reader import ScoreReader, Unsorted


class ClassCount(NamedTuple):
    """Samples of a class, how many of them are kept, and whether the minimum raised that number."""

    samples: int
    kept: int
    raised: bool


def select(
    scores: Path | pa.Table, out: RowGroupWriter | list[pa.Table], config: SelectSection,
    criterion: str | Mapping[str, float], low_is_useful: bool | Mapping[str, bool], minimum: int, seed: int,
    held_out_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Chooses the samples to keep.

    Args:
        scores: a table with sample_id, label and a column per criterion (none for "random").
        out: gets the rows of the manifest in order; it may have some when an error is raised.
        criterion: one name, or several names with weights for their ranks.
        low_is_useful: whether low scores are useful, by name for several criteria.
        minimum: samples to keep per class at least.
        held_out_seed: decides which samples select.held_out keeps out.

    Returns:
        The metadata of the manifest.

    Raises:
        UserError: an unknown criterion; clusters that are not scored; a score that is not finite; a repeated id; a table that
            is damaged, empty, or unsorted and too long to sort here; classes so small that nothing can be held out.
    """
    held_out = HeldOut(config.held_out, minimum, held_out_seed)
    reader, counts = ScoreReader(scores, held_out), dict[int, ClassCount]()
    ranking = build_ranking(criterion, low_is_useful, config.order, seed)
    ranking.check(reader)
    orders.check(config.order, reader.schema.names)
    try:
        cut = build_cut(config, minimum, reader, ranking)
        ranked = prefetch(_rank_and_cut(config, reader, ranking, cut, counts))
        rows = next(ranked)
        for ids in reader.ids():  # the ids stream past; they are neither gathered nor held
            while rows.num_rows < len(ids):
                rows = pa.concat_tables([rows, next(ranked)])
            out.append(rows.slice(0, len(ids)).add_column(0, "sample_id", ids))
            rows = rows.slice(len(ids))
    except Unsorted as why:
        out.clear()
        table = reader.sorted(why).source
        return select(table, out, config, criterion, low_is_useful, minimum, seed, held_out_seed)
    total, kept = sum(count.samples for count in counts.values()), sum(count.kept for count in counts.values())
    if config.held_out and total == reader.rows:
        raise UserError(
            f"select.held_out = {config.held_out:g} holds out no sample, because each class keeps at least {minimum}; raise it"
        )
    facts = {
        "order": config.order,
        "scope": config.scope,
        "stratum_start": config.stratum_start,
        **{key: getattr(config, key) for key in ORDER_KEYS.get(config.order, ())},
        "asked": {"per_class": config.per_class} if config.per_class else {"keep": config.keep},
        "reached": round(kept / total, 8),
        "kept": kept,
        "of": total,
        "kept_per_class": [counts[label].kept if label in counts else 0 for label in range(max(counts) + 1)],
        "raised_to_minimum": [label for label, count in counts.items() if count.raised],
        **({"held_out": reader.rows - total} if config.held_out else {}),
    }
    return facts | cut.facts() | ranking.facts() | {"min_per_class": minimum, "seed": seed}


def _rank_and_cut(
    config: SelectSection, reader: ScoreReader, ranking: Ranking, cut: Cut, counts: dict[int, ClassCount]
) -> Iterator[pa.Table]:
    """The columns of the manifest except the ids, class by class; fills `counts`."""
    done, clusters = 0, [orders.CLUSTERS] if config.order == orders.CLUSTERS else []
    for label, whole in reader.whole_classes([*ranking.columns, *clusters]):
        inside = ~reader.held_out.mask(label, whole.num_rows)
        rows = whole if inside.all() else whole.filter(pa.array(inside))
        values = ranking.values(label, rows)
        if not (finite := np.isfinite(values)).all():
            sample = reader.id_of(done + int(np.flatnonzero(inside)[np.argmin(finite)]))
            raise UserError(f"the score {ranking.name} of sample {sample!r} is not finite; run `score` again")
        keys = ranking.keys(values)
        ranks = ranks_of(keys)
        if config.order in DRAWN:
            numbers = rows[orders.CLUSTERS].to_numpy() if clusters else None
            ranks = orders.reorder(config, ranking.seed, label, ranks, values, numbers)
        kept, raised = cut(label, keys, ranks)
        counts[label] = ClassCount(len(kept), int(np.count_nonzero(kept)), raised)
        done += whole.num_rows
        columns = {"score": values.astype(np.float32, copy=False), "rank": ranks, "kept": kept}
        if rows is not whole:
            for (name, column), empty in zip(columns.items(), (np.float32(np.nan), HELD_OUT, False), strict=True):
                columns[name] = np.full(whole.num_rows, empty, column.dtype)
                columns[name][inside] = column
        yield pa.table({"label": whole["label"].cast(pa.int32()), **columns})

"""Level 1, static pruning: scores -> kept ids (arXiv 2305.18381, section 3; METHOD.md section 2).

Samples are ranked by usefulness, within each class or over all, ties by sample id, and the first are kept. Per class
at least `min_per_class` samples stay; where that overrode the rate, the manifest's metadata says so. Rows stream
through: memory holds the numbers of the largest class, and for the global scope a 32-bit key of every sample.
What ranks is in `ranking.py`, how many are kept in `pruning/selection/quotas.py`. Left out: where the scores come from, and what becomes of
the manifest's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.pruning.selection import ranking as ranks_by
from distill_at_scale.pruning.selection.quotas import Cut, build_cut
from distill_at_scale.pruning.selection.ranking import Ranking, ranks_of
from distill_at_scale.pruning.selection.score_reader import ScoreReader, Unsorted

Array = np.ndarray[Any, Any]


class Sink(Protocol):
    """What takes the manifest's rows: a list, or what `manifest.writing` yields."""

    def append(self, table: pa.Table, /) -> None: ...

    def clear(self) -> None: ...


def select(
    scores: Path | pa.Table,
    out: Sink,
    config: SelectSection,
    criterion: str | Mapping[str, float],
    low_is_useful: bool | Mapping[str, bool],
    minimum: int,
    seed: int,
) -> dict[str, Any]:
    """Choose what to keep: appends the manifest's rows to `out`, in order, and returns the manifest's facts.

    `scores` has sample_id, label and a column `criterion` (none is needed for "random"), or one for each of several whose
    ranks are weighed; `low_is_useful` is their direction, by name where there are several. Raises UserError for an unknown
    criterion, a score that is not finite (naming the sample), an id that is there twice, and a table that is damaged,
    empty, or both unsorted and too long to be sorted here; `out` may have got rows by then.
    """
    samples = ScoreReader(scores)
    ranking = ranks_by.build_ranking(criterion, low_is_useful, config.order, seed)
    ranks_by.check(ranking, samples)
    tally = _Tally()
    try:
        cut = build_cut(config, minimum, samples, ranking)
        for rows in _with_ids(samples, prefetch(_ranked(samples, ranking, cut, tally), 2)):
            out.append(rows)
    except Unsorted as why:
        out.clear()
        return select(samples.sorted(why).source, out, config, criterion, low_is_useful, minimum, seed)
    return tally.facts(config) | cut.facts() | ranking.facts() | {"min_per_class": minimum, "seed": seed}


@dataclass
class _Tally:
    """What has been kept so far, by class."""

    count: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    raised: list[int] = field(default_factory=list)

    def add(self, label: int, kept: Array, raised: bool) -> None:
        self.count[label], self.kept[label] = len(kept), int(np.count_nonzero(kept))
        if raised:
            self.raised.append(label)

    def facts(self, config: SelectSection) -> dict[str, Any]:
        return {
            "order": config.order,
            "scope": config.scope,
            "stratum_start": config.stratum_start,
            "asked": {"per_class": config.per_class} if config.per_class else {"keep": config.keep},
            "reached": round(self.kept.total() / self.count.total(), 8),
            "kept": self.kept.total(),
            "of": self.count.total(),
            "kept_per_class": [self.kept[label] for label in range(max(self.count) + 1)],
            "raised_to_minimum": self.raised,
        }


def _ranked(samples: ScoreReader, ranking: Ranking, cut: Cut, tally: _Tally) -> Iterator[pa.Table]:
    """The manifest's columns but the ids, class by class.

    Raises UserError for a score that is not finite.
    """
    done = 0
    for label, rows in samples.classes(ranking.columns):
        values = ranking.values(label, rows)
        if not (finite := np.isfinite(values)).all():
            broken = samples.id_of(done + int(np.argmin(finite)))
            raise UserError(f"the score {ranking.name} of sample {broken!r} is not finite; score again")
        keys = ranking.keys(values)
        ranks = ranks_of(keys)
        kept, raised = cut(label, keys, ranks)
        tally.add(label, kept, raised)
        labels = rows["label"].cast(pa.int32())
        yield pa.table({"label": labels, "score": values.astype(np.float32, copy=False), "rank": ranks, "kept": kept})
        done += len(ranks)


def _with_ids(samples: ScoreReader, ranked: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The manifest's rows as many at a time as ids come; the ids are passed on, never gathered or held."""
    held = next(ranked)
    for ids in samples.ids():
        while held.num_rows < len(ids):
            held = pa.concat_tables([held, next(ranked)])
        yield held.slice(0, len(ids)).add_column(0, "sample_id", ids)
        held = held.slice(len(ids))

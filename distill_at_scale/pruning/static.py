"""Level 1, static pruning: scores -> kept ids (arXiv 2305.18381, section 3; METHOD.md section 2).

Samples are ranked by usefulness, within each class or over all, ties by sample id, and the first are kept. Per class
at least `min_per_class` samples stay; where that overrode the rate, the manifest's metadata says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale import rng
from distill_at_scale.config import SelectSection
from distill_at_scale.errors import UserError

Array = np.ndarray[Any, Any]
RANDOM = "random"  # the seeded control: a criterion that needs no scores


@dataclass(frozen=True)
class Selection:
    """The manifest's table, and the facts for its metadata."""

    table: pa.Table
    facts: dict[str, Any]


def select(
    scores: pa.Table, config: SelectSection, criterion: str, low_is_useful: bool, minimum: int, seed: int
) -> Selection:
    """Choose what to keep.

    `scores` has sample_id, label and a column `criterion` (none is needed for "random"). Raises UserError for an unknown
    criterion or a score that is not finite, naming the sample.
    """
    table = scores.sort_by([("label", "ascending"), ("sample_id", "ascending")])
    labels = table["label"].to_numpy()
    values = _values(table, criterion, seed)
    places = ranks(values, labels, ascending=_ascending(config.order, low_is_useful or criterion == RANDOM))
    if config.scope == "class":
        kept, raised = _cut_classes(places, labels, config, minimum)
    else:
        kept, raised = _cut_global(values, labels, places, config, minimum, _ascending(config.order, low_is_useful))
    out = pa.table(
        {
            "sample_id": table["sample_id"],
            "label": labels,
            "score": values.astype(np.float32),
            "rank": places,
            "kept": kept,
        }
    )
    return Selection(out, _facts(config, criterion, minimum, seed, labels, kept, raised))


def quota(share: float, count: int, minimum: int) -> int:
    """How many of `count` are kept: max(minimum, floor(share * count + 0.5)), at most all."""
    return min(count, max(minimum, int(np.floor(share * count + 0.5 + 1e-9))))


def ranks(values: Array, labels: Array, ascending: bool) -> Array:
    """Each sample's place within its class, int32 [n]; ties break by position (rows are sorted by id)."""
    order = np.lexsort((np.arange(len(values)), values if ascending else -values, labels))
    starts = np.searchsorted(labels[order], labels[order], side="left")
    places = np.empty(len(values), np.int32)
    places[order] = np.arange(len(values)) - starts
    return places


def _ascending(order: str, low_is_useful: bool) -> bool:
    """Whether the samples to keep are those with the smallest scores."""
    return {
        "low": True,
        "high": False,
        "useful": low_is_useful,
        "stratum": low_is_useful,
        "useless": not low_is_useful,
    }[order]


def _values(table: pa.Table, criterion: str, seed: int) -> Array:
    if criterion == RANDOM:
        return rng.numpy_generator(seed, "random selection").random(table.num_rows)
    if criterion not in table.column_names:
        have = [
            name
            for name in table.column_names
            if name not in ("sample_id", "label", "score") and not name.endswith("_values")
        ]
        raise UserError(f"select.criterion = {criterion!r} has no scores; scored are: {', '.join(have)} (or {RANDOM})")
    values = table[criterion].to_numpy().astype(np.float64)
    if (broken := np.flatnonzero(~np.isfinite(values))).size:
        raise UserError(
            f"the score {criterion} of sample {table['sample_id'][int(broken[0])].as_py()!r} is not finite; score again"
        )
    return values


def _cut_classes(places: Array, labels: Array, config: SelectSection, minimum: int) -> tuple[Array, list[int]]:
    counts = np.bincount(labels)
    kept, raised = np.zeros(len(labels), bool), []
    for label in np.flatnonzero(counts):
        count = int(counts[label])
        wanted = min(config.per_class, count) if config.per_class else quota(config.keep, count, 0)
        number = min(count, max(wanted, minimum))
        start = int(np.floor(config.stratum_start * count + 0.5)) if config.order == "stratum" else 0
        start = min(start, count - number)
        members = labels == label
        kept |= members & (places >= start) & (places < start + number)
        if number > wanted:
            raised.append(int(label))
    return kept, raised


def _cut_global(
    values: Array, labels: Array, places: Array, config: SelectSection, minimum: int, ascending: bool
) -> tuple[Array, list[int]]:
    total, counts = len(values), np.bincount(labels)
    number = (
        min(config.per_class * int(np.count_nonzero(counts)), total)
        if config.per_class
        else quota(config.keep, total, 1)
    )
    start = min(int(np.floor(config.stratum_start * total + 0.5)), total - number) if config.order == "stratum" else 0
    overall = ranks(values, np.zeros(total, np.int64), ascending)
    kept = (overall >= start) & (overall < start + number)
    raised = [int(c) for c in np.flatnonzero(counts) if np.count_nonzero(kept[labels == c]) < min(minimum, counts[c])]
    for label in raised:
        spare = np.flatnonzero((labels == label) & ~kept)
        missing = min(minimum, int(counts[label])) - np.count_nonzero(kept[labels == label])
        kept[spare[np.argsort(places[spare])][:missing]] = True
    return kept, raised


def _facts(
    config: SelectSection, criterion: str, minimum: int, seed: int, labels: Array, kept: Array, raised: list[int]
) -> dict[str, Any]:
    return {
        "criterion": criterion,
        "order": config.order,
        "scope": config.scope,
        "stratum_start": config.stratum_start,
        "asked": {"per_class": config.per_class} if config.per_class else {"keep": config.keep},
        "reached": round(float(kept.mean()), 8),
        "kept": int(kept.sum()),
        "of": len(kept),
        "kept_per_class": np.bincount(labels[kept], minlength=int(labels.max()) + 1).tolist(),
        "min_per_class": minimum,
        "raised_to_minimum": raised,
        "seed": seed,
    }

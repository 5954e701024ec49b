"""Which numbers rank the samples of a class, and from which end: one criterion, the seeded control, or several weighted.

Of several criteria each ranks a class by its own direction, equal scores sharing their mean rank; the ranks, scaled to
0 (most useful) .. 1, are added up by weight and divided by the sum of the weights, so that low is useful. No scale of a
score matters, only its order. A ranking is computed class by class and holds nothing. Left out: what is kept (`pruning/selection/quotas.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import rankdata

from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.selection.score_reader import ScoreReader

Array = np.ndarray[Any, Any]
RANDOM = "random"  # the seeded control: a criterion that needs no scores


class Ranking(Protocol):
    """Ranks the samples of a class by one number each."""

    @property
    def smallest_first(self) -> bool:
        """Whether small numbers come first."""

    @property
    def name(self) -> str:
        """In words, for messages and facts."""

    @property
    def columns(self) -> list[str]:
        """What is read of the score table besides id and label."""

    def values(self, label: int, rows: pa.Table) -> Array:
        """The numbers of a class [n]."""

    def spread(self, label: int, rows: pa.Table) -> Array:
        """Standard deviation of every criterion's scores in a class, float64 [criteria]."""

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""

    def keys(self, values: Array) -> Array:
        """Unsigned integers [n] that sort the numbers from the first to be kept to the last."""

    def all_keys(self, samples: ScoreReader) -> tuple[Array, int]:
        """The keys of all samples, in order of label and position, and the number of classes."""


def build_ranking(
    criterion: str | Mapping[str, float], low_is_useful: bool | Mapping[str, bool], order: str, seed: int
) -> Ranking:
    """What select.criterion asks for; `low_is_useful` is the direction, of several criteria by name.

    Raises UserError for weights with an order that names an end of the scale.
    """
    names = [criterion] if isinstance(criterion, str) else list(criterion)
    low = dict.fromkeys(names, low_is_useful) if isinstance(low_is_useful, bool) else low_is_useful
    if isinstance(criterion, str):
        return SingleCriterion(criterion, seed, smallest_first(order, criterion == RANDOM or low.get(criterion, True)))
    if order in ("low", "high"):
        raise UserError(
            f"select.order = {order!r} names an end of one criterion's scale, but select.criterion weighs the ranks of "
            f"{len(criterion)}; set select.order to useful, useless or stratum"
        )
    return WeightedRanks(dict(criterion), {name: low.get(name, True) for name in names}, smallest_first(order, True))


def score_columns(criterion: str | Mapping[str, float]) -> str | dict[str, float]:
    """select.criterion by the names of the score table's columns; a plug-in's module path is left out."""
    if isinstance(criterion, str):
        return criterion.rpartition(":")[2]
    return {name.rpartition(":")[2]: weight for name, weight in criterion.items()}


def check(ranking: Ranking, samples: ScoreReader) -> None:
    """Raises UserError where there is nothing to rank, or no such scores."""
    names = samples.schema.names
    if missing := [name for name in ranking.columns if name not in names]:
        have = [n for n in names if n not in ("sample_id", "label", "score") and not n.endswith("_values")]
        raise UserError(f"select.criterion = {missing[0]!r} has no scores; scored are: {', '.join(have)} (or {RANDOM})")
    if not samples.rows:
        raise UserError(f"{samples} holds no sample; run `score` again")


def smallest_first(order: str, low_is_useful: bool) -> bool:
    """Whether the samples to keep are those with the smallest scores."""
    return {
        "low": True,
        "high": False,
        "useful": low_is_useful,
        "stratum": low_is_useful,
        "useless": not low_is_useful,
    }[order]


@dataclass(frozen=True)
class SingleCriterion:
    """One criterion, or the seeded control."""

    criterion: str
    seed: int
    smallest_first: bool

    @property
    def name(self) -> str:
        return self.criterion

    @property
    def columns(self) -> list[str]:
        return [] if self.criterion == RANDOM else [self.criterion]

    def values(self, label: int, rows: pa.Table) -> Array:
        """The numbers of a class [n]; random ones depend on seed, label and count alone."""
        return self._draw(label, rows.num_rows) if self.criterion == RANDOM else rows[self.criterion].to_numpy()

    def spread(self, label: int, rows: pa.Table) -> Array:
        """Of the control the same in every class."""
        return np.ones(1) if self.criterion == RANDOM else _spread(rows, self.columns)

    def facts(self) -> dict[str, Any]:
        return {"criterion": self.criterion}

    def keys(self, values: Array) -> Array:
        return sort_keys(values, self.smallest_first)

    def all_keys(self, samples: ScoreReader) -> tuple[Array, int]:
        """Batch by batch, as no class is needed as a whole."""
        counts, done = Counter[int](), 0
        narrow = self.criterion == RANDOM or samples.schema.field(self.criterion).type == pa.float32()
        keys = np.empty(samples.rows, np.uint32 if narrow else np.uint64)
        for batch in samples.batches(["label", *self.columns]):
            for found in pc.value_counts(batch["label"]).to_pylist():
                counts[found["values"]] += found["counts"]
            for name in self.columns:
                keys[done : done + batch.num_rows] = self.keys(batch[name].to_numpy(zero_copy_only=False))
                done += batch.num_rows
        if self.criterion == RANDOM:
            keys = np.concatenate([self.keys(self._draw(label, counts[label])) for label in sorted(counts)])
        return keys, len(counts)

    def _draw(self, label: int, count: int) -> Array:
        return rng.numpy_generator(self.seed, "random selection", label).random(count, np.float32)


@dataclass(frozen=True)
class WeightedRanks:
    """Several criteria: the weighted mean of their scaled ranks, float32 in 0 .. 1; low is useful."""

    weights: Mapping[str, float]
    low_is_useful: Mapping[str, bool]
    smallest_first: bool

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    @property
    def columns(self) -> list[str]:
        return list(self.weights)

    def values(self, label: int, rows: pa.Table) -> Array:
        """NaN for a sample with a score that is not finite, whatever the criterion."""
        total = np.zeros(rows.num_rows)
        for name, weight in self.weights.items():
            scores = rows[name].to_numpy()
            total += weight * scaled_ranks(sort_keys(scores, self.low_is_useful[name]))
            total[~np.isfinite(scores)] = np.nan
        return (total / sum(self.weights.values())).astype(np.float32)

    def spread(self, label: int, rows: pa.Table) -> Array:
        return _spread(rows, self.columns)

    def facts(self) -> dict[str, Any]:
        return {"criterion": self.name, "weights": dict(self.weights)}

    def keys(self, values: Array) -> Array:
        return sort_keys(values, self.smallest_first)

    def all_keys(self, samples: ScoreReader) -> tuple[Array, int]:
        """Class by class, within which the ranks are."""
        keys, done, classes = np.empty(samples.rows, np.uint32), 0, 0
        for label, rows in samples.classes(self.columns):
            keys[done : done + rows.num_rows] = self.keys(self.values(label, rows))
            done, classes = done + rows.num_rows, classes + 1
        return keys, classes


def scaled_ranks(keys: Array) -> Array:
    """Ranks [n] of keys, scaled to 0 (the smallest) .. 1 (the largest), float64; equal keys share their mean rank."""
    return (rankdata(keys) - 1) / max(1, len(keys) - 1)


def _spread(rows: pa.Table, columns: list[str]) -> Array:
    return np.array([rows[name].to_numpy().astype(np.float64).std() for name in columns])


def sort_keys(values: Array, smallest_first: bool) -> Array:
    """Unsigned integers that sort as the finite floats [n] do: uint32 for float32, uint64 for all others; -0 equals 0."""
    floats: Array = values if values.dtype == np.float32 else values.astype(np.float64)
    keys: Array = (floats + floats.dtype.type(0)).view(f"u{floats.itemsize}")  # -0 + 0 is 0
    flip: Array = keys.view(f"i{floats.itemsize}") >> (8 * floats.itemsize - 1)  # all bits of a negative, else none,
    flip |= np.iinfo(flip.dtype).min  # and the sign
    keys ^= flip.view(keys.dtype)
    return keys if smallest_first else np.invert(keys, out=keys)


def ranks_of(keys: Array) -> Array:
    """Each row's place in the order of (key, position), int32 [n].

    Key and position of a uint32 key share one 64-bit number, which numpy sorts several times faster than it argsorts.
    """
    order: Array
    if keys.dtype == np.uint32:
        order = keys.astype(np.uint64)
        order <<= np.uint64(32)
        order |= np.arange(len(keys), dtype=np.uint64)
        order.sort()
        order &= np.uint64(2**32 - 1)
        order = order.view(np.int64)
    else:
        order = np.argsort(keys, kind="stable")
    found = np.empty(len(keys), np.int32)
    found[order] = np.arange(len(keys), dtype=np.int32)
    return found

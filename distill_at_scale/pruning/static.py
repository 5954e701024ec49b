"""Level 1, static pruning: scores -> kept ids (arXiv 2305.18381, section 3; METHOD.md section 2).

Samples are ranked by usefulness, within each class or over all, ties by sample id, and the first are kept. Per class
at least `min_per_class` samples stay; where that overrode the rate, the manifest's metadata says so. Rows stream
through: memory holds the numbers of the largest class, and for the global scope a 32-bit key of every sample.
Left out: where the scores come from, and what becomes of the manifest's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale import rng
from distill_at_scale.data.prefetch import ahead
from distill_at_scale.errors import UserError
from distill_at_scale.pruning.classes import Samples, Unsorted
from distill_at_scale.sections import SelectSection

Array = np.ndarray[Any, Any]
RANDOM = "random"  # the seeded control: a criterion that needs no scores


class Sink(Protocol):
    """What takes the manifest's rows: a list, or what `manifest.writing` yields."""

    def append(self, table: pa.Table, /) -> None: ...

    def clear(self) -> None: ...


def select(
    scores: Path | pa.Table,
    out: Sink,
    config: SelectSection,
    criterion: str,
    low_is_useful: bool,
    minimum: int,
    seed: int,
) -> dict[str, Any]:
    """Choose what to keep: appends the manifest's rows to `out`, in order, and returns the manifest's facts.

    `scores` has sample_id, label and a column `criterion` (none is needed for "random"). Raises UserError for an unknown
    criterion, a score that is not finite (naming the sample), an id that is there twice, and a table that is damaged,
    empty, or both unsorted and too long to be sorted here; `out` may have got rows by then.
    """
    samples = Samples(scores)
    ranking = Ranking(criterion, seed, _ascending(config.order, low_is_useful or criterion == RANDOM))
    ranking.check(samples)
    cut = ClassCut(config, minimum) if config.scope == "class" else GlobalCut(config, minimum, samples, ranking)
    tally = _Tally()
    try:
        for rows in _with_ids(samples, ahead(_ranked(samples, ranking, cut, tally), 2)):
            out.append(rows)
    except Unsorted as why:
        out.clear()
        return select(samples.sorted(why).source, out, config, criterion, low_is_useful, minimum, seed)
    return tally.facts(config) | {"criterion": criterion, "min_per_class": minimum, "seed": seed}


def quota(share: float, count: int, minimum: int) -> int:
    """How many of `count` are kept: max(minimum, floor(share * count + 0.5)), at most all."""
    return min(count, max(minimum, int(np.floor(share * count + 0.5 + 1e-9))))


def sort_keys(values: Array, ascending: bool) -> Array:
    """Unsigned integers that sort as the finite floats [n] do: uint32 for float32, uint64 for all others; -0 equals 0."""
    floats: Array = values if values.dtype == np.float32 else values.astype(np.float64)
    keys: Array = (floats + floats.dtype.type(0)).view(f"u{floats.itemsize}")  # -0 + 0 is 0
    flip: Array = keys.view(f"i{floats.itemsize}") >> (8 * floats.itemsize - 1)  # all bits of a negative, else none,
    flip |= np.iinfo(flip.dtype).min  # and the sign
    keys ^= flip.view(keys.dtype)
    return keys if ascending else np.invert(keys, out=keys)


def places(keys: Array) -> Array:
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


@dataclass(frozen=True)
class Ranking:
    """Which number ranks a sample, and from which end."""

    criterion: str
    seed: int
    ascending: bool

    @property
    def columns(self) -> list[str]:
        """What is read of the score table besides id and label."""
        return [] if self.criterion == RANDOM else [self.criterion]

    def check(self, samples: Samples) -> None:
        """Raises UserError where there is nothing to rank, or no such scores."""
        names = samples.schema.names
        if missing := set(self.columns) - set(names):
            have = [n for n in names if n not in ("sample_id", "label", "score") and not n.endswith("_values")]
            raise UserError(
                f"select.criterion = {missing.pop()!r} has no scores; scored are: {', '.join(have)} (or {RANDOM})"
            )
        if not samples.rows:
            raise UserError(f"{samples} holds no sample; run `score` again")

    def values(self, label: int, rows: pa.Table) -> Array:
        """The numbers of a class [n]; random ones depend on seed, label and count alone."""
        return self.draw(label, rows.num_rows) if self.criterion == RANDOM else rows[self.criterion].to_numpy()

    def draw(self, label: int, count: int) -> Array:
        return rng.numpy_generator(self.seed, "random selection", label).random(count, np.float32)

    def keys(self, values: Array) -> Array:
        return sort_keys(values, self.ascending)


class ClassCut:
    """Keeps the same share, or number, of every class."""

    def __init__(self, config: SelectSection, minimum: int):
        self.config, self.minimum = config, minimum

    def __call__(self, keys: Array, ranks: Array) -> tuple[Array, bool]:
        """Keys and ranks of one class [n] -> kept, bool [n], and whether the minimum overrode the rate."""
        count = len(ranks)
        wanted = min(self.config.per_class or quota(self.config.rate, count, 0), count)
        number = min(count, max(wanted, self.minimum))
        start = _start(self.config, count, number)
        kept: Array = ranks < start + number
        if start:
            kept &= ranks >= start
        return kept, number > wanted


class GlobalCut:
    """Keeps a share of all samples, ties by label and id; a class that gets too few is raised to the minimum.

    Looks at all keys first (one pass over the scores alone), then takes the classes in order, each once.
    """

    def __init__(self, config: SelectSection, minimum: int, samples: Samples, ranking: Ranking):
        self.minimum = minimum
        keys, classes = _all_keys(samples, ranking)
        total = len(keys)
        number = min(config.per_class * classes, total) if config.per_class else quota(config.rate, total, 1)
        start = _start(config, total, number)
        self.before, self.until = _First(keys, start), _First(keys, start + number)

    def __call__(self, keys: Array, ranks: Array) -> tuple[Array, bool]:
        """Keys and ranks of the next class [n] -> kept, bool [n], and whether it was raised to the minimum."""
        kept = self.until.take(keys) & ~self.before.take(keys)
        missing = min(self.minimum, len(keys)) - int(np.count_nonzero(kept))
        if missing > 0:
            spare = np.flatnonzero(~kept)
            kept[spare[np.argsort(ranks[spare])][:missing]] = True
        return kept, missing > 0


class _First:
    """The first `number` of all rows in the order of (key, position), taken part by part in order of position."""

    def __init__(self, keys: Array, number: int):
        """Reorders `keys`."""
        self.limit, self.ties = keys.dtype.type(0), 0  # the last key that is in, and how many of that key are
        if number:
            keys.partition(number - 1)
            self.limit = keys[number - 1]
            self.ties = number - int(np.count_nonzero(keys[: number - 1] < self.limit))

    def take(self, keys: Array) -> Array:
        inside = keys < self.limit
        tied = np.flatnonzero(keys == self.limit)[: self.ties]
        inside[tied] = True
        self.ties -= len(tied)
        return inside


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


def _ranked(samples: Samples, ranking: Ranking, cut: ClassCut | GlobalCut, tally: _Tally) -> Iterator[pa.Table]:
    """The manifest's columns but the ids, class by class.

    Raises UserError for a score that is not finite.
    """
    done = 0
    for label, rows in samples.classes(ranking.columns):
        values = ranking.values(label, rows)
        if not (finite := np.isfinite(values)).all():
            broken = samples.id_of(done + int(np.argmin(finite)))
            raise UserError(f"the score {ranking.criterion} of sample {broken!r} is not finite; score again")
        keys = ranking.keys(values)
        ranks = places(keys)
        kept, raised = cut(keys, ranks)
        tally.add(label, kept, raised)
        labels = rows["label"].cast(pa.int32())
        yield pa.table({"label": labels, "score": values.astype(np.float32, copy=False), "rank": ranks, "kept": kept})
        done += len(ranks)


def _with_ids(samples: Samples, ranked: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The manifest's rows as many at a time as ids come; the ids are passed on, never gathered or held."""
    held = next(ranked)
    for ids in samples.ids():
        while held.num_rows < len(ids):
            held = pa.concat_tables([held, next(ranked)])
        yield held.slice(0, len(ids)).add_column(0, "sample_id", ids)
        held = held.slice(len(ids))


def _all_keys(samples: Samples, ranking: Ranking) -> tuple[Array, int]:
    """The keys of all samples, in any order, and the number of classes."""
    counts, done = Counter[int](), 0
    narrow = ranking.criterion == RANDOM or samples.schema.field(ranking.criterion).type == pa.float32()
    keys = np.empty(samples.rows, np.uint32 if narrow else np.uint64)
    for batch in samples.batches(["label", *ranking.columns]):
        for found in pc.value_counts(batch["label"]).to_pylist():
            counts[found["values"]] += found["counts"]
        for name in ranking.columns:
            keys[done : done + batch.num_rows] = ranking.keys(batch[name].to_numpy(zero_copy_only=False))
            done += batch.num_rows
    if ranking.criterion == RANDOM:
        keys = np.concatenate([ranking.keys(ranking.draw(label, counts[label])) for label in sorted(counts)])
    return keys, len(counts)


def _start(config: SelectSection, count: int, number: int) -> int:
    """The first place that is kept: 0, or where the stratum starts, as long as `number` follow."""
    start = int(np.floor(config.stratum_start * count + 0.5)) if config.order == "stratum" else 0
    return min(start, count - number)


def _ascending(order: str, low_is_useful: bool) -> bool:
    """Whether the samples to keep are those with the smallest scores."""
    return {
        "low": True,
        "high": False,
        "useful": low_is_useful,
        "stratum": low_is_useful,
        "useless": not low_is_useful,
    }[order]

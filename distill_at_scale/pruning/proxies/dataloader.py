"""Training batches for proxies, in bounded memory and independent of the number of workers.

Each epoch distributes the row groups over a fixed number of logical shards, and each shard yields its part of every batch. A
worker owns some shards and shuffles samples in a window of their row groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import RowGroup

WINDOW_BYTES = 512 * 2**20  # stored samples, over all logical shards of a proxy
MIN_GROUPS = 4  # row groups per logical shard

Batch = tuple[Tensor, Tensor]  # uint8 [n, *shape], labels int64 [n]
Shards = list[list[RowGroup]]  # the row groups of each logical shard


@dataclass(frozen=True)
class ProxyDataLoader:
    """The training batches of one trial; equal on all workers."""

    prepared: PreparedDataset
    seed: int
    batch: int
    shards: int  # requested number of logical shards
    share: float = 1.0  # of the training split, class by class

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The row groups to train on: all, or about `share` of each class, at least one."""
        if self.share == 1:
            return self.prepared.groups("train")
        chosen = []
        for label, groups in _by_label(self.prepared.groups("train")).items():
            order = rng.numpy_generator(self.seed, "proxy share", label).permutation(len(groups))
            chosen += [groups[i] for i in sorted(order[: math.ceil(self.share * len(groups) - 1e-9)])]
        return chosen

    @property
    def samples(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def logical_shards(self) -> int:
        """The largest power of two up to `shards` that fits the batch and leaves each shard MIN_GROUPS row groups."""
        return 1 << (min(self.shards, self.batch, max(1, len(self.groups) // MIN_GROUPS)).bit_length() - 1)

    def shard_groups(self, trial: int, epoch: int) -> Shards:
        """The row groups of each logical shard, in reading order: classes spread evenly, rows balanced."""
        draw, keyed = rng.numpy_generator(self.seed, "proxy deal", trial, epoch), []
        for groups in _by_label(self.groups).values():
            places = (np.arange(len(groups)) + draw.random()) / len(groups)
            keyed += [(place, groups[i]) for place, i in zip(places, draw.permutation(len(groups)), strict=True)]
        shards: Shards = [[] for _ in range(self.logical_shards)]
        rows = [0] * len(shards)
        for _, group in sorted(keyed, key=lambda pair: pair[0]):
            smallest = rows.index(min(rows))
            shards[smallest].append(group)
            rows[smallest] += group.rows
        return shards

    def batch_sizes(self, shards: Shards) -> list[int]:
        """Samples of each logical shard per batch; a set that is no larger than a batch is one batch."""
        rows = [sum(group.rows for group in groups) for groups in shards]
        if self.samples <= self.batch:
            return rows
        each = [self.batch // len(shards) + (i < self.batch % len(shards)) for i in range(len(shards))]
        return [min(size, count) for size, count in zip(each, rows, strict=True)]

    def steps(self, shards: Shards) -> int:
        """Full batches per epoch; the samples of the incomplete last batch are left out, at random."""
        pairs = zip(self.batch_sizes(shards), shards, strict=True)
        return min(sum(group.rows for group in groups) // size for size, groups in pairs)

    def batches(self, trial: int, epoch: int, shards: Shards, own: range) -> Iterator[list[Batch]]:
        """Per step, the parts of a worker's `own` logical shards."""
        sizes, limit = self.batch_sizes(shards), WINDOW_BYTES // len(shards)
        draws = {shard: rng.generator(self.seed, "proxy order", trial, epoch, shard) for shard in own}
        parts = [self._batches(shards[shard], sizes[shard], limit, draw) for shard, draw in draws.items()]
        yield from prefetch([next(part) for part in parts] for _ in range(self.steps(shards)))

    def _batches(self, groups: Sequence[RowGroup], size: int, limit: int, draw: torch.Generator) -> Iterator[Batch]:
        rest: pa.Table | None = None
        for window in _windows(groups, limit, self.prepared):
            tables = [self.prepared.read(group) for group in window]
            joined = pa.concat_tables(tables if rest is None else [rest, *tables])
            table = joined.combine_chunks()  # a take from a hundred chunks costs ten times one from a single chunk
            del tables, joined
            order = torch.randperm(table.num_rows, generator=draw).numpy()
            for start in range(0, table.num_rows - size + 1, size):
                taken = table.take(pa.array(order[start : start + size]))
                labels = torch.from_numpy(taken["label"].to_numpy().astype(np.int64))
                yield torch.from_numpy(np.array(self.prepared.pixels(taken))), labels
            rest = table.take(pa.array(order[table.num_rows - table.num_rows % size :]))


def _windows(groups: Sequence[RowGroup], size: int, prepared: PreparedDataset) -> Iterator[list[RowGroup]]:
    """Consecutive row groups of at most `size` bytes, at least one each."""
    window, held = list[RowGroup](), 0
    for group in groups:
        if window and held + group.rows * prepared.stored_bytes > size:
            yield window
            window, held = [], 0
        window.append(group)
        held += group.rows * prepared.stored_bytes
    if window:
        yield window


def _by_label(groups: Sequence[RowGroup]) -> dict[int, list[RowGroup]]:
    ordered = sorted(groups, key=attrgetter("label"))
    return {label: list(own) for label, own in itertools.groupby(ordered, key=attrgetter("label"))}

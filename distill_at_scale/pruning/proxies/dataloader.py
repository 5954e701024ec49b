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

Batch = tuple[Tensor, Tensor, Tensor]  # uint8 [n, *shape], labels int64 [n], positions int64 [n] in the training set
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

    @cached_property
    def starts(self) -> dict[RowGroup, int]:
        """The position of each row group's first sample among all samples to train on."""
        ends = itertools.accumulate(group.rows for group in self.groups)
        return {group: end - group.rows for group, end in zip(self.groups, ends, strict=True)}

    def rows(self, shards: Shards, kept: Tensor | None = None) -> list[int]:
        """Samples of each logical shard; `kept` bool [samples]: only these."""
        if kept is None:
            return [sum(group.rows for group in groups) for groups in shards]
        return [sum(int(kept[(first := self.starts[one]) : first + one.rows].sum()) for one in own) for own in shards]

    def batch_sizes(self, rows: Sequence[int]) -> list[int]:
        """Samples of each logical shard per batch; a set that is no larger than a batch is one batch."""
        if sum(rows) <= self.batch:
            return list(rows)
        each = [self.batch // len(rows) + (i < self.batch % len(rows)) for i in range(len(rows))]
        return [min(size, count) for size, count in zip(each, rows, strict=True)]

    def steps(self, rows: Sequence[int]) -> int:
        """Full batches per epoch; the samples of the incomplete last batch are left out, at random."""
        return min(count // max(size, 1) for size, count in zip(self.batch_sizes(rows), rows, strict=True))

    def batches(
        self, trial: int, epoch: int, shards: Shards, own: range, kept: Tensor | None = None
    ) -> Iterator[list[Batch]]:
        """Per step, the parts of a worker's `own` logical shards; `kept` bool [samples]: only of these samples."""
        rows, limit = self.rows(shards, kept), WINDOW_BYTES // len(shards)
        sizes, draws = (
            self.batch_sizes(rows),
            {i: rng.generator(self.seed, "proxy order", trial, epoch, i) for i in own},
        )
        parts = [self._batches(shards[i], sizes[i], limit, draw, kept) for i, draw in draws.items()]
        yield from prefetch([next(part) for part in parts] for _ in range(self.steps(rows)))

    def _batches(
        self, groups: Sequence[RowGroup], size: int, limit: int, draw: torch.Generator, kept: Tensor | None
    ) -> Iterator[Batch]:
        rest: pa.Table | None = None
        for window in _windows(groups, limit, self.prepared):
            tables = []
            for group in window:
                first, last = self.starts[group], self.starts[group] + group.rows
                table = self.prepared.read(group).add_column(0, "position", pa.array(np.arange(first, last)))
                tables.append(table if kept is None else table.filter(pa.array(kept.numpy()[first:last])))
            joined = pa.concat_tables(tables if rest is None else [rest, *tables])
            table = joined.combine_chunks()  # a take from a hundred chunks costs ten times one from a single chunk
            del tables, joined
            order = torch.randperm(table.num_rows, generator=draw).numpy()
            for start in range(0, table.num_rows - size + 1, size):
                taken = table.take(pa.array(order[start : start + size]))
                labels, positions = (
                    torch.from_numpy(taken[key].to_numpy().astype(np.int64)) for key in ("label", "position")
                )
                yield torch.from_numpy(np.array(self.prepared.pixels(taken))), labels, positions
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

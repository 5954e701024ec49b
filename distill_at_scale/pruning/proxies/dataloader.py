"""Training batches from the shards, in bounded memory and whatever the number of workers.

Every epoch deals the row groups out to a fixed number of logical shards; each logical shard yields its own part of every
batch. A worker owns some logical shards, reads only their row groups, and holds a window of them, whose samples it
shuffles. A small set fits its windows, and then a logical shard's part of an epoch is a full permutation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import RowGroup

WINDOW_BYTES = 512 * 2**20  # of stored images, over all logical shards of a proxy
GROUPS_EACH = 4  # row groups that a logical shard has at least

Batch = tuple[Tensor, Tensor]  # uint8 [n, *shape], labels int64 [n]


@dataclass(frozen=True)
class ProxyDataLoader:
    """What one trial is trained on; equal on every worker."""

    prepared: PreparedDataset
    seed: int
    batch: int
    shards: int  # logical shards that are asked for
    share: float = 1.0  # of the training split, class by class

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The row groups that are trained on: all, or about `share` of every class's, at least one."""
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
        """The largest power of two that is asked for, fits the batch and leaves every shard some row groups."""
        most = min(self.shards, self.batch, max(1, len(self.groups) // GROUPS_EACH))
        return 1 << (most.bit_length() - 1)

    def deal(self, trial: int, epoch: int) -> list[list[RowGroup]]:
        """The row groups of every logical shard, in the order of reading: classes spread evenly, rows balanced."""
        draw = rng.numpy_generator(self.seed, "proxy deal", trial, epoch)
        keyed = []
        for groups in _by_label(self.groups).values():
            places = (np.arange(len(groups)) + draw.random()) / len(groups)
            keyed += [(place, groups[i]) for place, i in zip(places, draw.permutation(len(groups)), strict=True)]
        shards: list[list[RowGroup]] = [[] for _ in range(self.logical_shards)]
        rows = [0] * len(shards)
        for _, group in sorted(keyed, key=lambda pair: pair[0]):
            least = rows.index(min(rows))
            shards[least].append(group)
            rows[least] += group.rows
        return shards

    def sizes(self, dealt: Sequence[Sequence[RowGroup]]) -> list[int]:
        """Samples of each logical shard in every batch; a set that is no larger than a batch is one."""
        rows = [sum(group.rows for group in groups) for groups in dealt]
        if self.samples <= self.batch:
            return rows
        each = [self.batch // len(dealt) + (i < self.batch % len(dealt)) for i in range(len(dealt))]
        return [min(size, held) for size, held in zip(each, rows, strict=True)]

    def steps(self, dealt: Sequence[Sequence[RowGroup]]) -> int:
        """Full batches of an epoch; which samples sit one out is random."""
        pairs = zip(self.sizes(dealt), dealt, strict=True)
        return min(sum(group.rows for group in groups) // size for size, groups in pairs)

    def batches(self, trial: int, epoch: int, dealt: Sequence[Sequence[RowGroup]], own: range) -> Iterator[list[Batch]]:
        """Per step, the parts of a worker's `own` logical shards."""
        sizes = self.sizes(dealt)
        parts = [self._part(dealt[s], sizes[s], len(dealt), rng.generator(self.seed, "proxy order", trial, epoch, s))
                 for s in own]  # fmt: skip
        steps = range(self.steps(dealt))
        yield from prefetch([next(part) for part in parts] for _ in steps)

    def _part(self, groups: Sequence[RowGroup], size: int, shards: int, draw: torch.Generator) -> Iterator[Batch]:
        left: pa.Table | None = None
        for window in _windows(groups, WINDOW_BYTES // shards, self.prepared):
            tables = [self.prepared.read(group) for group in window]
            together = pa.concat_tables(tables if left is None else [left, *tables])
            table = together.combine_chunks()  # a take from a hundred chunks costs ten times one from a single chunk
            del tables, together
            order = torch.randperm(table.num_rows, generator=draw).numpy()
            for start in range(0, table.num_rows - size + 1, size):
                taken = table.take(pa.array(order[start : start + size]))
                labels = torch.from_numpy(taken["label"].to_numpy().astype(np.int64))
                yield torch.from_numpy(np.array(self.prepared.pixels(taken))), labels
            left = table.take(pa.array(order[table.num_rows - table.num_rows % size :]))


def _windows(groups: Sequence[RowGroup], size: int, prepared: PreparedDataset) -> Iterator[list[RowGroup]]:
    """Consecutive row groups of at most so many bytes (one at least)."""
    each = prepared.stored_bytes
    window: list[RowGroup] = []
    held = 0
    for group in groups:
        if window and held + group.rows * each > size:
            yield window
            window, held = [], 0
        window.append(group)
        held += group.rows * each
    if window:
        yield window


def _by_label(groups: Sequence[RowGroup]) -> dict[int, list[RowGroup]]:
    found: dict[int, list[RowGroup]] = {}
    for group in groups:
        found.setdefault(group.label, []).append(group)
    return found

"""The one door to real data during distillation: class-wise draws from the kept samples.

Only what the manifest keeps is ever decoded. Samples stay as they are stored (images as uint8) wherever they are held
(`placement.py`) and become normalised float32 on the device when they are drawn. A draw is the same wherever they lie.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization, normalization_of
from distill_at_scale.data.sampling import placement
from distill_at_scale.data.sampling.lookahead import DrawRequest, Lookahead
from distill_at_scale.data.sampling.placement import InMemory, InShards, MemoryBudget, Placement

MOST_THREADS = 8  # that decode JPEGs of a draw


@dataclass(frozen=True)
class RealBatch:
    """Real images of one class: images float32 [n, *shape] and their places in the class's pool [n]."""

    label: int
    images: Tensor
    rows: Tensor


class ClassSampler:
    """The kept training samples of some classes, by class. `held` says where they lie, in a sentence."""

    held: str = ""

    def __init__(self, pixels: dict[int, Tensor] | Placement, normalization: Normalization, seed: int,
                 device: torch.device | None = None):  # fmt: skip
        """`pixels`: label -> stored values [n, *shape], or a holding; draws go to `device` (default: where they lie)."""
        self.holding: Placement = InMemory(pixels) if isinstance(pixels, dict) else pixels
        self.normalization, self.seed = normalization, seed
        self.device = device or (
            next(iter(pixels.values())).device if isinstance(pixels, dict) else torch.device("cpu")
        )
        apart = self.holding.where == "shards" or (self.holding.where == "host" and self.device.type != "cpu")
        self.lookahead = Lookahead(self._take) if apart else None

    @classmethod
    def load(cls, prepared: PreparedDataset, manifest: Path, labels: Collection[int], seed: int, device: torch.device,
             hold: str = "auto", free: MemoryBudget | None = None) -> ClassSampler:  # fmt: skip
        """What the manifest keeps of some classes, held where `hold` (distill.hold) says; `free` bounds auto.

        Raises UserError for a class of which nothing is kept.
        """
        places = placement.kept_places(prepared, manifest, labels)
        needed = placement.needed_bytes(prepared, places)
        where, why = placement.choose(hold, needed, device, free or placement.memory_budget(device))
        if where == "shards":
            found: Placement = InShards(prepared, places, min(MOST_THREADS, os.cpu_count() or 1))
        else:
            found = InMemory.load(prepared, places, device if where == "device" else torch.device("cpu"))
        pool = cls(found, normalization_of(prepared), seed, device)
        pool.held = placement.describe(where, sum(found.counts.values()), needed, why, device)
        return pool

    @property
    def pixels(self) -> dict[int, Tensor]:
        """Stored values by class; only where they are in memory."""
        assert isinstance(self.holding, InMemory)
        return self.holding.pixels

    def count(self, label: int) -> int:
        return self.holding.counts[label]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All of it, in memory: stored values [n, *shape], sorted by label, and labels int64 [n]."""
        counts = self.holding.counts
        labels = torch.cat([torch.full((count,), c) for c, count in counts.items()])
        first = self.holding.whole(next(iter(counts)))
        every, start = first.new_empty(sum(counts.values()), *first.shape[1:]), 0
        for label, count in counts.items():
            every[start : start + count] = self.holding.whole(label)
            start += count
        return every, labels

    def schedule(self, requests: Iterable[DrawRequest]) -> None:
        """Announce the coming draws in their order: each is read while the one before it is used.

        Only speed depends on it. It has no effect where samples lie on the device that they are drawn to.
        """
        if self.lookahead is not None:
            self.lookahead.schedule(requests)

    def draw(self, labels: Sequence[int], n: int, purpose: str, *index: int) -> list[RealBatch]:
        """min(n, kept) images of each class, without replacement; decided by (seed, purpose, index, class) alone."""
        request = DrawRequest(tuple(labels), n, purpose, index)
        found = self._take(request) if self.lookahead is None else self.lookahead(request)
        return [
            RealBatch(label, self._image(stored), rows) for label, (stored, rows) in zip(labels, found, strict=True)
        ]

    def _image(self, stored: Tensor) -> Tensor:
        return self.normalization.apply(stored.to(self.device, non_blocking=True))

    def _take(self, request: DrawRequest) -> list[tuple[Tensor, Tensor]]:
        return [self._take_class(label, request) for label in request.labels]

    def _take_class(self, label: int, request: DrawRequest) -> tuple[Tensor, Tensor]:
        """Stored values and their rows."""
        chance = rng.generator(self.seed, request.purpose, *request.index, label)
        rows = torch.randperm(self.count(label), generator=chance)[: request.n]
        stored = self.holding.take(label, rows)
        pinned = self.device.type == "cuda" and stored.device.type == "cpu"
        return stored.pin_memory() if pinned else stored, rows

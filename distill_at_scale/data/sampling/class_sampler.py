"""Samples real training data for distillation: draws per class from the kept samples, and from nothing else.

Samples stay as stored (images as uint8) wherever they are held (`placement.py`); a draw normalises them to float32 on the
device. The placement does not change a draw.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization, normalization_of
from distill_at_scale.data.sampling import placement
from distill_at_scale.data.sampling.lookahead import DrawRequest, Lookahead
from distill_at_scale.data.sampling.placement import InMemory, InShards, MemoryBudget, Placement, Places

MAX_THREADS = 8  # that decode the JPEGs of a draw


@dataclass(frozen=True)
class RealBatch:
    """Real images of one class, float32 [n, *shape], and their rows [n] among the kept samples of the class."""

    label: int
    images: Tensor
    rows: Tensor


class ClassSampler:
    """The kept training samples of some classes. `held` describes their placement in a sentence."""

    held: str = ""

    def __init__(self, pixels: dict[int, Tensor] | Placement, normalization: Normalization, seed: int,
                 device: torch.device | None = None):  # fmt: skip
        """`pixels`: label -> stored values [n, *shape], or a placement. Draws go to `device` (default: that of `pixels`)."""
        if isinstance(pixels, dict):
            pixels = InMemory(torch.cat(list(pixels.values())), {label: len(own) for label, own in pixels.items()})
        self.placement = pixels
        self.normalization, self.seed = normalization, seed
        self.device = device or (pixels.stored.device if isinstance(pixels, InMemory) else torch.device("cpu"))
        where = self.placement.where
        slow = where == "shards" or (where == "host" and self.device.type != "cpu")
        self.lookahead = Lookahead(self._take) if slow else None

    @classmethod
    def load(cls, prepared: PreparedDataset, manifest: Path, labels: Collection[int], seed: int, device: torch.device,
             hold: str = "auto", free: MemoryBudget | None = None, first: int | None = None) -> ClassSampler:  # fmt: skip
        """The samples of some classes that the manifest keeps, placed by `hold` (distill.hold); `free` bounds auto.
        `first`: take only this number of samples of each class, those of smallest rank, in the order of their ranks.

        Raises UserError for a class without kept samples.
        """
        places = placement.kept_places(prepared, manifest, labels, first=first)
        needed = sum(map(len, places.values())) * prepared.sample_bytes
        where, why = placement.choose(hold, needed, device, free or placement.memory_budget(device))
        if where == "shards":
            chosen: Placement = InShards(prepared, places, min(MAX_THREADS, os.cpu_count() or 1))
        else:
            chosen = InMemory.load(prepared, places, device if where == "device" else torch.device("cpu"))
        sampler = cls(chosen, normalization_of(prepared), seed, device)
        sampler.held = placement.describe(where, sum(chosen.counts.values()), needed, why, device)
        return sampler

    @property
    def pixels(self) -> dict[int, Tensor]:
        """Stored values by class; only for samples in memory."""
        assert isinstance(self.placement, InMemory)
        return self.placement.pixels

    def count(self, label: int) -> int:
        return self.placement.counts[label]

    def all_samples(self) -> tuple[Tensor, Tensor]:
        """All samples in memory: stored values [n, *shape], sorted by label, and labels int64 [n]."""
        counts = self.placement.counts
        labels = torch.cat([torch.full((count,), label) for label, count in counts.items()])
        if isinstance(self.placement, InMemory):
            return self.placement.stored, labels
        first = self.placement.of_class(next(iter(counts)))
        stored, start = first.new_empty(sum(counts.values()), *first.shape[1:]), 0
        for label, count in counts.items():
            stored[start : start + count] = self.placement.of_class(label)
            start += count
        return stored, labels

    def renew(self, prepared: PreparedDataset, places: Places) -> None:
        """Keep other samples of some classes from now on, as many as before, at these positions within the class, ascending.

        Later draws have the rows that they would have had.
        """
        change = partial(self.placement.renew, prepared, places)
        if self.lookahead is None:
            change()
        else:
            self.lookahead.change(change)

    def schedule(self, requests: Iterable[DrawRequest]) -> None:
        """Announce the coming draws in their order: each is read while the one before it is used.

        Only speed depends on it. It has no effect for samples on the device that draws go to.
        """
        if self.lookahead is not None:
            self.lookahead.schedule(requests)

    def draw(self, labels: Sequence[int], n: int, purpose: str, *index: int) -> list[RealBatch]:
        """min(n, kept) images of each class, without replacement; (seed, purpose, index, class) alone decide them."""
        request = DrawRequest(tuple(labels), n, purpose, index)
        stored, rows = self._take(request) if self.lookahead is None else self.lookahead(request)
        images = self.normalization.apply(stored.to(self.device, non_blocking=True)).split([len(own) for own in rows])
        return [RealBatch(*batch) for batch in zip(labels, images, rows, strict=True)]

    def _take(self, request: DrawRequest) -> tuple[Tensor, list[Tensor]]:
        rows = []
        for label in request.labels:
            generator = rng.generator(self.seed, request.purpose, *request.index, label)
            order = torch.randperm(self.count(label), generator=generator).numpy()
            rows.append(torch.from_numpy(order[: request.n]))
        stored = self.placement.take_all(request.labels, rows)
        pin = self.device.type == "cuda" and stored.device.type == "cpu"
        return stored.pin_memory() if pin else stored, rows

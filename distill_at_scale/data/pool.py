"""The one door to real data during distillation: class-wise draws from the kept samples.

Only what the manifest keeps is ever loaded. Images stay uint8 in memory and become normalised float32 when they are
drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_at_scale import rng
from distill_at_scale.data.shards import Prepared
from distill_at_scale.errors import UserError
from distill_at_scale.pruning.manifest import kept


@dataclass(frozen=True)
class Normalization:
    """x -> (x / 255 - mean) / std per channel; mean and std lie on the scale 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 [n, C, H, W], or clips [n, T, C, H, W] -> float32 of the same shape."""
        mean, std = self._columns(pixels)
        return (pixels.float() / 255 - mean) / std

    def invert(self, images: Tensor) -> Tensor:
        """float [n, C, H, W] or [n, T, C, H, W] -> the scale 0..1, not clipped."""
        mean, std = self._columns(images)
        return images * std + mean

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor(self.mean, device=like.device).view(-1, 1, 1),
            torch.tensor(self.std, device=like.device).view(-1, 1, 1),
        )


@dataclass(frozen=True)
class Draw:
    """Real images of one class: images float32 [n, *shape] and their places in the class's pool [n]."""

    label: int
    images: Tensor
    rows: Tensor


class Pool:
    """The kept training samples of some classes, by class."""

    def __init__(self, pixels: dict[int, Tensor], normalization: Normalization, seed: int):
        self.pixels, self.normalization, self.seed = pixels, normalization, seed

    @classmethod
    def load(cls, prepared: Prepared, manifest: Path, labels: Collection[int], seed: int, device: torch.device) -> Pool:
        """Read what the manifest keeps of some classes.

        Raises UserError for a class of which nothing is kept.
        """
        pixels, found = prepared.load("train", only=kept(manifest), labels=labels)
        by_class = {label: torch.from_numpy(pixels[found == label]).to(device) for label in sorted(labels)}
        for label, held in by_class.items():
            if not len(held):
                name = prepared.class_names[label]
                raise UserError(
                    f"the manifest keeps no sample of the class {name!r}; raise select.keep or select.min_per_class"
                )
        return cls(by_class, Normalization(tuple(prepared.mean), tuple(prepared.std)), seed)

    def count(self, label: int) -> int:
        return len(self.pixels[label])

    def whole(self) -> tuple[Tensor, Tensor]:
        """All of it: pixels uint8 [n, *shape], sorted by label, and labels int64 [n]; for networks trained on real data."""
        labels = torch.cat([torch.full((self.count(c),), c) for c in self.pixels])
        return torch.cat(list(self.pixels.values())), labels

    def draw(self, labels: Sequence[int], n: int, purpose: str, *index: int) -> list[Draw]:
        """min(n, kept) images of each class, without replacement; decided by (seed, purpose, index, class) alone."""
        return [self._draw_class(label, n, purpose, *index) for label in labels]

    def _draw_class(self, label: int, n: int, purpose: str, *index: int) -> Draw:
        held = self.pixels[label]
        order = torch.randperm(len(held), generator=rng.generator(self.seed, purpose, *index, label))[:n]
        return Draw(label, self.normalization.apply(held[order.to(held.device)]), order)

"""Differentiable siamese augmentation (DSA, Zhao & Bilen 2021, arXiv 2102.08259) and CutMix.

A draw picks one family of the strategy and its parameters. Matching applies the same draw to the real and the synthetic images
of a class, with gradients; training of students draws parameters per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.errors import UserError

FLIP, SCALE, ROTATE = 0.5, 1.2, 15.0  # probability, largest factor, largest angle in degrees
CROP, CUTOUT = 0.125, 0.5  # shares of the side
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5


@dataclass(frozen=True)
class AugmentParams:
    """One family and the uniform numbers [1 or n, 4] in [0, 1) that its parameters follow from; None: no augmentation."""

    family: str | None
    numbers: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Float images [n, C, H, W] or clips [n, T, C, H, W] -> the same shape, differentiable; equal for a clip's frames."""
        if self.family is None:
            return images
        if images.dim() == 5:
            per_frame = self.numbers.expand(len(images), -1).repeat_interleave(images.shape[1], 0)
            return AugmentParams(self.family, per_frame).apply(images.flatten(0, 1)).view(images.shape)
        numbers = self.numbers.to(images.device, non_blocking=True)
        return FAMILIES[self.family](images, numbers.expand(len(images), -1))


class Augmentation:
    """A strategy: family names joined by `_`, or `none`. Raises UserError for an unknown family."""

    def __init__(self, strategy: str):
        self.families = () if strategy == "none" else tuple(strategy.split("_"))
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise UserError(
                f"unknown augmentation {unknown[0]!r} in {strategy!r}; known: none, or any of {SIAMESE_AUGMENT}"
            )

    def draw(self, generator: torch.Generator, per_image: int | None = None) -> AugmentParams:
        """Parameters for a whole batch, or with `per_image` = n one set for each of n images."""
        if not self.families:
            return AugmentParams(None, torch.zeros(1, 4))
        family = self.families[int(torch.randint(len(self.families), (1,), generator=generator))]
        return AugmentParams(family, torch.rand(per_image or 1, 4, generator=generator))

    def draw_each(self, generator: torch.Generator, n: int) -> list[AugmentParams]:
        """n draws, each for a whole batch."""
        if not self.families:
            return [AugmentParams(None, torch.zeros(1, 4))] * n
        families = torch.randint(len(self.families), (n,), generator=generator).tolist()
        numbers = torch.rand(n, 4, generator=generator).split(1)
        return [AugmentParams(self.families[k], own) for k, own in zip(families, numbers, strict=True)]


def apply_each(params: Sequence[AugmentParams], images: Tensor, counts: Sequence[int]) -> Tensor:
    """Augment batches of counts[k] images by params[k], draws for whole batches; [sum of counts, *shape] in and out.

    One call per family, not per batch.
    """
    families = list(dict.fromkeys(p.family for p in params))
    owner = np.repeat(np.arange(len(params)), counts)
    numbers = torch.cat([p.numbers for p in params])
    family_of = np.array([families.index(p.family) for p in params])[owner]
    rows = [np.flatnonzero(family_of == k) for k in range(len(families))]
    own = [AugmentParams(name, numbers[torch.from_numpy(owner[r])]) for name, r in zip(families, rows, strict=True)]
    if len(families) == 1:
        return own[0].apply(images)
    parts = [p.apply(images[_index(r, images.device)]) for p, r in zip(own, rows, strict=True)]
    return torch.cat(parts)[_index(np.argsort(np.concatenate(rows)), images.device)]


def _index(rows: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)


@dataclass(frozen=True)
class CutMixBatch:
    """Images with a box from another image: `share` of image i is its own, the rest is from image `order[i]`."""

    images: Tensor
    order: Tensor
    share: float


def cutmix(images: Tensor, generator: torch.Generator) -> CutMixBatch:
    """CutMix (Yun et al. 2019, arXiv 1905.04899) with one uniformly drawn share for the batch [n, *, H, W]."""
    height, width = images.shape[-2:]
    u = torch.rand(3, generator=generator)
    box_side = math.sqrt(1 - float(u[0]))  # as a share of the image's
    box, spans = torch.zeros(height, width, dtype=torch.bool, device=images.device), []
    for position, size in ((u[1], height), (u[2], width)):
        centre, half = int(position * size), int(box_side * size) // 2
        spans.append(slice(max(0, centre - half), min(size, centre + half)))
    box[spans[0], spans[1]] = True
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return CutMixBatch(torch.where(box, images[order], images), order, 1 - float(box.float().mean()))


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def color(images: Tensor, u: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast; u [n, 4] as in all families."""
    images = images + _column(u[:, 0] - 0.5) * BRIGHTNESS
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * _column(u[:, 1]) * SATURATION + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _column(u[:, 2] + CONTRAST) + mean


def crop(images: Tensor, u: Tensor) -> Tensor:
    """Shift by up to CROP of the side, padded with zeros."""
    height, width = images.shape[-2:]
    y_max, x_max = (int(size * CROP + 0.5) for size in (height, width))
    padded = F.pad(images, (x_max, x_max, y_max, y_max))
    top, left = (u[:, 0] * (2 * y_max + 1)).long(), (u[:, 1] * (2 * x_max + 1)).long()
    rows = top[:, None] + torch.arange(height, device=images.device)  # n x H
    columns = left[:, None] + torch.arange(width, device=images.device)  # n x W
    image = torch.arange(len(images), device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return shifted.contiguous()  # channels last would go through a whole network, slower on a CPU


def cutout(images: Tensor, u: Tensor) -> Tensor:
    """A square of CUTOUT of the side, with its centre anywhere, set to zero."""
    inside = []
    for size, position in zip(images.shape[-2:], (u[:, 0], u[:, 1]), strict=True):
        hole = int(size * CUTOUT + 0.5)
        centre = (position * (size + 1 - hole % 2)).long()[:, None]
        offset = torch.arange(size, device=images.device)[None] - centre + hole // 2
        inside.append((offset >= 0) & (offset < hole))
    return images * (~(inside[0][:, :, None] & inside[1][:, None, :]))[:, None]


def flip(images: Tensor, u: Tensor) -> Tensor:
    return torch.where(_column(u[:, 0]) < FLIP, images.flip(3), images)


def scale(images: Tensor, u: Tensor) -> Tensor:
    """Independent factors between 1 / SCALE and SCALE for height and width."""
    factor = u[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    zero = torch.zeros_like(factor[:, 0])
    return _warp(images, torch.stack([factor[:, 0], zero, zero, zero, factor[:, 1], zero], 1))


def rotate(images: Tensor, u: Tensor) -> Tensor:
    """An angle between -ROTATE and ROTATE degrees."""
    angle = (u[:, 0] - 0.5) * 2 * ROTATE / 180 * math.pi
    zero = torch.zeros_like(angle)
    return _warp(images, torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1))


def _warp(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.view(-1, 2, 3), list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)


FAMILIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate,
}  # fmt: skip

"""Differentiable siamese augmentation (Zhao & Bilen 2021, "DSA"; METHOD.md section 4).

A draw picks one family of the strategy and its parameters; the same draw is applied to the real and to the synthetic
images of a class, and gradients flow through it. Color stands for brightness, saturation and contrast together. For
the training of evaluation networks each image of a batch gets parameters of its own (`per_image`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.errors import UserError

FLIP, SCALE, ROTATE = 0.5, 1.2, 15.0  # probability, largest factor, largest angle in degrees
CROP, CUTOUT = 0.125, 0.5  # share of the side
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5


@dataclass(frozen=True)
class AugmentParams:
    """One family and uniform random numbers in [0, 1), [1 or n, 4], from which its parameters follow."""

    family: str | None
    numbers: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Float images [n, C, H, W] or clips [n, T, C, H, W] -> the same shape, differentiable; frames of a clip alike."""
        if self.family is None:
            return images
        if images.dim() == 5:
            each = self.numbers.expand(len(images), -1).repeat_interleave(images.shape[1], 0)
            return AugmentParams(self.family, each).apply(images.flatten(0, 1)).view(images.shape)
        return FAMILIES[self.family](images, self.numbers.to(images.device).expand(len(images), -1))


class Augmentation:
    """A strategy: family names joined by `_`, or `none`."""

    def __init__(self, strategy: str):
        self.families = () if strategy == "none" else tuple(strategy.split("_"))
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise UserError(
                f"unknown augmentation {unknown[0]!r} in {strategy!r}; known: none, or any of {SIAMESE_AUGMENT}"
            )

    def draw(self, generator: torch.Generator, per_image: int | None = None) -> AugmentParams:
        """One draw shared by a whole batch, or with `per_image` parameters for each of so many images."""
        if not self.families:
            return AugmentParams(None, torch.zeros(1, 4))
        family = self.families[int(torch.randint(len(self.families), (1,), generator=generator))]
        return AugmentParams(family, torch.rand(per_image or 1, 4, generator=generator))


@dataclass(frozen=True)
class Mixed:
    """Images in which a box was replaced: `share` of image i is its own, the rest that of image `order[i]`."""

    images: Tensor
    order: Tensor
    share: float


def cutmix(images: Tensor, generator: torch.Generator) -> Mixed:
    """CutMix (Yun et al. 2019, arXiv 1905.04899) with one uniformly drawn share for the batch [n, *, H, W]."""
    height, width = images.shape[-2:]
    u = torch.rand(3, generator=generator)
    side = math.sqrt(1 - float(u[0]))  # of the box, relative
    spans = []
    for place, whole in ((u[1], height), (u[2], width)):
        centre, half = int(place * whole), int(side * whole) // 2
        spans.append((max(0, centre - half), min(whole, centre + half)))
    (top, bottom), (left, right) = spans
    order = torch.randperm(len(images), generator=generator).to(images.device)
    box = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    box[top:bottom, left:right] = True
    return Mixed(torch.where(box, images[order], images), order, 1 - float(box.float().mean()))


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def color(images: Tensor, u: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast."""
    images = images + _column(u[:, 0] - 0.5) * BRIGHTNESS
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * _column(u[:, 1]) * SATURATION + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _column(u[:, 2] + CONTRAST) + mean


def crop(images: Tensor, u: Tensor) -> Tensor:
    """Shift by up to CROP of the side, padding with zeros."""
    side = images.shape[-2:]
    reach = [int(s * CROP + 0.5) for s in side]
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    top = (u[:, 0] * (2 * reach[0] + 1)).long()
    left = (u[:, 1] * (2 * reach[1] + 1)).long()
    rows = top[:, None] + torch.arange(side[0], device=images.device)  # n x H
    columns = left[:, None] + torch.arange(side[1], device=images.device)  # n x W
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, u: Tensor) -> Tensor:
    """A square of CUTOUT of the side, anywhere its centre falls, set to zero."""
    height, width = images.shape[-2:]
    hole = [int(s * CUTOUT + 0.5) for s in (height, width)]
    row = (
        torch.arange(height, device=images.device)[None]
        - (u[:, 0] * (height + 1 - hole[0] % 2)).long()[:, None]
        + hole[0] // 2
    )
    column = (
        torch.arange(width, device=images.device)[None]
        - (u[:, 1] * (width + 1 - hole[1] % 2)).long()[:, None]
        + hole[1] // 2
    )
    inside = ((row >= 0) & (row < hole[0]))[:, :, None] & ((column >= 0) & (column < hole[1]))[:, None, :]
    return images * (~inside)[:, None]


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

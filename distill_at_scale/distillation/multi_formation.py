"""Multi-formation: one stored image holds factor x factor training images (IDC, Kim et al. 2022, arXiv 2205.14959, eq. 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_parts(images: Tensor, factor: int) -> Tensor:
    """[n, *lead, H, W] -> [n * factor^2, *lead, H, W]: the parts of each image, row by row, enlarged to its size.

    `lead` is C, or T, C for clips. Differentiable. Parts overlap if the factor does not divide a side.
    """
    if factor == 1:
        return images
    height, width = images.shape[-2:]
    rows, columns = -(-height // factor), -(-width // factor)
    parts = [images[..., y : y + rows, x : x + columns] for y, x in _corners(height, width, factor)]
    stacked = torch.stack(parts, 1).flatten(0, 1)  # n * factor^2, *lead, rows, columns
    flat = stacked.flatten(1, -3) if stacked.dim() > 4 else stacked
    enlarged = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    return enlarged.view(len(stacked), *images.shape[1:])


def assemble_parts(parts: Tensor, factor: int) -> Tensor:
    """The inverse, for initial images: [n * factor^2, *lead, H, W] -> [n, *lead, H, W], each image reduced to its part.

    Where parts overlap, the later one is visible.
    """
    if factor == 1:
        return parts
    height, width = parts.shape[-2:]
    rows, columns = -(-height // factor), -(-width // factor)
    flat = parts.flatten(1, -3) if parts.dim() > 4 else parts
    small = F.interpolate(flat, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
    small = small.view(-1, factor * factor, *parts.shape[1:-2], rows, columns)
    images = parts.new_zeros(len(small), *parts.shape[1:])
    for k, (y, x) in enumerate(_corners(height, width, factor)):
        images[..., y : y + rows, x : x + columns] = small[:, k]
    return images


def _corners(height: int, width: int, factor: int) -> list[tuple[int, int]]:
    """(top, left) of the parts, row by row."""

    def starts(side: int) -> list[int]:
        part = -(-side // factor)
        return [min(k * part, side - part) for k in range(factor)]

    return [(top, left) for top in starts(height) for left in starts(width)]

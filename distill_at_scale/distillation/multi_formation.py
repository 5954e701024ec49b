"""Multi-formation: one stored image holds factor x factor training images (IDC, Kim et al. 2022, arXiv 2205.14959, eq. 5).

Each of the equal parts is enlarged to the size of the whole; differentiable, so that stored images can be optimised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def parts_of(images: Tensor, factor: int) -> Tensor:
    """[n, *lead, H, W] -> [n * factor^2, *lead, H, W]; the parts of an image follow each other, row by row, enlarged.

    `lead` is C, or of clips T, C. Where a side is no multiple of the factor, parts overlap by less than a pixel's width.
    """
    if factor == 1:
        return images
    height, width = images.shape[-2:]
    tall, wide = -(-height // factor), -(-width // factor)
    parts = []
    for row in _starts(height, tall, factor):
        parts += [images[..., row : row + tall, left : left + wide] for left in _starts(width, wide, factor)]
    stacked = torch.stack(parts, 1).flatten(0, 1)  # n * factor^2, *lead, tall, wide
    flat = stacked.flatten(1, -3) if stacked.dim() > 4 else stacked
    enlarged = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    return enlarged.view(len(stacked), *images.shape[1:])


def assembled(parts: Tensor, factor: int) -> Tensor:
    """The inverse way, to start from: [n * factor^2, *lead, H, W] -> [n, *lead, H, W], every image reduced to its part.

    Where parts overlap, the later one shows.
    """
    if factor == 1:
        return parts
    height, width = parts.shape[-2:]
    tall, wide = -(-height // factor), -(-width // factor)
    flat = parts.flatten(1, -3) if parts.dim() > 4 else parts
    small = F.interpolate(flat, size=(tall, wide), mode="bilinear", align_corners=False, antialias=True)
    small = small.view(-1, factor * factor, *parts.shape[1:-2], tall, wide)
    whole = parts.new_zeros(len(small), *parts.shape[1:])
    places = [(row, left) for row in _starts(height, tall, factor) for left in _starts(width, wide, factor)]
    for k, (row, left) in enumerate(places):
        whole[..., row : row + tall, left : left + wide] = small[:, k]
    return whole


def _starts(side: int, part: int, factor: int) -> list[int]:
    return [min(k * part, side - part) for k in range(factor)]

"""Channel mean and standard deviation of training samples, from sums that do not depend on the order of adding.

Sums of pixels are exact integers; those of other values are 64-bit floats. Left out: whitening (`whitening.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Moments:
    """The sums [3, C] (n, sum x, sum x^2) of samples that pass by: images, clips, or tensors (float32 arrays)."""

    def __init__(self, shape: Sequence[int], tensors: bool):
        self.shape, self.tensors = tuple(shape), tensors
        channels = (shape[0] if len(shape) > 1 else 1) if tensors else shape[-3]
        self.sums = np.zeros((3, channels), np.float64 if tensors else np.int64)

    def add(self, samples: Array) -> None:
        """uint8 (tensors: float32) [n, *shape]."""
        axis = 1 if self.tensors or len(self.shape) == 3 else 2  # of the channels; a clip is [n, T, C, H, W]
        by_channel = np.moveaxis(samples, axis, 0) if len(self.shape) > 1 else samples[None]
        for channel, values in enumerate(by_channel):
            self.sums[:, channel] += _of_floats(values) if self.tensors else _of_bytes(values)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        return of_values(self.sums) if self.tensors else of_pixels(self.sums)


def of_pixels(sums: Array) -> tuple[list[float], list[float]]:
    """Channel mean and standard deviation of the training pixels, on the scale 0..1; 1 for a channel that is constant."""
    count, total, squares = sums.astype(np.float64)
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 1e-12))
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) or 1.0 for s in std]


def of_values(sums: Array) -> tuple[list[float], list[float]]:
    """The same of values that are not pixels, on their own scale, with the digits that 32 bits hold."""
    count, total, squares = sums
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    return [float(f"{m:.9g}") for m in mean], [float(f"{s:.9g}") or 1.0 for s in std]


def _of_bytes(values: Array) -> Array:
    histogram, levels = np.bincount(values.reshape(-1), minlength=256), np.arange(256)
    return np.array([values.size, histogram @ levels, histogram @ levels**2], np.int64)


def _of_floats(values: Array) -> Array:
    wide = values.astype(np.float64)
    return np.array([values.size, wide.sum(), (wide * wide).sum()])

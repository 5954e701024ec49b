"""Channel mean and standard deviation of training samples, from sums that do not depend on the order of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill_at_scale.data.codecs.image import Array


class ChannelSums:
    """Sums [3, C] (n, sum x, sum x^2) over images, clips, or tensors (float32 arrays, whose first axis is the channel).

    Sums of pixels are exact integers; those of tensors are float64.
    """

    def __init__(self, shape: Sequence[int], tensors: bool):
        self.shape, self.tensors = tuple(shape), tensors
        channels = (shape[0] if len(shape) > 1 else 1) if tensors else shape[-3]
        self.sums = np.zeros((3, channels), np.float64 if tensors else np.int64)
        # squares of at most 256 pixels add up exactly in float32; the number must divide a channel
        pixels = int(np.prod(self.shape)) // channels
        self._run = next(run for run in range(min(256, pixels), 0, -1) if pixels % run == 0)

    def add(self, samples: Array) -> None:
        """uint8 (tensors: float32) [n, *shape]."""
        axis = 1 if self.tensors or len(self.shape) == 3 else 2  # of the channels; a clip is [n, T, C, H, W]
        by_channel = np.moveaxis(samples, axis, 0) if len(self.shape) > 1 else samples[None]
        if self.tensors:
            for channel, values in enumerate(by_channel):
                wide = values.astype(np.float64)
                self.sums[:, channel] += (values.size, wide.sum(), (wide * wide).sum())
            return
        runs = by_channel.reshape(len(by_channel), -1, self._run).astype(np.float32)  # [C, runs, pixels of a run]
        self.sums[0] += runs[0].size
        self.sums[1] += runs.sum(2).sum(1, dtype=np.float64).astype(np.int64)
        self.sums[2] += np.einsum("crp,crp->cr", runs, runs).sum(1, dtype=np.float64).astype(np.int64)


def mean_and_std(sums: Array, tensors: bool) -> tuple[list[float], list[float]]:
    """Of sums [3, C]; of pixels on the scale 0..1. The deviation of a constant channel is 1."""
    count, total, squares = sums.astype(np.float64)
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0 if tensors else 1e-12))
    if tensors:  # the digits that float32 holds
        return [float(f"{m:.9g}") for m in mean], [float(f"{s:.9g}") or 1.0 for s in std]
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) or 1.0 for s in std]

"""Normalises stored values for networks: (x / scale - mean) / std per channel, then ZCA whitening if configured.

Images and clips are stored as bytes, so their scale is 255; other arrays as float32, with scale 1 and the first axis as
channels. Scoring uses values that are not whitened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import MAX_AXES
from distill_at_scale.data.prepared.whitening import Whitening, whitening_of

LARGEST = 3e38  # that float32 holds
MEANINGS = {255: "(x / 255 - mean) / std per channel", 1: "(x - mean) / std per entry of the first axis"}


@dataclass(frozen=True)
class Normalization:
    """mean and std per channel, of stored values / `scale`; `inner` axes follow the channel axis."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: int = 255
    inner: int = 2
    whitening: Whitening | None = field(default=None, compare=False)

    def apply(self, stored: Tensor) -> Tensor:
        """Stored values [n, *shape] (uint8, or float32 where the scale is 1) -> float32 of the same shape."""
        mean, std = self._mean_and_std(stored)
        values = stored.float()
        normal = ((values / self.scale if self.scale != 1 else values) - mean) / std
        return normal if self.whitening is None else self.whitening.apply(normal)

    def invert(self, images: Tensor) -> Tensor:
        """float [n, *shape] -> stored values / scale, not clipped."""
        mean, std = self._mean_and_std(images)
        return (images if self.whitening is None else self.whitening.invert(images)) * std + mean

    def _mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * self.inner)
        mean, std = (
            torch.tensor(values).view(shape).to(like.device, non_blocking=True) for values in (self.mean, self.std)
        )
        return mean, std

    def stored(self, images: Tensor) -> Tensor:
        """float [n, *shape] -> as samples are stored: uint8, clipped; or float32 where the scale is 1."""
        values = self.invert(images)
        return values.float() if self.scale == 1 else (values * 255).round().clamp(0, 255).to(torch.uint8)

    def card(self) -> dict[str, Any]:
        """The entry `normalization` of a synthetic set's card."""
        tensors = {} if self.scale == 255 else {"scale": self.scale, "inner": self.inner}
        return {"mean": list(self.mean), "std": list(self.std), "meaning": MEANINGS[self.scale], **tensors}

    @classmethod
    def of_card(cls, card: Mapping[str, Any], whitening: Whitening | None = None) -> Normalization:
        """Raises UserError for an invalid card."""
        mean: Any = card.get("mean")
        std: Any = card.get("std")
        scale, inner = card.get("scale", 255), card.get("inner", 2)
        wrong = None
        if not _are_numbers(mean) or not _are_numbers(std):
            wrong = "mean and std must be lists of finite numbers"
        elif len(mean) != len(std) or min(std) <= 0:
            wrong = "mean and std must be as many, and every std above 0"
        elif type(scale) is not int or scale not in MEANINGS or type(inner) is not int or not 0 <= inner < MAX_AXES:
            wrong = "its scale or its inner axes are unknown to this version"
        if wrong:
            raise UserError(f"the card's normalization cannot be used: {wrong}")
        return cls(tuple(mean), tuple(std), scale, inner, whitening)


def _are_numbers(values: Any) -> bool:
    is_list = isinstance(values, list | tuple) and len(values) > 0
    return is_list and all(type(value) in (int, float) and abs(value) < LARGEST for value in values)


def normalization_of(prepared: PreparedDataset, whitened: bool = True) -> Normalization:
    """Of a prepared set; scoring uses `whitened=False`."""
    plain = Normalization(tuple(prepared.mean), tuple(prepared.std))
    if prepared.kind == "tensors":
        plain = replace(plain, scale=1, inner=len(prepared.shape) - 1)
    return replace(plain, whitening=whitening_of(prepared)) if whitened else plain

"""What networks see of stored values: (x / scale - mean) / std per channel and, on request, ZCA whitening after it.

Images and clips are stored as bytes, so their scale is 255; other arrays as float32, whose scale is 1 and whose channel is
their first axis. How the whitening is computed is the business of `whitening.py`. Left out: scoring, which never whitens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import MAX_AXES
from distill_at_scale.data.prepared.whitening import FILE

LARGEST = 3e38  # what a 32-bit float holds
MEANINGS = {255: "(x / 255 - mean) / std per channel", 1: "(x - mean) / std per entry of the first axis"}


@dataclass(frozen=True)
class Whitening:
    """Flat normalised samples x [n, d] -> (x - mean) @ matrix; mean [d], matrix [d, d] symmetric and positive, float32."""

    mean: Tensor
    matrix: Tensor
    _on: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def apply(self, images: Tensor) -> Tensor:
        """float32 [n, *shape] -> the same shape."""
        flat = images.flatten(1) - self._at("mean", images.device)
        return (flat @ self._at("matrix", images.device)).view(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """float32 [n, *shape] -> the same shape; computed in 64 bits."""
        flat = (images.flatten(1).cpu().double() @ self.inverse) + self.mean.double()
        return flat.to(images.dtype).view(images.shape).to(images.device)

    @cached_property
    def inverse(self) -> Tensor:
        """float64 [d, d], on the CPU."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix.double()))

    def save(self, path: Path) -> None:
        safetensors_io.write(path, {"mean": self.mean, "matrix": self.matrix})

    @classmethod
    def load(cls, path: Path) -> Whitening:
        found = safetensors_io.load(path)
        return cls(found["mean"], found["matrix"])

    def _at(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._on:
            self._on[name, device] = getattr(self, name).to(device)
        return self._on[name, device]


@dataclass(frozen=True)
class Normalization:
    """mean and std, one for each channel, on the scale 0..1 of stored values / `scale`; `inner` axes follow the channel's."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: int = 255
    inner: int = 2
    whitening: Whitening | None = field(default=None, compare=False)

    def apply(self, stored: Tensor) -> Tensor:
        """Stored values [n, *shape] (uint8, or float32 where the scale is 1) -> float32 of the same shape."""
        mean, std = self._columns(stored)
        values = stored.float()
        normal = ((values / self.scale if self.scale != 1 else values) - mean) / std
        return normal if self.whitening is None else self.whitening.apply(normal)

    def invert(self, images: Tensor) -> Tensor:
        """float [n, *shape] -> stored values / scale, not clipped."""
        mean, std = self._columns(images)
        return (images if self.whitening is None else self.whitening.invert(images)) * std + mean

    def stored(self, images: Tensor) -> Tensor:
        """float [n, *shape] -> as samples are stored: uint8, clipped; or float32 where the scale is 1."""
        values = self.invert(images)
        return values.float() if self.scale == 1 else (values * 255).round().clamp(0, 255).to(torch.uint8)

    def card(self) -> dict[str, Any]:
        """What a set says of it; a reader needs nothing else but the whitening's file."""
        more = {} if self.scale == 255 else {"scale": self.scale, "inner": self.inner}
        return {"mean": list(self.mean), "std": list(self.std), "meaning": MEANINGS[self.scale], **more}

    @classmethod
    def of_card(cls, card: Mapping[str, Any], whitening: Whitening | None = None) -> Normalization:
        """Raises UserError for what is no normalisation."""
        if wrong := _wrong(card):
            raise UserError(f"the card's normalization cannot be used: {wrong}")
        return cls(tuple(card["mean"]), tuple(card["std"]), card.get("scale", 255), card.get("inner", 2), whitening)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * self.inner)
        return (
            torch.tensor(self.mean, device=like.device).view(shape),
            torch.tensor(self.std, device=like.device).view(shape),
        )


def _wrong(card: Mapping[str, Any]) -> str | None:
    mean: Any = card.get("mean")
    std: Any = card.get("std")
    for values in (mean, std):
        if not isinstance(values, list | tuple) or not values or not all(map(_is_number, values)):
            return "mean and std must be lists of finite numbers"
    if len(mean) != len(std) or min(std) <= 0:
        return "mean and std must be as many, and every std above 0"
    scale, inner = card.get("scale", 255), card.get("inner", 2)
    if type(scale) is not int or scale not in MEANINGS or type(inner) is not int or not 0 <= inner < MAX_AXES:
        return "its scale or its inner axes are none that this version knows"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def normalization_of(prepared: PreparedDataset, whitened: bool = True) -> Normalization:
    """Of a prepared set; `whitened=False` is what scoring sees."""
    plain = Normalization(tuple(prepared.mean), tuple(prepared.std))
    if prepared.kind == "tensors":
        plain = replace(plain, scale=1, inner=len(prepared.shape) - 1)
    path = prepared.folder / FILE
    return replace(plain, whitening=Whitening.load(path)) if whitened and path.exists() else plain


def whitening_card(prepared: PreparedDataset) -> dict[str, Any] | None:
    """What the card of a set says of the whitening; None without one."""
    path = prepared.folder / FILE
    if not path.exists():
        return None
    with safe_open(path, "pt") as handle:
        facts = json.loads(handle.metadata()["facts"])
    return {**facts, "file": FILE, "meaning": "(flat normalised values - mean) @ matrix"}

"""ZCA whitening (`data.whiten`): fitted at the end of ingest, applied for distillation and evaluation, never for scoring.

This module alone reads and writes its file, in prepared/ and in synthetic/. The matrix is (C + epsilon)^-1/2 of the covariance
C of normalised training samples, with kornia's epsilon. Only `Whitening` needs torch, which ingest must not load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "whitening.safetensors"
EPSILON = 0.1
MAX_VALUES = 12_288  # of a sample, 3 x 64 x 64: the covariance takes 1.2 GB, its eigenvalues some ten minutes


@dataclass(frozen=True)
class Whitening:
    """Flat normalised samples x [n, d] -> (x - mean) @ matrix; mean [d], matrix [d, d] symmetric and positive, float32."""

    mean: Tensor
    matrix: Tensor
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def apply(self, images: Tensor) -> Tensor:
        """float32 [n, *shape] -> the same shape."""
        flat = images.flatten(1) - self._on("mean", images.device)
        return (flat @ self._on("matrix", images.device)).view(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """float32 [n, *shape] -> the same shape; computed in float64."""
        flat = (images.flatten(1).cpu().double() @ self.inverse) + self.mean.double()
        return flat.to(images.dtype).view(images.shape).to(images.device)

    @cached_property
    def inverse(self) -> Tensor:
        """float64 [d, d], on the CPU."""
        import torch

        return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix.double()))

    def _on(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            self._copies[name, device] = getattr(self, name).to(device)
        return self._copies[name, device]

    def save(self, folder: Path) -> None:
        from distill_at_scale.core import safetensors_io

        safetensors_io.write(folder / FILE, {"mean": self.mean, "matrix": self.matrix})

    @classmethod
    def load(cls, folder: Path) -> Whitening:
        """Raises FileNotFoundError if the folder has none."""
        from distill_at_scale.core import safetensors_io

        tensors = safetensors_io.load(folder / FILE)
        return cls(tensors["mean"], tensors["matrix"])


def whitening_of(prepared: PreparedDataset) -> Whitening | None:
    return Whitening.load(prepared.folder) if (prepared.folder / FILE).exists() else None


def whitening_card(prepared: PreparedDataset) -> dict[str, Any] | None:
    """The entry `whitening` of a synthetic set's card; None for data that are not whitened."""
    path = prepared.folder / FILE
    if not path.exists():
        return None
    with safe_open(path, "np") as handle:
        facts = json.loads(handle.metadata()["facts"])
    return {**facts, "file": FILE, "meaning": "(flat normalised values - mean) @ matrix"}


def check(data: DataSection, shape: Sequence[int]) -> None:
    """Raises UserError if samples are to be whitened whose covariance is too large."""
    if data.whiten == "zca" and (values := math.prod(shape)) > MAX_VALUES:
        what = f"the covariance of all {values:,} values of a sample, at most {MAX_VALUES:,} can be whitened"
        raise UserError(f"data.whiten = zca needs {what}; lower data.size or data.frames, or set data.whiten=none")


def fit(folder: Path, data: DataSection) -> None:
    """If `data.whiten` asks for it, computes the whitening of the prepared set in `folder` and stores it there."""
    if data.whiten != "zca":
        return
    prepared = PreparedDataset(folder)
    check(data, prepared.shape)
    tensors = prepared.kind == "tensors"
    axes = (-1, *(1,) * (len(prepared.shape) - 1 if tensors else 2))
    channel_mean, channel_std = (np.reshape(values, axes) for values in (prepared.mean, prepared.std))
    size, total = math.prod(prepared.shape), 0
    mean, products = np.zeros(size), np.zeros((size, size))
    for chunk in prepared.chunks("train"):
        stored = prepared.pixels(prepared.read(chunk)).astype(np.float64)
        flat = ((stored / (1 if tensors else 255) - channel_mean) / channel_std).reshape(len(stored), -1)
        mean += flat.sum(0)
        products += flat.T @ flat
        total += len(flat)
    mean /= total
    products -= total * np.outer(mean, mean)
    arrays = {"mean": mean.astype(np.float32), "matrix": inverse_root(products / max(1, total - 1))}
    save_file(arrays, folder / FILE, {"facts": json.dumps({"kind": "zca", "epsilon": EPSILON, "samples": total})})


def inverse_root(covariance: Array) -> Array:
    """float64 [d, d] -> (covariance + EPSILON)^-1/2 as float32, exactly symmetric."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors / np.sqrt(values.clip(0) + EPSILON)) @ vectors.T
    return ((root + root.T) / 2).astype(np.float32)

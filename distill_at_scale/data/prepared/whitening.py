"""ZCA whitening, computed from the training split: the rotation-free map after which normalised values are uncorrelated.

The covariance is summed in float64 over the shards, in their order; the matrix is (C + epsilon)^-1/2 with the epsilon of
kornia, whose whitening the field uses. No torch here, as ingest calls it; what applies the matrix is in `normalization.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset

FILE = "whitening.safetensors"  # in prepared/ and in synthetic/
EPSILON = 0.1
MAX_VALUES = 12_288  # of a sample, 3 x 64 x 64: the covariance takes 1.2 GB, its roots some ten minutes

Array = np.ndarray[Any, Any]


def check(shape: Sequence[int]) -> None:
    """Raises UserError for samples whose covariance is too large."""
    if (values := math.prod(shape)) > MAX_VALUES:
        raise UserError(
            f"data.whiten = zca needs the covariance of all {values:,} values of a sample, at most {MAX_VALUES:,} can be "
            "whitened; lower data.size or data.frames, or set data.whiten=none"
        )


def fit(folder: Path) -> None:
    """Compute the whitening of the prepared set in a folder and leave it there, as FILE.

    Raises UserError for samples that are too large.
    """
    prepared = PreparedDataset(folder)
    check(prepared.shape)
    size, total = math.prod(prepared.shape), 0
    mean, products = np.zeros(size), np.zeros((size, size))
    for chunk in prepared.chunks("train"):
        flat = _normalised(prepared, prepared.pixels(prepared.read(chunk)))
        mean += flat.sum(0)
        products += flat.T @ flat
        total += len(flat)
    mean /= total
    products -= total * np.outer(mean, mean)
    found = {"mean": mean.astype(np.float32), "matrix": inverse_root(products / max(1, total - 1))}
    save_file(found, folder / FILE, {"facts": json.dumps({"kind": "zca", "epsilon": EPSILON, "samples": total})})


def inverse_root(covariance: Array) -> Array:
    """float64 [d, d] -> (covariance + EPSILON)^-1/2 as float32, exactly symmetric."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors / np.sqrt(values.clip(0) + EPSILON)) @ vectors.T
    return ((root + root.T) / 2).astype(np.float32)


def _normalised(prepared: PreparedDataset, stored: Array) -> Array:
    """Stored values [n, *shape] -> flat normalised float64 [n, d]."""
    tensors = prepared.kind == "tensors"
    columns = (-1, *(1,) * (len(prepared.shape) - 1 if tensors else 2))
    mean, std = (np.reshape(values, columns) for values in (prepared.mean, prepared.std))
    normal = (stored.astype(np.float64) / (1 if tensors else 255) - mean) / std
    return normal.reshape(len(stored), -1)

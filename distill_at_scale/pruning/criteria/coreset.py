"""Samples of one class in feature space: how near their neighbours are, and in which order greedy selectors pick them.

Features are float32 [n, dimensions], in order of id; equal candidates are taken in that order. What takes n * n numbers is
made in blocks, or kept where it is small. Left out: other distances than Euclid's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 2**22  # numbers of a block of distances: 16 MB
KEPT = 2**26  # numbers of all inner products of a class that are kept: 256 MB, a class of 8192


def neighbour_distances(features: Array, neighbours: int) -> Array:
    """The mean distance of every sample to its nearest neighbours, or to all others where they are fewer; float32 [n].

    0 for a sample that is alone.
    """
    count = min(neighbours, len(features) - 1)
    if count < 1:
        return np.zeros(len(features), np.float32)
    centred, squares = _centred(features)
    rows = max(1, BLOCK // len(features))
    parts = []
    for start in range(0, len(features), rows):
        part = centred[start : start + rows]
        distances = squares - 2 * (part @ centred.T)  # squared, but for the part's own squares
        distances[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
        parts.append(_exact(centred, start, nearest))
    return np.concatenate(parts).astype(np.float32)


def _exact(features: Array, start: int, nearest: Array) -> Array:
    """Mean distances to the neighbours [rows, count], from differences: of near neighbours a product has few right digits."""
    total = np.zeros(len(nearest))
    for column in nearest.T:
        differences = features[start : start + len(nearest)].astype(np.float64) - features[column]
        total += np.sqrt(np.einsum("nd,nd->n", differences, differences))
    return total / nearest.shape[1]


def herding_ranks(features: Array) -> Array:
    """The rank of every sample, float32 [n]: next is the one that takes the mean of the picked nearest to that of all."""
    centred, squares = _centred(features)
    products = _products(centred)
    costs = squares.astype(np.float64)  # |x|^2 + 2 <x, sum of the picked>
    ranks = np.empty(len(features), np.float32)
    for rank in range(len(features)):
        picked = int(costs.argmin())
        ranks[picked] = rank
        costs += 2 * products(picked)
        costs[picked] = np.inf
    return ranks


def k_center_ranks(features: Array) -> Array:
    """The rank of every sample, float32 [n]: first the one nearest the mean, then the farthest from all that are picked."""
    centred, squares = _centred(features)
    products = _products(centred)
    gaps = np.full(len(features), np.inf, np.float32)  # squared, to the nearest of the picked; less than any for those
    ranks = np.empty(len(features), np.float32)
    picked = int(squares.argmin())
    for rank in range(len(features)):
        ranks[picked] = rank
        np.minimum(gaps, np.maximum(squares + squares[picked] - 2 * products(picked), 0), out=gaps)
        gaps[picked] = -1
        picked = int(gaps.argmax())
    return ranks


def _centred(features: Array) -> tuple[Array, Array]:
    """The features less their mean, float32, which spares products their last digits; and the squares of their lengths."""
    centred = (features - features.mean(0, dtype=np.float64)).astype(np.float32)
    return centred, np.einsum("nd,nd->n", centred, centred)


def _products(features: Array) -> Callable[[int], Array]:
    """Inner products of one sample with all [n]."""
    if len(features) ** 2 > KEPT:
        return lambda sample: features @ features[sample]
    kept = features @ features.T
    return lambda sample: kept[sample]

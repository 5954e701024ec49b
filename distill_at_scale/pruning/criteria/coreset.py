"""Criteria that compare the samples of a class in feature space: density, the orders of the selectors herding and k-center, and
the clusters that select.order: clusters draws from.

Features are float32 [n, dimensions] in order of id, distances Euclidean; ties go to the first. Low is useful. Selectors and
clusters concatenate the features of all trials, so there is one result instead of a mean of several.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import Array, MeanOfTrials

HELD_PRODUCTS = 2**26  # inner products of a class that are kept in memory: 256 MB, a class of 8192


@dataclass(eq=False)
class Density(MeanOfTrials):
    """The mean distance to the nearest neighbours of the same class, mean over trials; a sample in a crowd stands for many.

    arXiv 2305.18381 leaves the formula open.
    """

    neighbours: int = 10
    by_trial: ClassVar[bool] = True

    @classmethod
    def of(cls, section: ScoreSection) -> Density:
        return cls(section.neighbours)

    def observe_class(self, features: Array) -> Array:
        trials = range(features.shape[1])
        return np.stack([neighbour_distances(features[:, trial], self.neighbours) for trial in trials], 1)


class Herding(MeanOfTrials):
    """The rank at which greedy mean matching picks a sample (Welling 2009; Rebuffi et al. 2017, arXiv 1611.07725)."""

    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return herding_ranks(features.reshape(len(features), -1))[:, None]


class KCenter(MeanOfTrials):
    """The rank at which the greedy farthest-point rule picks a sample (Sener & Savarese 2018, arXiv 1708.00489)."""

    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return k_center_ranks(features.reshape(len(features), -1))[:, None]


@dataclass(eq=False)
class Clusters(MeanOfTrials):
    """The number of each sample's cluster, from 0, by k-means within the class (Lloyd 1982; Arthur & Vassilvitskii 2007).

    It is no ranking: `select.order: clusters` reads it beside another criterion. A class of fewer samples than clusters has
    one cluster per sample.
    """

    clusters: int = 20
    by_trial: ClassVar[bool] = False

    @classmethod
    def of(cls, section: ScoreSection) -> Clusters:
        return cls(section.clusters)

    def observe_class(self, features: Array) -> Array:
        from sklearn.cluster import KMeans  # takes a second to import
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        centred, _ = _centred(features.reshape(len(features), -1))
        with threadpool_limits(1), warnings.catch_warnings():  # several threads add up in an order that varies
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than clusters
            fitted = KMeans(min(self.clusters, len(centred)), n_init=1, random_state=0).fit(centred)
        return fitted.labels_.astype(np.float32)[:, None]


def neighbour_distances(features: Array, neighbours: int) -> Array:
    """The mean distance to the nearest neighbours, or to all others if they are fewer, float32 [n]; 0 for a single sample."""
    from sklearn.neighbors import NearestNeighbors  # takes a second to import

    count = min(neighbours, len(features) - 1)
    if count < 1:
        return np.zeros(len(features), np.float32)
    centred, _ = _centred(features)
    nearest = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(centred).kneighbors(return_distance=False)
    total = np.zeros(len(features))
    for column in nearest.T:  # from differences: products lose the last digits of small distances
        differences = centred.astype(np.float64) - centred[column]
        total += np.sqrt(np.einsum("nd,nd->n", differences, differences))
    return (total / count).astype(np.float32)


def herding_ranks(features: Array) -> Array:
    """The rank of each sample, float32 [n]: next is the one that moves the mean of the picked nearest to the class mean."""
    centred, squares = _centred(features)
    products = _inner_products(centred)
    costs = squares.astype(np.float64)  # |x|^2 + 2 <x, sum of the picked>
    ranks = np.empty(len(features), np.float32)
    for rank in range(len(features)):
        picked = int(costs.argmin())
        ranks[picked] = rank
        costs += 2 * products(picked)
        costs[picked] = np.inf
    return ranks


def k_center_ranks(features: Array) -> Array:
    """The rank of each sample, float32 [n]: first the one nearest the mean, then the farthest from all picked ones."""
    centred, squares = _centred(features)
    products = _inner_products(centred)
    gaps = np.full(len(features), np.inf, np.float32)  # squared distance to the nearest picked one, -1 for those
    ranks = np.empty(len(features), np.float32)
    picked = int(squares.argmin())
    for rank in range(len(features)):
        ranks[picked] = rank
        np.minimum(gaps, np.maximum(squares + squares[picked] - 2 * products(picked), 0), out=gaps)
        gaps[picked] = -1
        picked = int(gaps.argmax())
    return ranks


def _centred(features: Array) -> tuple[Array, Array]:
    """The features minus their mean, float32, which keeps inner products accurate, and their squared norms."""
    centred = (features - features.mean(0, dtype=np.float64)).astype(np.float32)
    return centred, np.einsum("nd,nd->n", centred, centred)


def _inner_products(features: Array) -> Callable[[int], Array]:
    if len(features) ** 2 > HELD_PRODUCTS:
        return lambda sample: features @ features[sample]
    products = features @ features.T
    return lambda sample: products[sample]

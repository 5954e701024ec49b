"""Local density in a network's features: the mean distance to the nearest neighbours of the same class, mean over trials.

Low, that is dense, is useful: a sample in a crowd stands for many. The formula is open in arXiv 2305.18381 (METHOD.md).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import Array, mean
from distill_at_scale.pruning.criteria.coreset import neighbour_distances


class Density:
    useful: Literal["low", "high"] = "low"
    by_trial = True

    def __init__(self, neighbours: int = 10):
        self.neighbours = neighbours

    @classmethod
    def of(cls, section: ScoreSection) -> Density:
        return cls(section.neighbours)

    def observe_class(self, features: Array) -> Array:
        trials = range(features.shape[1])
        return np.stack([neighbour_distances(features[:, trial], self.neighbours) for trial in trials], 1)

    def aggregate(self, values: Array) -> Array:
        return mean(values)

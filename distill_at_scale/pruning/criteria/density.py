"""Local density in feature space: the mean distance to the nearest neighbours of the same class, mean over trials.

Low (dense) is useful: a sample in a crowd stands for many. arXiv 2305.18381 leaves the formula open.
"""

from __future__ import annotations

import numpy as np

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import Array, MeanOfTrials
from distill_at_scale.pruning.criteria.coreset import neighbour_distances


class Density(MeanOfTrials):
    by_trial = True

    def __init__(self, neighbours: int = 10):
        self.neighbours = neighbours

    @classmethod
    def of(cls, section: ScoreSection) -> Density:
        return cls(section.neighbours)

    def observe_class(self, features: Array) -> Array:
        trials = range(features.shape[1])
        return np.stack([neighbour_distances(features[:, trial], self.neighbours) for trial in trials], 1)

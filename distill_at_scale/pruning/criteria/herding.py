"""Herding (Welling 2009; Rebuffi et al. 2017, arXiv 1611.07725): the rank at which greedy mean matching picks a sample.

Low is useful: the first samples together have the mean of their class. The features of all trials are concatenated, so there
is one order instead of a mean of several.
"""

from __future__ import annotations

from distill_at_scale.pruning.criteria.base import Array, MeanOfTrials
from distill_at_scale.pruning.criteria.coreset import herding_ranks


class Herding(MeanOfTrials):
    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return herding_ranks(features.reshape(len(features), -1))[:, None]

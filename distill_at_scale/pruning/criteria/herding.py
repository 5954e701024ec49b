"""Herding (Welling 2009; Rebuffi et al. 2017, arXiv 1611.07725): the rank at which greedy mean matching picks a sample.

Low is useful: the first samples together have the mean of their class. The features of all trials count side by side, so
that there is one choice and not a mean of several.
"""

from __future__ import annotations

from typing import Literal

from distill_at_scale.pruning.criteria.base import Array, mean
from distill_at_scale.pruning.criteria.coreset import herding_ranks


class Herding:
    useful: Literal["low", "high"] = "low"
    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return herding_ranks(features.reshape(len(features), -1))[:, None]

    def aggregate(self, values: Array) -> Array:
        return mean(values)

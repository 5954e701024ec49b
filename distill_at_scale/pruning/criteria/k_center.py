"""k-center (Sener & Savarese 2018, arXiv 1708.00489): the rank at which the greedy farthest-point rule picks a sample.

Low is useful: the first samples together cover their class. The first is the one nearest the mean of the class; the
features of all trials count side by side.
"""

from __future__ import annotations

from typing import Literal

from distill_at_scale.pruning.criteria.base import Array, mean
from distill_at_scale.pruning.criteria.coreset import k_center_ranks


class KCenter:
    useful: Literal["low", "high"] = "low"
    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return k_center_ranks(features.reshape(len(features), -1))[:, None]

    def aggregate(self, values: Array) -> Array:
        return mean(values)

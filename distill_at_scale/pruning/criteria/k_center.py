"""k-center (Sener & Savarese 2018, arXiv 1708.00489): the rank at which the greedy farthest-point rule picks a sample.

Low is useful: the first samples together cover their class. The first one is nearest the mean of the class; the features of
all trials are concatenated.
"""

from __future__ import annotations

from distill_at_scale.pruning.criteria.base import Array, MeanOfTrials
from distill_at_scale.pruning.criteria.coreset import k_center_ranks


class KCenter(MeanOfTrials):
    by_trial = False

    def observe_class(self, features: Array) -> Array:
        return k_center_ranks(features.reshape(len(features), -1))[:, None]

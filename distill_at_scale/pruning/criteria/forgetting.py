"""Forgetting events: how often a sample goes from right to wrong over the epochs (Toneva et al. 2019, arXiv 1812.05159),
mean over trials.

Low is useful: what is learnt once and kept is typical. A sample that a trial never gets right counts as more than any that
it forgets: as many times as there are epochs. Its authors, who train on what is left, drop the low end.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria.base import Array, ProxyOutputs, mean


class Forgetting:
    useful: Literal["low", "high"] = "low"

    @classmethod
    def of(cls, section: ScoreSection) -> Forgetting:
        if section.weights is not None:
            raise UserError(
                "score.criterion = 'forgetting' follows networks over their epochs, which ready-made weights have not; "
                "take score.weights out, or another criterion"
            )
        if section.epochs < 2:
            raise UserError("score.criterion = 'forgetting' needs more than one epoch; raise score.epochs")
        return cls()

    def observe(self, seen: ProxyOutputs) -> Tensor:
        """1 where the sample is classified right, else 0."""
        return (seen.logits.argmax(1) == seen.labels).float()

    def aggregate(self, values: Array) -> Array:
        forgotten = (values[:, :, :-1] > values[:, :, 1:]).sum(2, keepdims=True)
        never = values.max(2, keepdims=True) == 0
        return mean(np.where(never, values.shape[2], forgotten))

"""Mean cross-entropy over trials and epochs (arXiv 2305.18381, "LossInit" and "LossConverge"): over all epochs, the first or
the last ones.

Low is useful: a sample that networks learn easily is typical of its class, and few images can hold only what is typical.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import Array, ProxyOutputs, mean


class Loss:
    """Over all epochs."""

    useful: Literal["low", "high"] = "low"

    def observe(self, seen: ProxyOutputs) -> Tensor:
        return F.cross_entropy(seen.logits, seen.labels, reduction="none")

    def aggregate(self, values: Array) -> Array:
        return mean(values)


class EarlyLoss(Loss):
    """Over the first epochs, in which networks have barely begun to learn."""

    def __init__(self, early: int = 5):
        self.early = early

    @classmethod
    def of(cls, section: ScoreSection) -> EarlyLoss:
        return cls(section.early)

    def epochs(self, count: int) -> range:
        return range(min(self.early, count))


class ConvergedLoss(Loss):
    """Over the last epochs: what networks still get wrong when they have learnt the rest."""

    def __init__(self, late: int = 5):
        self.late = late

    @classmethod
    def of(cls, section: ScoreSection) -> ConvergedLoss:
        return cls(section.late)

    def epochs(self, count: int) -> range:
        return range(max(0, count - self.late), count)

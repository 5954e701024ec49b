"""Mean cross-entropy over trials and epochs (arXiv 2305.18381): over all epochs, the first ("LossInit") or the last ones
("LossConverge").

Low is useful: a sample that networks learn easily is typical of its class, and few images can hold only what is typical.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import MeanOfTrials, ProxyOutputs


class Loss(MeanOfTrials):
    """Over all epochs."""

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return F.cross_entropy(outputs.logits, outputs.labels, reduction="none")


class EarlyLoss(Loss):
    """Over the first epochs, when networks have barely begun to learn."""

    def __init__(self, early: int = 5):
        self.early = early

    @classmethod
    def of(cls, section: ScoreSection) -> EarlyLoss:
        return cls(section.early)

    def epochs(self, count: int) -> range:
        return range(min(self.early, count))


class ConvergedLoss(Loss):
    """Over the last epochs: what networks still get wrong after learning the rest."""

    def __init__(self, late: int = 5):
        self.late = late

    @classmethod
    def of(cls, section: ScoreSection) -> ConvergedLoss:
        return cls(section.late)

    def epochs(self, count: int) -> range:
        return range(max(0, count - self.late), count)

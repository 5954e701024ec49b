"""Mean cross-entropy over trials and epochs (arXiv 2305.18381): over all epochs, the first ("LossInit") or the last ones
("LossConverge").

Low is useful: a sample that networks learn easily is typical of its class, and few images can hold only what is typical.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.pruning.criteria.base import MeanOfTrials, ProxyOutputs


class Loss(MeanOfTrials):
    """Over all epochs."""

    least_classes = 2

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return F.cross_entropy(outputs.logits, outputs.labels, reduction="none")


@dataclass(eq=False)
class EarlyLoss(Loss):
    """Over the first epochs, when networks have barely begun to learn."""

    early: int = 5

    @classmethod
    def of(cls, section: ScoreSection) -> EarlyLoss:
        return cls(section.early)

    def epochs(self, count: int) -> range:
        return range(min(self.early, count))


@dataclass(eq=False)
class ConvergedLoss(Loss):
    """Over the last epochs: what networks still get wrong after learning the rest."""

    late: int = 5

    @classmethod
    def of(cls, section: ScoreSection) -> ConvergedLoss:
        return cls(section.late)

    def epochs(self, count: int) -> range:
        return range(max(0, count - self.late), count)

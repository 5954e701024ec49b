"""Forgetting events: how often a sample changes from right to wrong over the epochs (Toneva et al. 2019, arXiv 1812.05159),
mean over trials.

Low is useful: a sample that is learned once and kept is typical. A sample that a trial never classifies correctly counts as
many events as there are epochs, more than any other. The authors, who train on the kept samples, drop the low end.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria.base import Array, MeanOfTrials, ProxyOutputs


class Forgetting(MeanOfTrials):
    least_classes = 2

    @classmethod
    def of(cls, section: ScoreSection) -> Forgetting:
        if section.weights is not None:
            raise UserError(
                "score.criterion = 'forgetting' compares epochs, which pretrained weights do not have; remove score.weights or "
                "use another criterion"
            )
        if section.checkpoint_counts[1] < 2:
            raise UserError("score.criterion = 'forgetting' needs two checkpoints or more; raise score.epochs")
        return cls()

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        """1 if the sample is classified correctly, else 0."""
        return (outputs.logits.argmax(1) == outputs.labels).float()

    def aggregate(self, values: Array) -> Array:
        forgotten = (values[:, :, :-1] > values[:, :, 1:]).sum(2, keepdims=True)
        return super().aggregate(np.where(values.max(2, keepdims=True) == 0, values.shape[2], forgotten))

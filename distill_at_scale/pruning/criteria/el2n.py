"""EL2N, the length of the error vector |p - y| (Paul et al. 2021, arXiv 2107.07075), mean over trials and the first epochs.

Low is useful: few images can hold only what is typical. Its authors, who train on what is left, keep the other end.
"""

from __future__ import annotations

from torch import Tensor

from distill_at_scale.pruning.criteria.base import ProxyOutputs
from distill_at_scale.pruning.criteria.loss import EarlyLoss


class EL2N(EarlyLoss):
    """0..sqrt(2)."""

    def observe(self, seen: ProxyOutputs) -> Tensor:
        return errors(seen).norm(dim=1)


def errors(seen: ProxyOutputs) -> Tensor:
    """p - y, the gradient of the cross-entropy in the logits [n, classes]."""
    chances = seen.logits.softmax(1)
    return chances.scatter_add(1, seen.labels[:, None], chances.new_full((len(chances), 1), -1))

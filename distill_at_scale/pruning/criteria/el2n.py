"""EL2N, the norm of the error vector |p - y| (Paul et al. 2021, arXiv 2107.07075), mean over trials and the first epochs.

Low is useful: few images can hold only what is typical. Its authors, who train on the kept samples, keep the other end.
"""

from __future__ import annotations

from torch import Tensor

from distill_at_scale.pruning.criteria.base import ProxyOutputs
from distill_at_scale.pruning.criteria.loss import EarlyLoss


class EL2N(EarlyLoss):
    """0..sqrt(2)."""

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return errors(outputs).norm(dim=1)


def errors(outputs: ProxyOutputs) -> Tensor:
    """p - y [n, classes], the gradient of the cross-entropy with respect to the logits."""
    probabilities = outputs.logits.softmax(1)
    return probabilities.scatter_add(1, outputs.labels[:, None], probabilities.new_full((len(probabilities), 1), -1))

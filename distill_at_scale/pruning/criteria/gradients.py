"""EL2N and GraNd (Paul et al. 2021, arXiv 2107.07075): norms of errors and gradients, mean over trials and the first epochs
(`el2n_late`: the last epochs).

`grand_last` uses the last layer (weights and bias): its gradient is the outer product of p - y and the features (f, 1), so
the norm costs nothing extra. `grand` uses all weights and costs a backward pass per sample. Low is useful: few images can
hold only what is typical. The authors, who train on the kept samples, keep the other end.
"""

from __future__ import annotations

from torch import Tensor

from distill_at_scale.pruning.criteria.base import ProxyOutputs
from distill_at_scale.pruning.criteria.loss import ConvergedLoss, EarlyLoss


class EL2N(EarlyLoss):
    """The norm of the error |p - y|, 0..sqrt(2)."""

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return _errors(outputs).norm(dim=1)


class LateEL2N(ConvergedLoss):
    """The same over the last epochs."""

    observe = EL2N.observe


class LastLayerGraNd(EarlyLoss):
    sees_features = True

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return _errors(outputs).norm(dim=1) * (outputs.features.square().sum(1) + 1).sqrt()


class GraNd(EarlyLoss):
    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return outputs.gradient_norms


def _errors(outputs: ProxyOutputs) -> Tensor:
    """p - y [n, classes], the gradient of the cross-entropy with respect to the logits."""
    probabilities = outputs.logits.softmax(1)
    return probabilities.scatter_add(1, outputs.labels[:, None], probabilities.new_full((len(probabilities), 1), -1))

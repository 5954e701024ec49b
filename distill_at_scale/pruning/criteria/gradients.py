"""GraNd, the norm of a sample's loss gradient (Paul et al. 2021, arXiv 2107.07075), mean over trials and the first epochs.

`grand_last` looks at the last layer alone, weights and bias, where the gradient is the outer product of p - y and the
features (f, 1), so that its norm costs nothing; `grand` looks at all weights, at the cost of a backward pass per sample.
Low is useful, as of EL2N.
"""

from __future__ import annotations

from torch import Tensor

from distill_at_scale.pruning.criteria.base import ProxyOutputs
from distill_at_scale.pruning.criteria.el2n import errors
from distill_at_scale.pruning.criteria.loss import EarlyLoss


class LastLayerGraNd(EarlyLoss):
    sees_features = True

    def observe(self, seen: ProxyOutputs) -> Tensor:
        return errors(seen).norm(dim=1) * (seen.features.square().sum(1) + 1).sqrt()


class GraNd(EarlyLoss):
    def observe(self, seen: ProxyOutputs) -> Tensor:
        return seen.gradient_norms

"""GraNd, the norm of a sample's loss gradient (Paul et al. 2021, arXiv 2107.07075), mean over trials and the first epochs.

`grand_last` uses the last layer (weights and bias): its gradient is the outer product of p - y and the features (f, 1), so
the norm costs nothing extra. `grand` uses all weights and costs a backward pass per sample. Low is useful, as for EL2N.
"""

from __future__ import annotations

from torch import Tensor

from distill_at_scale.pruning.criteria.base import ProxyOutputs
from distill_at_scale.pruning.criteria.el2n import errors
from distill_at_scale.pruning.criteria.loss import EarlyLoss


class LastLayerGraNd(EarlyLoss):
    sees_features = True

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return errors(outputs).norm(dim=1) * (outputs.features.square().sum(1) + 1).sqrt()


class GraNd(EarlyLoss):
    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return outputs.gradient_norms

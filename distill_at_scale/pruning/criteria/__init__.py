"""Criteria that score samples from proxies, by the name in `score.criterion`.

`useful` is the end that suits distillation to few images: arXiv 2305.18381 keeps the easy, typical samples. Those who prune
in order to train on the kept samples often keep the other end: `select.order: useless`.
"""

from distill_at_scale.pruning.criteria.compute_aware import ComputeAwareDifficulty
from distill_at_scale.pruning.criteria.confidence import AreaUnderMargin, Entropy, Margin
from distill_at_scale.pruning.criteria.coreset import Clusters, Density, Herding, KCenter
from distill_at_scale.pruning.criteria.forgetting import Forgetting
from distill_at_scale.pruning.criteria.gradients import EL2N, GraNd, LastLayerGraNd, LateEL2N
from distill_at_scale.pruning.criteria.loss import ConvergedLoss, EarlyLoss, Loss

CRITERIA = {
    "loss": Loss,
    "loss_early": EarlyLoss,
    "loss_converged": ConvergedLoss,
    "margin": Margin,
    "aum": AreaUnderMargin,
    "entropy": Entropy,
    "el2n": EL2N,
    "el2n_late": LateEL2N,
    "cad": ComputeAwareDifficulty,
    "grand_last": LastLayerGraNd,
    "grand": GraNd,
    "forgetting": Forgetting,
    "density": Density,
    "herding": Herding,
    "k_center": KCenter,
    "clusters": Clusters,
}

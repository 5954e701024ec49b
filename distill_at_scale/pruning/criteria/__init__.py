"""Criteria that score samples from proxies, by the name in `score.criterion`.

`useful` is the end that suits distillation to few images: arXiv 2305.18381 keeps the easy, typical samples. Those who prune
in order to train on the kept samples often keep the other end: `select.order: useless`.
"""

from distill_at_scale.pruning.criteria.confidence import Entropy, Margin
from distill_at_scale.pruning.criteria.coreset import Density, Herding, KCenter
from distill_at_scale.pruning.criteria.forgetting import Forgetting
from distill_at_scale.pruning.criteria.gradients import EL2N, GraNd, LastLayerGraNd
from distill_at_scale.pruning.criteria.loss import ConvergedLoss, EarlyLoss, Loss

CRITERIA = {
    "loss": Loss,
    "loss_early": EarlyLoss,
    "loss_converged": ConvergedLoss,
    "margin": Margin,
    "entropy": Entropy,
    "el2n": EL2N,
    "grand_last": LastLayerGraNd,
    "grand": GraNd,
    "forgetting": Forgetting,
    "density": Density,
    "herding": Herding,
    "k_center": KCenter,
}

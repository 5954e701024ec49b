"""InfoBatch: a rule for training on real data that leaves out easy samples at random (Qin et al. 2024, arXiv 2303.04947).

In each epoch, samples whose last known loss is below the mean are dropped with probability r; the losses of those of them
that stay count 1 / (1 - r) times. So the expectation of the sum of gradients over an epoch stays that of all samples. The rule
is off in the last epochs, a share of 1 - SHARE of all, so that training ends on the whole data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.core.collectives import Collectives

SHARE = 0.875  # of the epochs, from the first one on, in which samples may be dropped (the paper's delta)
EASY = 0.7  # of the samples are below the mean loss: `expected_share` assumes what was measured on the digits


def expected_share(drop: float, epochs: int) -> float:
    """The share of all samples of all epochs that a training is expected to pass, 0..1; `drop` is r."""
    return 1 - EASY * drop * max(0, int(SHARE * epochs) - 1) / epochs  # no loss is known in the first epoch


class InfoBatch:
    """The rule of one training. With `drop` 0 it is off: it draws nothing, remembers nothing and changes no number.

    Attributes:
        losses: the last known loss of each sample, float32 [samples], infinite if unknown; part of the training's state.
    """

    def __init__(self, drop: float, samples: int, epochs: int, seed: int, device: torch.device):
        """`drop` is r; `seed` decides, with the epoch, which samples are dropped. Losses are remembered on `device`."""
        self.drop, self.seed, self.epochs = drop, seed, int(SHARE * epochs)
        self.losses = torch.full((samples,), torch.inf, device=device)
        self.weights = torch.ones_like(self.losses)

    def start(self, epoch: int) -> Tensor:
        """Begin an epoch; True for the samples that are trained on, bool [samples], on the CPU."""
        losses, kept = self.losses.cpu(), torch.ones(len(self.losses), dtype=torch.bool)
        self.weights, known = torch.ones_like(self.losses), torch.isfinite(losses)
        if self.drop and epoch < self.epochs and known.any():
            easy = losses < losses[known].mean()
            kept = ~easy | (
                torch.rand(len(losses), generator=rng.generator(self.seed, "infobatch", epoch)) >= self.drop
            )
            self.weights[easy] = 1 / (1 - self.drop)
        return kept

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, rows: Tensor, reduction: str = "mean", remember: bool = True
    ) -> Tensor:
        """The rescaled loss of the samples `rows` [n], as a mean or sum over them; their own losses are remembered."""
        if not self.drop:
            return F.cross_entropy(logits, labels, reduction=reduction)
        losses, rows = F.cross_entropy(logits, labels, reduction="none"), rows.to(self.losses.device)
        if remember:
            self.losses[rows] = losses.detach().float()
        total = (losses * self.weights[rows]).sum()
        return total / len(losses) if reduction == "mean" else total

    def share(self, known: Tensor, workers: Collectives) -> None:
        """Give all workers all losses, after each trained on its own samples; before, all had `known`, float32 [samples]."""
        if self.drop and workers.size > 1:
            changed = self.losses != known
            counted = [self.losses.where(changed, torch.zeros_like(known)), changed.float()]
            workers.all_reduce_sum(counted)
            self.losses = counted[0].where(counted[1] > 0, known)

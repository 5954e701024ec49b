"""Margin of the class probabilities or of the logits, and entropy: mean over trials and epochs.

A large margin and a low entropy are useful: far from the other classes, a sample is typical of its own. Active learning
(Settles 2009), which looks for labels worth buying, keeps the other end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill_at_scale.pruning.criteria.base import MeanOfTrials, ProxyOutputs


class Margin(MeanOfTrials):
    """The probability of the true class minus the largest of the others, -1..1."""

    useful: Literal["low", "high"] = "high"
    least_classes = 2

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        probabilities, own = outputs.logits.softmax(1), outputs.labels[:, None]
        return probabilities.gather(1, own)[:, 0] - probabilities.scatter(1, own, 0).amax(1)


class AreaUnderMargin(MeanOfTrials):
    """The logit of the true class minus the largest of the others (Pleiss et al. 2020, arXiv 2001.10528, equation 1).

    The authors look for wrong labels, whose area is small.
    """

    useful: Literal["low", "high"] = "high"
    least_classes = 2

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        logits, own = outputs.logits, outputs.labels[:, None]
        return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)


class Entropy(MeanOfTrials):
    """In nats, 0..ln(classes); independent of the label."""

    least_classes = 2

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        return torch.special.entr(outputs.logits.softmax(1)).sum(1)

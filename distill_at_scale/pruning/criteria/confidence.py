"""How sure a network is: margin and entropy of its class probabilities, mean over trials and epochs.

A large margin and a low entropy are useful: far from the other classes a sample is typical of its own. Active learning
(Settles 2009), which looks for labels worth buying, takes the other end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill_at_scale.pruning.criteria.base import Array, ProxyOutputs, mean


class Margin:
    """The probability of the true class less the largest of the others, -1..1."""

    useful: Literal["low", "high"] = "high"

    def observe(self, seen: ProxyOutputs) -> Tensor:
        chances, own = seen.logits.softmax(1), seen.labels[:, None]
        return chances.gather(1, own)[:, 0] - chances.scatter(1, own, 0).amax(1)

    def aggregate(self, values: Array) -> Array:
        return mean(values)


class Entropy:
    """In nats, 0..ln(classes); it does not look at the label."""

    useful: Literal["low", "high"] = "low"

    def observe(self, seen: ProxyOutputs) -> Tensor:
        return torch.special.entr(seen.logits.softmax(1)).sum(1)

    def aggregate(self, values: Array) -> Array:
        return mean(values)

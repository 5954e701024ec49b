"""Networks for samples of any shape: a perceptron with two hidden layers (or `depth`), which looks at no neighbourhood.

Fit for signals, tables and feature vectors; layer norm keeps it trainable by the protocols that were made for ConvNets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """float32 [n, *shape] -> logits [n, classes]."""

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None):
        super().__init__()
        sizes = [math.prod(shape), *[width] * (depth or 2)]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def embed(self, images: Tensor) -> Tensor:
        """Features [n, width]."""
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))

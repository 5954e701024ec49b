"""Networks for samples of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from distill_at_scale.models.image import EmbeddingNetwork


class MLP(EmbeddingNetwork):
    """A perceptron with two hidden layers (or `depth`), for signals, tables and feature vectors.

    Layer norm keeps it trainable by the protocols of ConvNets.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128, depth: int | None = None):
        super().__init__()
        sizes = [math.prod(shape), *[width] * (depth or 2)]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(width, classes)

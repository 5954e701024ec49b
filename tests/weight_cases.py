"""A small network, and how the tests of pretrained weights load and compare them."""

from __future__ import annotations

import torch

from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec

CLASSES = ["cat", "dog", "owl"]
SPEC = NetworkSpec("convnet", (3, 8, 8), 3, width=4)


def load(path, spec=SPEC, classes=CLASSES, source=None):
    return pretrained.load(str(path), spec, classes, classes if source is None else source)


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)

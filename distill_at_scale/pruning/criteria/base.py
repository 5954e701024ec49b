"""The contract of criteria that are computed from proxy checkpoints: of samples one by one, or of a class as a whole.

A criterion is made without arguments, or by its classmethod `of(section)` from the `score` section where it has one (which
raises UserError where the section does not fit it). `epochs(count)` names the epochs that it needs of `count` trained ones,
counted from 0; a criterion without it needs all of them. A criterion that sets `sees_features = True` spares a second pass
for them. Left out: how what is seen is made (`pruning/scoring/classifier.py`, `pruning/scoring/gradient_norms.py`).
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class ProxyOutputs(Protocol):
    """Some samples under one checkpoint; all but the labels is made when it is first asked for, once for all criteria."""

    @property
    def labels(self) -> Tensor:
        """int64 [n]."""

    @property
    def logits(self) -> Tensor:
        """float32 [n, classes]."""

    @property
    def features(self) -> Tensor:
        """What the last layer sees, float32 [n, features]. Raises UserError for a network without such features."""

    @property
    def gradient_norms(self) -> Tensor:
        """Euclidean norm of the gradient of each sample's cross-entropy in all weights, float32 [n]; dear."""


class Criterion(Protocol):
    """Of each sample alone."""

    useful: Literal["low", "high"]  # which end of the scale marks a useful sample

    def observe(self, seen: ProxyOutputs) -> Tensor:
        """Under one checkpoint: one value per sample [n]."""

    def aggregate(self, values: Array) -> Array:
        """Over all checkpoints that it needs: float32 [n, trials, epochs] -> the score float32 [n]."""


class ClassCriterion(Protocol):
    """Of a sample among all of its class, by the features under the last epoch."""

    useful: Literal["low", "high"]
    by_trial: bool  # whether there is a value per trial (which is published too), or one for all trials together

    def observe_class(self, features: Array) -> Array:
        """float32 [n, trials, features] of a class, in order of id -> float32 [n, trials] if `by_trial`, else [n, 1]."""

    def aggregate(self, values: Array) -> Array:
        """float32 [n, trials or 1, 1] -> the score float32 [n]."""


def mean(values: Array) -> Array:
    """Over trials and epochs, in double precision: float32 [n, trials, epochs] -> float32 [n]."""
    return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64).astype(np.float32)

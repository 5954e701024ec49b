"""The contract of a criterion over proxy checkpoints: `Criterion` scores samples one by one, `ClassCriterion` whole classes.

A criterion is constructed without arguments, or by its classmethod `of(section)` from the `score` section, which raises
UserError if the section does not fit. `epochs(count)` lists the epochs that it needs of `count`, from 0; without it, all are
needed. An epoch here is a checkpoint of a proxy: `score.checkpoints_per_epoch` of them per epoch of training.
`sees_features = True` announces that `observe` uses the features, which saves a second forward pass. `least_classes = 2` has
data of one class refused before training, where such logits give each sample the same value, or none.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class ProxyOutputs(Protocol):
    """Some samples under one checkpoint. Everything except the labels is computed when first used, once for all criteria."""

    @property
    def labels(self) -> Tensor:
        """int64 [n]."""

    @property
    def logits(self) -> Tensor:
        """float32 [n, classes]."""

    @property
    def features(self) -> Tensor:
        """The input of the last layer, float32 [n, features]. Raises UserError for a network without such features."""

    @property
    def gradient_norms(self) -> Tensor:
        """Norm of the gradient of each sample's cross-entropy with respect to all weights, float32 [n]; expensive."""


class Criterion(Protocol):
    """Scores each sample on its own."""

    useful: Literal["low", "high"]  # which end of the scale marks a useful sample

    def observe(self, outputs: ProxyOutputs) -> Tensor:
        """One value per sample [n] under one checkpoint."""

    def aggregate(self, values: Array) -> Array:
        """Values of all checkpoints that it needs, float32 [n, trials, epochs] -> scores float32 [n]."""


class ClassCriterion(Protocol):
    """Scores each sample relative to its class, by the features of the last epoch."""

    useful: Literal["low", "high"]
    by_trial: bool  # one value per trial (which are published too), or one for all trials together

    def observe_class(self, features: Array) -> Array:
        """float32 [n, trials, features] of a class, in order of id -> float32 [n, trials] if `by_trial`, else [n, 1]."""

    def aggregate(self, values: Array) -> Array:
        """float32 [n, trials or 1, 1] -> scores float32 [n]."""


class MeanOfTrials:
    """Base of criteria whose score is the mean over trials and epochs, in double precision; low is useful."""

    useful: Literal["low", "high"] = "low"

    def aggregate(self, values: Array) -> Array:
        return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64).astype(np.float32)

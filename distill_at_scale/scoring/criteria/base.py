"""The contract of a criterion that is computed from proxy checkpoints."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor


class Criterion(Protocol):
    useful: Literal["low", "high"]  # which end of the scale marks a useful sample

    def observe(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Under one checkpoint: logits float32 [n, classes], labels int64 [n] -> one value per sample [n]."""

    def aggregate(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Over all checkpoints: float32 [n, trials, epochs] -> the score float32 [n]."""

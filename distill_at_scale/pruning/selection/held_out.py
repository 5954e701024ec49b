"""The part of each class of the training split that selection never keeps, so that a set can be tested on it.

The draw depends only on the seed, the label and the size of the class: all selections of a run hold out the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_at_scale.core import rng

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HeldOut:
    """A share of each class, of which at least `least` samples stay."""

    share: float = 0.0
    least: int = 1
    seed: int = 0

    def number(self, count: int) -> int:
        """How many of a class of `count` samples are held out."""
        return max(0, min(int(np.floor(self.share * count + 0.5)), count - self.least))

    def mask(self, label: int, count: int) -> Array:
        """Which samples of a class are held out, bool [count], by their position in the score table."""
        number = self.number(count)
        if not number:
            return np.zeros(count, bool)
        held: Array = rng.numpy_generator(self.seed, "held out", label).permutation(count) < number
        return held

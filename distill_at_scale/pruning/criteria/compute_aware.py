"""Compute-aware difficulty, CAD (arXiv 2604.18811): how much a sample's error still changes at the end of a small budget.

The proxies train on everything for K = 300 * ipc * classes / samples epochs, as a student is trained on `ipc` images per
class. S_k is EL2N after checkpoint k, and U_k the unbiased standard deviation of S_k .. S_(k+J-1). The score is the mean of
U_k over the W windows k = K-J-W .. K-J-1, mean over trials. High is useful: such a sample can just be learned within the
budget, while the others are learned long before, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria.base import Array
from distill_at_scale.pruning.criteria.gradients import EL2N


@dataclass(eq=False)
class ComputeAwareDifficulty(EL2N):
    """K counts the checkpoints of a proxy, from 0. As in the paper, no window holds the last one."""

    useful: Literal["low", "high"] = "high"
    windows: int = 2  # W
    length: int = 3  # J

    @classmethod
    def of(cls, section: ScoreSection) -> ComputeAwareDifficulty:
        if section.weights is not None:
            raise UserError(
                "score.criterion = 'cad' compares checkpoints of a training, which pretrained weights do not have; remove "
                "score.weights or use another criterion"
            )
        count, windows = section.checkpoint_counts[1], section.cad_windows
        length, least = section.cad_length or count - windows, windows + (section.cad_length or 2)
        if count < least:
            raise UserError(
                f"score.criterion = 'cad' needs {least} checkpoints or more per proxy (windows: score.cad_windows = {windows}; "
                f"checkpoints in a window: score.cad_length, at least 2); score.epochs and score.checkpoints_per_epoch make "
                f"{count}; raise score.checkpoints_per_epoch"
            )
        return cls(windows=windows, length=length)

    def epochs(self, count: int) -> range:
        return range(count - self.length - self.windows, count - 1)

    def aggregate(self, values: Array) -> Array:
        windows = np.lib.stride_tricks.sliding_window_view(values, self.length, axis=2)
        return super().aggregate(windows.std(axis=3, ddof=1, dtype=np.float64))

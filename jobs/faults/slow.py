"""Slow plug-ins, which keep a stage busy long enough on small data to be struck in the middle."""

from __future__ import annotations

import time

from distill_at_scale.data.sources.image.digits import Digits
from distill_at_scale.pruning.criteria.loss import Loss

READ, OBSERVATION = 0.15, 0.02  # seconds


class SlowDigits(Digits):
    """The digits on slow storage: every chunk takes a while to read."""

    def read(self, rows):
        time.sleep(READ)
        return super().read(rows)


class SlowLoss(Loss):
    """The loss of a large network: every batch takes a while."""

    def observe(self, seen):
        time.sleep(OBSERVATION)
        return super().observe(seen)

"""Plug-ins that misbehave on purpose, for tests of fault tolerance: most kill their process once."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from distill_at_scale.data.sources.image.digits import Digits
from distill_at_scale.distillation.methods.dm import DM
from distill_at_scale.distillation.methods.mtt import MTT
from distill_at_scale.distillation.methods.shared.experts import ExpertTraining, expert_name
from distill_at_scale.pruning.criteria.loss import Loss

ARMED = Path(tempfile.gettempdir()) / f"distill-at-scale-kill-a-scorer-{os.getuid()}"  # the next one to score dies
SLOW = ARMED.with_name(ARMED.name + "-slowly")  # while it is there, every observation takes a while


class KillingSource(Digits):
    """Kills the process that reads row 700, once per data.path."""

    def __init__(self, config):
        super().__init__(config)
        self.marker = Path(config.path)

    def read(self, rows):
        if 700 in rows["row"].to_pylist() and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return super().read(rows)


class DeadlySource(Digits):
    """Kills each process that reads row 700."""

    def read(self, rows):
        if 700 in rows["row"].to_pylist():
            os._exit(1)
        return super().read(rows)


class KillingBackend(DM):
    """DM whose worker dies in step 6, once; distill.options.marker names the file that remembers it."""

    def step(self, i):
        marker = Path(self.context.config.distill.options["marker"])
        if i == 6 and self.context.workers.rank == self.context.workers.size - 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        return super().step(i)


class WaitingBackend(DM):
    """DM that waits, in each step of distill.options.waits, until there is another number of workers than given there."""

    def step(self, i):
        while [i, self.context.workers.size] in self.context.config.distill.options["waits"]:
            time.sleep(0.1)
        return super().step(i)


class DyingExpert(ExpertTraining):
    def _epoch(self, epoch):
        if epoch == 1:
            os._exit(1)
        super()._epoch(epoch)


class KillingExperts(MTT):
    """MTT of whose second expert the process dies in epoch 1, once; distill.options.marker remembers it."""

    @classmethod
    def make_network(cls, name, context, real):
        marker = Path(context.config.distill.options["marker"])
        if name == expert_name(1) and not marker.exists():
            marker.touch()
            DyingExpert(1, context, cls.section(context.config), real).run(context.networks / name)
        super().make_network(name, context, real)


class KillingLoss(Loss):
    """The loss, whose process dies at its fifth observation while ARMED is there, which it removes."""

    def __init__(self):
        self.observed = 0

    def observe(self, seen):
        self.observed += 1
        if SLOW.exists():
            time.sleep(0.2)
        if self.observed == 5 and ARMED.exists():
            ARMED.unlink()
            os._exit(1)
        return super().observe(seen)

"""Long work for tests of helper processes; helpers import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence

import torch

from distill_at_scale.core.errors import UserError
from distill_at_scale.pipeline.executors.base import Result, Unit, Worker


class Unreadable:
    """Raises ValueError when it is unpickled."""

    def __reduce__(self):
        return int, ("no number",)


class Helped(Worker):
    """Long units; `work` is (number, what happens to the unit in a helper). With a fate, the driver waits for a helper."""

    name, event = "long work", "work"
    long = True

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        started = self.paths["started"]
        for unit in units:
            number, fate = unit.work
            if os.getpid() != int(self.paths["driver"].name):
                started.touch()
                if fate == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fate == "unreadable":
                    yield {"answer": Unreadable()}
                    continue
                if fate == "error":
                    raise UserError(f"unit {number} cannot be done")
            until = time.monotonic() + 60
            while fate and not started.exists() and time.monotonic() < until:
                time.sleep(0.05)
                self.poll()
            time.sleep(0.1)
            yield {"number": number, "pid": os.getpid(), "threads": torch.get_num_threads()}

"""How the executors spread work over a machine: what `plan` counts with. A running cluster is assumed to have such machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import Machine
from distill_at_scale.pipeline.executors.local import local_cores, threads_each


class Spread(NamedTuple):
    """Units of work side by side, and CPU threads per unit."""

    side: int
    threads: int


@dataclass(frozen=True)
class Layout:
    """How the executor of a configuration spreads its work over machines like this one."""

    config: Config
    machine: Machine
    others: float = 0.0  # cores that other programs use

    @property
    def local(self) -> bool:
        """Everything in one process, without Ray."""
        return self.config.cluster.address == "none"

    @property
    def remote(self) -> bool:
        """On a running cluster, whose size is not known here."""
        return self.config.cluster.address not in (None, "none")

    @property
    def device(self) -> torch.device:
        used = self.machine.gpus > 0 and (self.local or self.config.cluster.gpus_per_worker > 0)
        return torch.device("cuda" if used else "cpu")

    def places(self, gpu: bool = True) -> int:
        """Processes of Ray side by side, at most."""
        on_gpus = gpu and self.device.type == "cuda"
        return max(1, int(self.machine.gpus / self.config.cluster.gpus_per_worker)) if on_gpus else self.machine.cores

    def actors(self, gpu: bool = True) -> Spread:
        """Short units (ingest, score)."""
        return Spread(1 if self.local else self.config.cluster.actors or self.places(gpu), 1)

    def tasks(self, count: int) -> Spread:
        """Long units (proxies, experts, evaluations), which share the cores; without Ray those that are free."""
        if self.local:
            cores = min(local_cores(), self.machine.cores)
            each = threads_each(count, cores) if self.device.type == "cpu" else cores
            return Spread(max(1, min(count, int((cores - self.others + 0.3) / each))), each)
        side = max(1, min(count, self.places()))
        return Spread(side, max(1, self.machine.cores // side))

    def group(self, least: int, most: int) -> Spread:
        """Processes that work together (a distillation, one proxy), as many as fit; elastic ones have one thread."""
        if self.local:
            return Spread(1, local_cores())
        if self.remote or least == most:
            return Spread(most, max(1, self.machine.cores // most))
        places = self.places() if self.config.cluster.gpus_per_worker else self.machine.cores
        return Spread(max(least, min(most, places)), 1)

"""The machine that a plan is made on, and how the stages spread their work over it.

A plan for a running cluster (cluster.address) assumes machines like this one. Not covered: the network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import busy_seconds, usable_cores
from distill_at_scale.pipeline.executors.local import threads_each


@dataclass(frozen=True)
class Machine:
    cores: int
    memory: int  # bytes in total
    gpus: int
    gpu_memory: int  # bytes of one GPU
    disk: int  # free bytes on the run folder's disk


def here(folder: Path) -> Machine:
    """This machine; `folder` exists and lies on the run folder's disk."""
    gpus = torch.cuda.device_count()
    gpu_memory = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return Machine(usable_cores(), memory, gpus, gpu_memory, shutil.disk_usage(folder).free)


class Load:
    """Cores that other programs use, from the creation to a look."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), busy_seconds(), sum(os.times()[:4])

    @property
    def others(self) -> float:
        """0 where it is unknown; the processes of this one count when they have ended."""
        seconds, busy = time.monotonic() - self.began, busy_seconds()
        if busy is None or self.busy is None or seconds < 0.2:
            return 0.0
        return max(0.0, (busy - self.busy - sum(os.times()[:4]) + self.own) / seconds)


@dataclass(frozen=True)
class Spread:
    """Units of work side by side, and CPU threads per unit."""

    side_by_side: int
    threads: int

    def waves(self, tasks: int) -> int:
        """How many rounds `tasks` need."""
        return -(-tasks // self.side_by_side)


@dataclass(frozen=True)
class ClusterLayout:
    """How the executor of `cluster.address` will spread the work of a configuration over a machine."""

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
    def stays(self) -> bool:
        """Whether the processes that Ray starts serve all stages."""
        return not self.local and not self.remote and not self.config.cluster.gpus_per_worker

    @property
    def device(self) -> torch.device:
        used = self.machine.gpus > 0 and (self.local or self.config.cluster.gpus_per_worker > 0)
        return torch.device("cuda" if used else "cpu")

    def actors(self, gpu: bool = True) -> Spread:
        """An actor pool (ingest, score), one thread per actor."""
        if self.local:
            return Spread(1, 1)
        return Spread(self.config.cluster.actors or self._places(gpu), 1)

    def tasks(self, count: int) -> Spread:
        """Tasks that share the machine's cores (trials, experts, evaluations); without Ray, if the cores are free."""
        if self.local and self.device.type == "cuda":
            return Spread(1, torch.get_num_threads())
        if self.local:
            cores = min(torch.get_num_threads(), self.machine.cores)
            each = threads_each(count, cores)
            return Spread(max(1, min(count, int((cores - self.others + 0.3) / each))), each)
        side_by_side = max(1, min(count, self._places(gpu=True)))
        return Spread(side_by_side, max(1, self.machine.cores // side_by_side))

    def workers(self, count: int) -> Spread:
        """Workers of one group (a distillation, one proxy)."""
        if self.local:
            return Spread(1, torch.get_num_threads())
        return Spread(count, max(1, self.machine.cores // count))

    def elastic_workers(self, least: int, most: int) -> Spread:
        """As many workers of one group as fit, each with one core and its GPU share."""
        if self.local or self.remote or least == most:
            return self.workers(most)
        places = self._places(gpu=True) if self.config.cluster.gpus_per_worker else self.machine.cores
        return replace(self.workers(max(least, min(most, places))), threads=1)

    def machines(self, workers: int) -> int:
        """Machines to pay for: this one, or on a cluster one per worker."""
        return workers if self.remote else 1

    @property
    def most(self) -> int:
        """Processes side by side, at most."""
        return self.tasks(self.machine.cores).side_by_side if self.local else self._places(gpu=True)

    def slower(self, spread: Spread, others: float) -> float:
        """How much longer work takes beside programs that use `others` cores than alone."""
        wanted = min(spread.side_by_side * spread.threads, self.machine.cores)
        return max(1.0, (wanted + others) / self.machine.cores)

    def _places(self, gpu: bool) -> int:
        if gpu and self.device.type == "cuda":
            return max(1, int(self.machine.gpus / self.config.cluster.gpus_per_worker))
        return self.machine.cores

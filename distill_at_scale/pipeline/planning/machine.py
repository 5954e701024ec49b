"""The machine that a plan is made on, and how the stages spread their work over it.

The figures are those of this machine; a plan for a running cluster (cluster.address) assumes machines like this one.
Left out: what else runs here, and the network between machines.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill_at_scale.config.load import Config


@dataclass(frozen=True)
class Machine:
    """Cores, memory in bytes (in all, whoever uses it), GPUs and the bytes of one, and free bytes on the run folder's disk."""

    cores: int
    memory: int
    gpus: int
    gpu_memory: int
    disk: int


def here(folder: Path) -> Machine:
    """This machine; `folder` exists and lies on the disk that the run will fill."""
    gpus = torch.cuda.device_count()
    each = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cores, _memory(), gpus, each, shutil.disk_usage(folder).free)


def _memory() -> int:
    """Bytes of the machine, or of the container where that has fewer."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


@dataclass(frozen=True)
class Spread:
    """So many pieces of work side by side, each with so many threads, on CPUs or a share of a GPU each."""

    side_by_side: int
    threads: int

    def waves(self, tasks: int) -> int:
        """How often in a row each place has something to do."""
        return -(-tasks // self.side_by_side)


@dataclass(frozen=True)
class ClusterLayout:
    """How the executor that cluster.address asks for will spread a configuration's work over a machine."""

    config: Config
    machine: Machine

    @property
    def alone(self) -> bool:
        """Everything in one process, without Ray."""
        return self.config.cluster.address == "none"

    @property
    def remote(self) -> bool:
        """On a cluster that runs already: its size is not known here."""
        return self.config.cluster.address not in (None, "none")

    @property
    def device(self) -> torch.device:
        used = self.machine.gpus > 0 and (self.alone or self.config.cluster.gpus_per_worker > 0)
        return torch.device("cuda" if used else "cpu")

    def actors(self, gpu: bool = True) -> Spread:
        """An actor pool (ingest, score): one thread each."""
        if self.alone:
            return Spread(1, 1)
        return Spread(self.config.cluster.actors or self._places(gpu), 1)

    def tasks(self, count: int) -> Spread:
        """Tasks that share the machine's cores (trials, experts, evaluations)."""
        if self.alone:
            return Spread(1, torch.get_num_threads())
        side = max(1, min(count, self._places(gpu=True)))
        return Spread(side, max(1, self.machine.cores // side))

    def workers(self, count: int) -> Spread:
        """Workers that work together (distillation, one proxy)."""
        if self.alone:
            return Spread(1, torch.get_num_threads())
        return Spread(count, max(1, self.machine.cores // count))

    def group(self, least: int, most: int) -> Spread:
        """The same, where as many work together as find room: one core each, and a GPU share where they have one."""
        if self.alone or self.remote or least == most:
            return self.workers(most)
        places = self._places(gpu=True) if self.config.cluster.gpus_per_worker else self.machine.cores
        return replace(self.workers(max(least, min(most, places))), threads=1)

    def machines(self, workers: int) -> int:
        """Machines that are paid for: this one, or on a cluster one for each worker."""
        return workers if self.remote else 1

    def _places(self, gpu: bool) -> int:
        if gpu and self.device.type == "cuda":
            return max(1, int(self.machine.gpus / self.config.cluster.gpus_per_worker))
        return self.machine.cores

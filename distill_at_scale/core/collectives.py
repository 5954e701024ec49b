"""Collective operations among the processes of a stage, with the same interface for a single process.

`SingleProcess` is one process; `ProcessGroup` is the default torch.distributed process group. Neither starts processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SingleProcess:
    """The only worker of a stage. The docstrings say what each operation does among the workers of a `ProcessGroup`."""

    rank, size = 0, 1

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Sum tensors over all workers, in place, in one flat all-reduce."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all workers, which have one shape, in rank order, on all workers."""
        return [tensor]

    def all_reduce_max(self, level: int) -> int:
        """The largest level of all workers, on all workers; a barrier."""
        return level

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers in rank order; only rank 0 may rely on the result."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all workers."""
        return value

    def smallest(self, value: Any) -> Any:
        """The smallest value that is not None, on all workers; None if all are."""
        return value


class ProcessGroup:
    """The default process group, which must be initialised."""

    def __init__(self, device: torch.device):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def all_reduce_max(self, level: int) -> int:
        shared = torch.tensor([level], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared.item())

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def smallest(self, value: Any) -> Any:
        return min((v for v in self.gather(value) if v is not None), default=None)


Collectives = SingleProcess | ProcessGroup


@contextlib.contextmanager
def joined(store: str, rank: int, size: int) -> Iterator[None]:
    """In the default process group of `size` processes on CPUs, which meet at `store`; one alone joins none."""
    if size > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        if size > 1:
            dist.destroy_process_group()


def current_workers(device: torch.device) -> Collectives:
    """The default process group if it is initialised and has several processes, else a SingleProcess."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup(device) if several else SingleProcess()

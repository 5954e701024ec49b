"""What a stage that runs in several processes needs of the others: sums, a shared signal, and gathering to rank 0.

`SingleProcess` is one process alone; `ProcessGroup` is a torch.distributed process group. Neither starts processes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives(Protocol):
    rank: int
    size: int

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Add up tensors over all workers, in place, in one flat all-reduce."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor of one shape, in rank order, everywhere."""

    def all_reduce_max(self, level: int) -> int:
        """The highest level of all workers, everywhere, once all have told theirs."""

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, in rank order; only rank 0 may rely on the result."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""

    def smallest(self, value: Any) -> Any:
        """The smallest value that is not None, everywhere."""


class SingleProcess:
    rank, size = 0, 1

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        pass

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def all_reduce_max(self, level: int) -> int:
        return level

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def smallest(self, value: Any) -> Any:
        return value


class ProcessGroup:
    """An initialised default process group."""

    def __init__(self, device: torch.device):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

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


def current_workers(device: torch.device) -> Collectives:
    """The process group where one was initialised with several processes, else Solo."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup(device) if several else SingleProcess()

"""Where the kept samples lie while they are drawn from, and the choice of that place from sizes.

`InMemory` has them all in memory, on the device or in the host's; `InShards` reads what is drawn from the prepared shards.
Both give the same bytes. What is pruned is found by id, class by class, and never decoded: row groups hold neighbours too,
which are left aside.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.manifest import kept_in_parts

DEVICE_SHARE, HOST_SHARE = 0.4, 0.5  # of what is free: networks and batches need the rest
READ_BYTES = 32 * 2**20  # of samples that are read at once while memory is filled

Array = np.ndarray[Any, Any]
Places = Mapping[int, Array]  # label -> places of the kept samples within the class, ascending


def kept_places(prepared: PreparedDataset, manifest: Path, labels: Collection[int]) -> dict[int, Array]:
    """Where the kept samples of some classes are; ids are joined class by class, so memory holds those of one.

    Raises UserError for a class of which nothing is kept, and where the manifest keeps samples that are not there.
    """
    masks = {label: np.zeros(prepared.counts("train")[label], bool) for label in sorted(labels)}
    for label, ids in kept_in_parts(manifest, labels):
        found = pc.is_in(prepared.ids("train", label), ids).to_numpy(zero_copy_only=False)
        if found.sum() != len(ids):
            raise UserError(
                f"{manifest} keeps {len(ids) - found.sum()} samples of the class {prepared.class_names[label]!r} that "
                f"{prepared.folder} lacks; it was made from other data: run `select` again"
            )
        masks[label] |= found
    places = {label: np.flatnonzero(mask).astype(np.int32) for label, mask in masks.items()}
    if empty := [label for label, found in places.items() if not len(found)]:
        name = prepared.class_names[empty[0]]
        raise UserError(
            f"the manifest keeps no sample of the class {name!r}; raise select.keep or select.min_per_class"
        )
    return places


class Placement(Protocol):
    """The kept samples of some classes, as they are stored."""

    @property
    def where(self) -> str:
        """device, host or shards."""

    @property
    def counts(self) -> Mapping[int, int]:
        """Kept samples by class, in ascending order of the classes."""

    def take(self, label: int, rows: Tensor) -> Tensor:
        """The samples at some rows [n] of a class's kept ones, in that order."""

    def whole(self, label: int) -> Tensor:
        """All of a class."""


class InMemory:
    """In memory: label -> stored values [n, *shape], all on one device."""

    def __init__(self, pixels: dict[int, Tensor]):
        self.pixels = pixels
        self.counts = {label: len(held) for label, held in pixels.items()}
        on_device = any(held.device.type != "cpu" for held in pixels.values())
        self.where = "device" if on_device else "host"

    @classmethod
    def load(cls, prepared: PreparedDataset, places: Places, device: torch.device) -> InMemory:
        return cls({label: _filled(prepared, label, found).to(device) for label, found in places.items()})

    def take(self, label: int, rows: Tensor) -> Tensor:
        held = self.pixels[label]
        return held[rows.to(held.device)]

    def whole(self, label: int) -> Tensor:
        return self.pixels[label]


class InShards:
    """On disk; only places are in memory. One thread at a time."""

    where = "shards"

    def __init__(self, prepared: PreparedDataset, places: Places, threads: int = 1):
        self.prepared, self.places, self.threads = prepared, places, threads
        self.counts = {label: len(found) for label, found in places.items()}

    def take(self, label: int, rows: Tensor) -> Tensor:
        order = torch.argsort(rows).numpy()
        wanted = self.places[label][rows.numpy()[order]]
        found = self.prepared.take("train", label, wanted, self.threads)
        stored = np.empty_like(found)
        stored[order] = found
        return torch.from_numpy(stored)

    def whole(self, label: int) -> Tensor:
        return _filled(self.prepared, label, self.places[label])


def _filled(prepared: PreparedDataset, label: int, places: Array) -> Tensor:
    """The samples at some places of a class, in memory; read in parts, so that little more than they is needed."""
    held = np.empty((len(places), *prepared.shape), prepared.dtype)
    at_once = max(1, READ_BYTES // max(1, prepared.sample_bytes))
    for start in range(0, len(places), at_once):
        held[start : start + at_once] = prepared.take("train", label, places[start : start + at_once])
    return torch.from_numpy(held)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of memory that one worker may fill with samples: of its device (0 where that is the host's), and of its host."""

    device: int
    host: int


def memory_budget(device: torch.device, here: int = 1, share: float = 1.0) -> MemoryBudget:
    """What is free now, less what else needs it; `here` workers share the host, this one has `share` of the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return MemoryBudget(int(free * DEVICE_SHARE * share), int(free_memory() * HOST_SHARE / here))


def free_memory() -> int:
    """Bytes of the host's memory that can still be taken, within the limit of the container; a lot where nothing says it."""
    found = [2**62]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used in CGROUPS:
        values = [*_lines(limit)[:1], *_lines(used)[:1]]
        if len(values) == 2 and values[0].strip().isdigit():
            found.append(max(0, int(values[0]) - int(values[1])))
    return min(found)


CGROUPS = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def choose(hold: str, needed: int, device: torch.device, free: MemoryBudget) -> tuple[str, str]:
    """Where the samples go ("device", "host" or "shards"), and why, in words; on a CPU "device" is the host."""
    if hold != "auto":
        where = "host" if hold == "device" and device.type == "cpu" else hold
        return where, f"as distill.hold = {hold} asks"
    if device.type != "cpu" and needed <= free.device:
        return "device", f"at most {format_bytes(free.device)} of its memory may be used"
    if needed <= free.host:
        return "host", f"at most {format_bytes(free.host)} of it may be used"
    return "shards", f"in memory at most {format_bytes(free.host)} may be used"


def format_bytes(count: int) -> str:
    """Bytes as a reader says them."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "KB"))
    return f"{count / unit:.1f} {name}"


def describe(where: str, samples: int, needed: int, why: str, device: torch.device) -> str:
    """Where they lie, for the log and the terminal."""
    lie = {
        "device": f"lie on the device {device}",
        "host": "lie in the host's memory" + (", the next draw is prepared ahead" if device.type != "cpu" else ""),
        "shards": "stay on disk and are read as they are drawn, the next draw ahead",
    }[where]
    return f"{samples:,} kept samples ({format_bytes(needed)}) {lie} ({why})"


def needed_bytes(prepared: PreparedDataset, places: Places) -> int:
    """What the kept samples take in memory."""
    return sum(map(len, places.values())) * math.prod(prepared.shape) * prepared.dtype.itemsize

"""Where kept samples are held for sampling (`distill.hold`), and the automatic choice by size.

`InMemory` holds them in device or host memory; `InShards` reads each batch from the prepared shards. Both give the same
bytes. Pruned samples are identified by id, class by class, and never decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Array
from distill_at_scale.data.prepared.manifest import first_kept, kept_in_parts

DEVICE_SHARE, HOST_SHARE = 0.4, 0.5  # of free memory: networks and batches need the rest
READ_BYTES = 32 * 2**20  # of samples that are read at once while filling memory
CGROUPS = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]

Places = Mapping[int, Array]  # label -> positions of the kept samples within the class


def kept_places(
    prepared: PreparedDataset, manifest: Path, labels: Collection[int], others: bool = False, first: int | None = None
) -> dict[int, Array]:
    """Positions of the kept samples of some classes, ascending. Ids are joined class by class, so memory holds those of one.

    `others`: include samples that are not kept, but not those that are held out.
    `first`: take only this number of kept samples of each class, those of smallest rank, in the order of their ranks.

    Raises UserError for a class without kept samples, and if the manifest keeps samples that the data lack.
    """
    masks = {label: np.zeros(prepared.counts("train")[label], bool) for label in sorted(labels)}
    ranked: dict[int, Array] = {}
    for label, ids in first_kept(manifest, labels, first) if first else kept_in_parts(manifest, labels, others):
        own = prepared.ids("train", label)
        mask = pc.is_in(own, ids).to_numpy(zero_copy_only=False)
        if mask.sum() != len(ids):
            lost, name = len(ids) - mask.sum(), prepared.class_names[label]
            problem = f"{manifest} keeps {lost} samples of the class {name!r} that {prepared.folder} lacks"
            raise UserError(f"{problem}; it was made from other data: run `select` again")
        masks[label] |= mask
        if first:
            ranked[label] = pc.index_in(ids, own).to_numpy().astype(np.int32)
    for label, mask in masks.items():
        if not mask.any():
            problem = f"the manifest keeps no sample of the class {prepared.class_names[label]!r}"
            raise UserError(f"{problem}; raise select.keep or select.min_per_class")
    return ranked or {label: np.flatnonzero(mask).astype(np.int32) for label, mask in masks.items()}


class InMemory:
    """Kept samples in memory, on one device, "device" or "host": one tensor, `pixels` are its parts, label -> [n, *shape]."""

    def __init__(self, stored: Tensor, counts: dict[int, int]):
        """`stored` [sum of counts, *shape] holds one class after the other, in the order of `counts` (labels ascending)."""
        self.stored, self.counts = stored, counts
        self.pixels = dict(zip(counts, stored.split(list(counts.values())), strict=True))
        self.first = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist(), strict=False))  # rows in `stored`
        self.where = "host" if stored.device.type == "cpu" else "device"

    @classmethod
    def load(cls, prepared: PreparedDataset, places: Places, device: torch.device) -> InMemory:
        counts = {label: len(inside) for label, inside in places.items()}
        kind = torch.from_numpy(np.empty(0, prepared.dtype)).dtype
        held = cls(torch.empty(sum(counts.values()), *prepared.shape, dtype=kind, device=device), counts)
        for label, inside in places.items():
            held.pixels[label].copy_(_loaded(prepared, label, inside))
        return held

    def renew(self, prepared: PreparedDataset, places: Places) -> None:
        """Hold other samples of some classes, as many as before, at these positions within the class, ascending."""
        for label, inside in places.items():
            self.pixels[label].copy_(_loaded(prepared, label, inside))

    def take(self, label: int, rows: Tensor) -> Tensor:
        """The kept samples of a class at some rows [n], in that order."""
        return self.take_all([label], [rows])

    def take_all(self, labels: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """The kept samples of several classes, class by class [sum of rows, *shape]: one read for all."""
        index = np.concatenate([own.numpy() + self.first[label] for label, own in zip(labels, rows, strict=True)])
        return self.stored[torch.from_numpy(index).to(self.stored.device, non_blocking=True)]

    def of_class(self, label: int) -> Tensor:
        """All kept samples of a class."""
        return self.pixels[label]


class InShards:
    """The same interface to samples on disk; memory holds only the positions. One thread at a time."""

    where = "shards"

    def __init__(self, prepared: PreparedDataset, places: Places, threads: int = 1):
        self.prepared, self.places, self.threads = prepared, places, threads
        self.counts = {label: len(inside) for label, inside in places.items()}

    def renew(self, prepared: PreparedDataset, places: Places) -> None:
        self.places = {**self.places, **places}

    def take(self, label: int, rows: Tensor) -> Tensor:
        places = self.places[label][rows.numpy()]
        order = np.argsort(places)
        ascending = self.prepared.take("train", label, places[order], self.threads)
        stored = np.empty_like(ascending)
        stored[order] = ascending
        return torch.from_numpy(stored)

    def take_all(self, labels: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.take(label, own) for label, own in zip(labels, rows, strict=True)])

    def of_class(self, label: int) -> Tensor:
        return _loaded(self.prepared, label, self.places[label])


Placement = InMemory | InShards


def read_in_parts(prepared: PreparedDataset, label: int, places: Array, threads: int = 1) -> Iterator[Tensor]:
    """The samples at some positions of a class, ascending: READ_BYTES at a time [n, *shape], to bound the memory."""
    at_once = max(1, READ_BYTES // max(1, prepared.sample_bytes))
    for start in range(0, len(places), at_once):
        yield torch.from_numpy(prepared.take("train", label, places[start : start + at_once], threads))


def _loaded(prepared: PreparedDataset, label: int, places: Array) -> Tensor:
    """The samples at some positions of a class [n, *shape]."""
    stored, start = torch.from_numpy(np.empty((len(places), *prepared.shape), prepared.dtype)), 0
    order = np.argsort(places, kind="stable")
    for part in read_in_parts(prepared, label, places[order]):
        stored[order[start : start + len(part)]] = part
        start += len(part)
    return stored


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that one worker may fill with samples: device memory (0 if the device is the CPU) and host memory."""

    device: int
    host: int


def memory_budget(device: torch.device, here: int = 1, share: float = 1.0) -> MemoryBudget:
    """From the memory that is free now; `here` workers share the host, this one has `share` of the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return MemoryBudget(int(free * DEVICE_SHARE * share), int(free_memory() * HOST_SHARE / here))


def free_memory() -> int:
    """Free bytes of host memory, within the container's limit; 2^62 if the system does not say."""
    limits = [2**62]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for limit, used in CGROUPS:
        values = [*_lines(limit)[:1], *_lines(used)[:1]]
        if len(values) == 2 and values[0].strip().isdigit():
            limits.append(max(0, int(values[0]) - int(values[1])))
    return min(limits)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def choose(hold: str, needed: int, device: torch.device, free: MemoryBudget) -> tuple[str, str]:
    """Where to hold the samples ("device", "host" or "shards"), and the reason; on a CPU, "device" is the host."""
    if hold != "auto":
        where = "host" if hold == "device" and device.type == "cpu" else hold
        return where, f"as distill.hold = {hold} asks"
    if device.type != "cpu" and needed <= free.device:
        return "device", f"at most {format_bytes(free.device)} of its memory may be used"
    if needed <= free.host:
        return "host", f"at most {format_bytes(free.host)} of it may be used"
    return "shards", f"in memory at most {format_bytes(free.host)} may be used"


def format_bytes(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "KB"))
    return f"{count / unit:.1f} {name}"


def describe(where: str, samples: int, needed: int, why: str, device: torch.device) -> str:
    """One sentence for the log and the terminal."""
    held = {
        "device": f"are held on the device {device}",
        "host": "are held in host memory" + (", the next batch is prefetched" if device.type != "cpu" else ""),
        "shards": "stay on disk and are read batch by batch, the next batch is prefetched",
    }[where]
    return f"{samples:,} kept samples ({format_bytes(needed)}) {held} ({why})"

"""Bytes: what a piece of code holds at its peak, measured, and formulas for what each stage's processes hold and write.

The measured part follows torch's tensors; on a CPU the scratch memory of its kernels is not seen and comes on top (`SCRATCH`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest.chunks import READ_AT_ONCE, READ_BYTES
from distill_at_scale.data.ingest.merge import SPAN_BYTES, threads_here
from distill_at_scale.data.prepared.format import scored_chunk
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pruning.proxies.dataloader import WINDOW_BYTES

PROCESS, WITH_TORCH = (
    150 * 2**20,
    450 * 2**20,
)  # of a Python process that decodes, and of one that has loaded torch and its kernels
SCRATCH = 1.25  # times what tensors take: kernels' scratch memory, and what the allocator keeps
IDS = 64  # bytes of a sample's id, label and score in a table in memory


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of new tensors at the peak of a call, on the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Tally() as tally:
        work()
    return tally.peak


class _Tally(TorchDispatchMode):
    """Follows the storages of tensors from their first sight to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.seen.add(value.untyped_storage()._cdata)  # was there before
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


@lru_cache(maxsize=64)
def parameters(spec: NetworkSpec) -> int:
    """Bytes of a network's weights."""
    return sum(value.numel() * 4 for value in spec.skeleton().state_dict().values())


@lru_cache(maxsize=64)
def activations(spec: NetworkSpec) -> int:
    """Bytes that one image leaves behind for the backward pass: the outputs of all layers."""
    sizes: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.numel() * 4 if isinstance(output, Tensor) else 0)

    network = spec.build(0)
    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(note)
    with torch.no_grad():
        network.eval()(torch.zeros(1, *spec.shape))
    return sum(sizes)


def of_ingest(config: Config, facts: Facts) -> int:
    """An actor: a chunk of decoded samples and its table, and raw files that wait."""
    size = facts.values
    if facts.listing is not None:
        size = int(facts.listing.listings["train"]["size"].to_numpy().mean()) or facts.values
    raw = min(READ_BYTES, READ_AT_ONCE * size)
    return PROCESS + 4 * raw + 2 * config.data.chunk * facts.stored


def of_merge(facts: Facts) -> int:
    """The driver: a span of images per thread, as read and as taken, and every sample's id."""
    return WITH_TORCH + 3 * min(threads_here() * SPAN_BYTES, facts.samples * facts.stored) + facts.samples * IDS


def of_proxy(config: Config, spec: NetworkSpec, facts: Facts, device: torch.device) -> tuple[int, int]:
    """Host and device bytes of one trial: a window of images with what is taken from it, weights, and a part of a batch."""
    window = 3 * min(WINDOW_BYTES, int(facts.train * config.score.share) * facts.stored)
    batch = config.score.batch * facts.values * 5
    network = 4 * parameters(spec) + int(SCRATCH * activations(spec) * _part(spec, config.score.batch, device))
    return _split(WITH_TORCH + window + batch, network, device)


def of_scorer(config: Config, spec: NetworkSpec, facts: Facts, device: torch.device) -> tuple[int, int]:
    """Host and device bytes of one actor: two chunks as they are read, all checkpoints, and one part of a chunk."""
    trials, epochs = config.score.checkpoint_counts
    chunk = min(facts.train, scored_chunk(facts.shape, config.data.chunk)) * facts.values
    layers = int(SCRATCH * 3 * spec.work(spec.at_once(device)))
    return _split(WITH_TORCH + 3 * chunk, trials * epochs * parameters(spec) + chunk + layers, device)


def of_evaluation(
    spec: NetworkSpec, images: int, values: int, tests: int, batch: int, device: torch.device
) -> tuple[int, int]:
    """Host and device bytes of one task: the set in float32, the test split as bytes, and a batch through the network."""
    training = 4 * images * values + int(SCRATCH * activations(spec) * min(batch, images)) + 4 * parameters(spec)
    return _split(WITH_TORCH + 2 * tests * values + 8 * images * values, training, device)


def of_distillation(
    own: int, ipc: int, values: int, pool: int, step: float, device: torch.device, held: str
) -> tuple[int, int]:
    """Host and device bytes of one worker: its kept samples, its images with their momentum, and a step at its peak."""
    images = 2 * 4 * own * ipc * values
    on_device = images + int(step * (SCRATCH if device.type == "cpu" else 1))
    host = WITH_TORCH + (pool if held == "host" else 0)
    return _split(host, on_device + (pool if held == "device" else 0), device)


def _part(spec: NetworkSpec, batch: int, device: torch.device) -> int:
    return min(batch, spec.at_once(device))


def _split(host: int, on_device: int, device: torch.device) -> tuple[int, int]:
    """On a CPU the device's memory is the host's."""
    return (host, on_device) if device.type == "cuda" else (host + on_device, 0)

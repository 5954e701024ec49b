"""Memory: the measured peak of a call, and formulas for the bytes that each stage's processes hold.

The measurement follows torch's tensors. On a CPU it does not see the scratch memory of kernels; `SCRATCH` accounts for it.
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
from distill_at_scale.data.prepared.format import scoring_chunk
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pruning.proxies.dataloader import WINDOW_BYTES

PROCESS = 150 * 2**20  # bytes of a Python process that decodes
WITH_TORCH = 450 * 2**20  # bytes of a process that has loaded torch and its kernels
SCRATCH = 1.25  # factor on tensors' bytes for the scratch memory of kernels and the allocator's reserve
IDS = 64  # bytes of a sample's id, label and score in an in-memory table


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of new tensors during a call, on the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _TensorMemory() as memory:
        work()
    return memory.peak


class _TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensor storages from their creation to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.seen |= {value.untyped_storage()._cdata for value in inputs}  # existed before
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return result

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


@lru_cache(maxsize=64)
def parameters(spec: NetworkSpec) -> int:
    """Bytes of a network's weights."""
    return sum(value.numel() * 4 for value in spec.skeleton().state_dict().values())


@lru_cache(maxsize=64)
def activations(spec: NetworkSpec) -> int:
    """Bytes of one image's activations for the backward pass: the outputs of all layers."""
    sizes: list[int] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.numel() * 4 if isinstance(output, Tensor) else 0)

    network = spec.build(0)
    for module in network.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(record)
    with torch.no_grad():
        network.eval()(torch.zeros(1, *spec.shape))
    return sum(sizes)


def of_ingest(config: Config, facts: Facts) -> int:
    """Bytes of an ingest actor: a chunk of decoded samples, its table, and prefetched raw files."""
    size = facts.values
    if facts.listing is not None:
        size = int(facts.listing.listings["train"]["size"].to_numpy().mean()) or facts.values
    return PROCESS + 4 * min(READ_BYTES, READ_AT_ONCE * size) + 2 * config.data.chunk * facts.stored


def of_proxy(config: Config, spec: NetworkSpec, facts: Facts, device: torch.device) -> tuple[int, int]:
    """Host and device bytes of one trial: a window of images, a batch, weights, and activations of a part of a batch."""
    window = 3 * min(WINDOW_BYTES, int(facts.train * config.score.share) * facts.stored)
    batch = config.score.batch * facts.values * 5
    network = 4 * parameters(spec) + int(SCRATCH * activations(spec) * min(config.score.batch, spec.microbatch(device)))
    return _split(WITH_TORCH + window + batch, network, device)


def of_scorer(config: Config, spec: NetworkSpec, facts: Facts, device: torch.device) -> tuple[int, int]:
    """Host and device bytes of one actor: chunks in flight, all checkpoints, and activations of a part of a chunk."""
    trials, epochs = config.score.checkpoint_counts
    chunk = min(facts.train, scoring_chunk(facts.shape, config.data.chunk)) * facts.values
    layers = int(SCRATCH * 3 * spec.activation_bytes(spec.microbatch(device)))
    return _split(WITH_TORCH + 3 * chunk, trials * epochs * parameters(spec) + chunk + layers, device)


def of_evaluation(
    spec: NetworkSpec, images: int, values: int, tests: int, batch: int, device: torch.device
) -> tuple[int, int]:
    """Host and device bytes of one task: the set in float32, the test split as bytes, and activations of a batch."""
    training = 4 * images * values + int(SCRATCH * activations(spec) * min(batch, images)) + 4 * parameters(spec)
    return _split(WITH_TORCH + 2 * tests * values + 8 * images * values, training, device)


def of_distillation(
    own: int, ipc: int, values: int, pool: int, step: float, device: torch.device, held: str
) -> tuple[int, int]:
    """Host and device bytes of one worker.

    Args:
        own: classes of the worker, with `ipc` images of `values` numbers each and their momentum.
        pool: bytes of its kept samples, which lie in `held` (device, host or shards).
        step: peak bytes of new tensors in a step.
    """
    on_device = 2 * 4 * own * ipc * values + int(step * (SCRATCH if device.type == "cpu" else 1))
    host = WITH_TORCH + (pool if held == "host" else 0)
    return _split(host, on_device + (pool if held == "device" else 0), device)


def _split(host: int, on_device: int, device: torch.device) -> tuple[int, int]:
    """On a CPU the device's memory is the host's."""
    return (host, on_device) if device.type == "cuda" else (host + on_device, 0)

"""Proxies: networks trained from scratch on the training split, with a checkpoint after every epoch.

One trial is one network with its own initialisation and order of batches. Trials are independent, so they run anywhere;
within a trial several workers may each take some of its logical shards (`pruning/proxies/dataloader.py`). On CPUs the gradients of the
logical shards are added up in one fixed order, so the weights are the same bytes for any number of workers that have
the same number of threads (networks with batch norm excepted: their running statistics are averaged). An interrupted
trial goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.collectives import Collectives, SingleProcess
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.models.spec import NetworkSpec, maybe_compile, mixes_samples, will_compile
from distill_at_scale.pruning.proxies.dataloader import Batch, ProxyDataLoader

Advance = Callable[[int], None]  # called with 1 after each epoch, also for those that were there already


def network_spec(
    config: ScoreSection, shape: tuple[int, ...], classes: int, kind: str | None = None
) -> NetworkSpec:  # fmt: skip
    return NetworkSpec(config.network, shape, classes, config.width, config.depth, kind)


def finished_epochs(config: ScoreSection, folder: Path) -> int:
    """How many epochs of all trials have a checkpoint."""
    trials, epochs = config.checkpoint_counts
    return sum(checkpoint_path(folder, t, e).exists() for t in range(trials) for e in range(epochs))


def checkpoint_path(folder: Path, trial: int, epoch: int) -> Path:
    return folder / f"trial-{trial:02d}" / f"epoch-{epoch:03d}.safetensors"


def check_workers(prepared: PreparedDataset, config: ScoreSection, seed: int) -> None:
    """Raises UserError where the workers of a proxy cannot share its logical shards evenly."""
    shards = ProxyDataLoader(prepared, seed, config.batch, config.shards, config.share).logical_shards
    if shards % config.workers:
        raise UserError(
            f"score.workers = {config.workers} cannot share {shards} logical shards evenly; take a power of two up to "
            f"{shards}, or raise score.shards (now {config.shards})"
        )


class ProxyTrial:
    """The training of one proxy, as far as one worker is concerned."""

    def __init__(
        self,
        prepared: PreparedDataset,
        config: ScoreSection,
        trial: int,
        seed: int,
        folder: Path,
        device: torch.device,
        workers: Collectives | None = None,
    ):
        self.config, self.trial, self.seed, self.folder, self.device = config, trial, seed, folder, device
        self.workers = workers or SingleProcess()
        self.prepared = prepared
        self.spec = network_spec(config, prepared.shape, len(prepared.class_names), prepared.kind)
        self.normalization = normalization_of(prepared, whitened=False)
        self.stream = ProxyDataLoader(prepared, seed, config.batch, config.shards, config.share)
        self.network = self.spec.build(rng.derive(seed, "proxy", trial)).to(device)
        work = self.spec.activation_bytes(self.stream.samples * config.epochs)  # of all workers: each decides alike
        compiled = will_compile(config.compile, work)
        self.layout = self.spec.memory_format("train", device, compiled)
        self.layout.network(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.mixes = mixes_samples(self.network)
        self.forward = maybe_compile(self._logits, config.compile, work)

    def run(self, advance: Advance = lambda epochs: None) -> None:
        """Train all epochs that have no checkpoint yet.

        Raises DistillationDiverged with trial, epoch and learning rate where a weight is not finite.
        """
        start = self._resume()
        advance(start)
        for epoch in range(start, self.config.epochs):
            self._epoch(epoch)
            if self.workers.rank == 0:
                self._save(checkpoint_path(self.folder, self.trial, epoch))
            self.workers.all_reduce_max(0)  # nobody goes on before it is there
            advance(1)

    def _epoch(self, epoch: int) -> None:
        dealt = self.stream.deal(self.trial, epoch)
        each = len(dealt) // self.workers.size
        own = range(self.workers.rank * each, (self.workers.rank + 1) * each)
        total = sum(self.stream.sizes(dealt))
        for parts in self.stream.batches(self.trial, epoch, dealt, own):
            if self.device.type == "cpu":
                self._set_gradient(self._exact_sum(parts, total))
            else:
                self._set_gradient(self._fast_sum(parts, total))
            self.optimizer.step()
        self._average_statistics()
        if not all(torch.isfinite(p).all() for p in self.network.parameters()):
            raise DistillationDiverged(f"proxy training diverged in trial {self.trial}, epoch {epoch}, at score.lr = "
                                       f"{self.config.lr}; lower score.lr")  # fmt: skip

    def _exact_sum(self, parts: Sequence[Batch], total: int) -> Tensor:
        """The gradient of the batch: those of the logical shards, added up pairwise in one fixed order."""
        own = pairwise([self._gradient(images, labels, total) for images, labels in parts])
        return pairwise(self.workers.all_gather(own))

    def _fast_sum(self, parts: Sequence[Batch], total: int) -> Tensor:
        """The same up to rounding, in one pass; batch norm still sees logical shards apart."""
        if self.mixes:
            own = pairwise([self._gradient(images, labels, total) for images, labels in parts])
        else:
            images, labels = (torch.cat(list(tensors)) for tensors in zip(*parts, strict=True))
            own = self._gradient(images, labels, total)
        self.workers.all_reduce_sum([own])
        return own

    def _gradient(self, images: Tensor, labels: Tensor, total: int) -> Tensor:
        """Flat gradient of (sum of losses) / total, summed over parts that fit the cache."""
        self.optimizer.zero_grad()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        at_once = len(images) if self.mixes else min(len(images), self.spec.microbatch(self.device))
        for part, targets in zip(images.split(at_once), labels.split(at_once), strict=True):
            (F.cross_entropy(self.forward(part), targets, reduction="sum") / total).backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in self.network.parameters()])  # type: ignore[union-attr]

    def _logits(self, pixels: Tensor) -> Tensor:
        images = self.layout.images(self.normalization.apply(pixels))
        with autocast(self.config.precision, self.device):
            return self.network(images).float()

    def _set_gradient(self, flat: Tensor) -> None:
        parameters = list(self.network.parameters())
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _average_statistics(self) -> None:
        buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        if self.workers.size > 1 and buffers:
            self.workers.all_reduce_sum(buffers)
            for buffer in buffers:
                buffer.div_(self.workers.size)

    def _save(self, path: Path) -> None:
        found = {f"weight.{k}": v for k, v in self.network.state_dict().items()}
        for i, parameter in enumerate(self.network.parameters()):
            buffer: Any = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                found[f"momentum.{i}"] = buffer
        safetensors_io.save(path, found, {"class_names": json.dumps(self.prepared.class_names)})

    def _resume(self) -> int:
        done = 0
        while done < self.config.epochs and checkpoint_path(self.folder, self.trial, done).exists():
            done += 1
        done = self.workers.broadcast(done)
        if 0 < done < self.config.epochs:
            saved = safetensors_io.load(checkpoint_path(self.folder, self.trial, done - 1))
            self.network.load_state_dict(weights_of(saved))
            for i, parameter in enumerate(self.network.parameters()):
                if f"momentum.{i}" in saved:
                    self.optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{i}"].to(parameter.device)
        return done


def load_proxy(spec: NetworkSpec, path: Path, device: torch.device) -> nn.Module:
    """A proxy in evaluation mode, from a checkpoint."""
    network = spec.build(0)
    network.load_state_dict(weights_of(safetensors_io.load(path)))
    return network.to(device).eval().requires_grad_(False)


def weights_of(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's part of a checkpoint."""
    return {key.removeprefix("weight."): value for key, value in saved.items() if key.startswith("weight.")}


def pairwise(values: Sequence[Tensor]) -> Tensor:
    """The sum of a power of two of tensors, in the order of a binary tree: the same whoever adds up which half."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 arithmetic where it is asked for, or by default on a GPU."""
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)

"""Proxies: networks trained from scratch on the training split, with a checkpoint after each epoch to resume from.

On CPUs the gradients of the logical shards are added in one fixed order, so the weights are the same bytes for any number of
workers with the same number of threads; with batch norm, running statistics are averaged over workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.collectives import Collectives, SingleProcess
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec, maybe_compile, mixes_samples, will_compile
from distill_at_scale.pruning.proxies.dataloader import Batch, ProxyDataLoader

# called with the number of epochs finished, also of those that have a checkpoint already
Advance = Callable[[int], None]

# of the section score: what only the training of proxies reads
KEYS = ("trials", "epochs", "share", "shards", "batch", "lr", "momentum", "weight_decay")


def network_spec(config: ScoreSection, shape: tuple[int, ...], classes: int, kind: str | None = None) -> NetworkSpec:
    return NetworkSpec(config.network, shape, classes, config.width, config.depth, kind)


def finished_epochs(config: ScoreSection, folder: Path) -> int:
    """The number of epochs, over all trials, that have a checkpoint."""
    trials, epochs = config.checkpoint_counts
    return sum(checkpoint_path(folder, t, e).exists() for t in range(trials) for e in range(epochs))


def checkpoint_path(folder: Path, trial: int, epoch: int) -> Path:
    return folder / f"trial-{trial:02d}" / f"epoch-{epoch:03d}.safetensors"


def check_workers(prepared: PreparedDataset, config: ScoreSection, seed: int) -> None:
    """Raises UserError if the workers of a proxy cannot share its logical shards evenly."""
    shards = ProxyDataLoader(prepared, seed, config.batch, config.shards, config.share).logical_shards
    if shards % config.workers:
        raise UserError(
            f"score.workers = {config.workers} cannot share {shards} logical shards evenly; use a power of two up to "
            f"{shards}, or raise score.shards (now {config.shards})"
        )


class ProxyTrial:
    """One worker's part in the training of one proxy."""

    def __init__(
        self, prepared: PreparedDataset, config: ScoreSection, trial: int, seed: int, folder: Path,
        device: torch.device, workers: Collectives | None = None,
    ):  # fmt: skip
        self.prepared, self.config, self.trial, self.seed = prepared, config, trial, seed
        self.folder, self.device, self.workers = folder, device, workers or SingleProcess()
        self.spec = network_spec(config, prepared.shape, len(prepared.class_names), prepared.kind)
        self.normalization = normalization_of(prepared, whitened=False)
        self.loader = ProxyDataLoader(prepared, seed, config.batch, config.shards, config.share)
        self.network = self.spec.build(rng.derive(seed, "proxy", trial)).to(device)
        # of all workers, so that all decide alike
        work = self.spec.activation_bytes(self.loader.samples * config.epochs)
        self.memory_format = self.spec.memory_format("train", device, will_compile(config.compile, work))
        self.memory_format.network(self.network)
        weights = self.network.parameters()
        self.optimizer = torch.optim.SGD(weights, config.lr, config.momentum, weight_decay=config.weight_decay)
        self.mixes = mixes_samples(self.network)
        self.forward = maybe_compile(self._logits, config.compile, work)

    def run(self, advance: Advance = lambda epochs: None) -> None:
        """Trains all epochs that have no checkpoint yet.

        Raises DistillationDiverged with trial, epoch and learning rate if a weight is not finite.
        """
        start = self._resume()
        advance(start)
        for epoch in range(start, self.config.epochs):
            self._epoch(epoch)
            if self.workers.rank == 0:
                tensors = {f"weight.{k}": v for k, v in self.network.state_dict().items()}
                for i, parameter in enumerate(self.network.parameters()):
                    if (buffer := self.optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None:
                        tensors[f"momentum.{i}"] = buffer
                facts = {"class_names": json.dumps(self.prepared.class_names)}
                safetensors_io.save(checkpoint_path(self.folder, self.trial, epoch), tensors, facts)
            self.workers.all_reduce_max(0)  # a barrier: all workers wait for the checkpoint
            advance(1)

    def _epoch(self, epoch: int) -> None:
        shards = self.loader.shard_groups(self.trial, epoch)
        each = len(shards) // self.workers.size
        own = range(self.workers.rank * each, (self.workers.rank + 1) * each)
        total, parameters = sum(self.loader.batch_sizes(shards)), list(self.network.parameters())
        for parts in self.loader.batches(self.trial, epoch, shards, own):
            gradient = self._batch_gradient(parts, total).split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter.grad = part.view_as(parameter)
            self.optimizer.step()
        statistics = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        if self.workers.size > 1 and statistics:
            self.workers.all_reduce_sum(statistics)
            for buffer in statistics:
                buffer.div_(self.workers.size)
        if not all(torch.isfinite(p).all() for p in parameters):
            raise DistillationDiverged(
                f"proxy training diverged in trial {self.trial}, epoch {epoch}, at score.lr = {self.config.lr}; lower score.lr"
            )

    def _batch_gradient(self, parts: Sequence[Batch], total: int) -> Tensor:
        """The flat gradient of a batch, over all workers; on CPUs shards are added in one fixed order."""
        # on a GPU one pass over all shards, unless batch norm must see them separately
        if self.device.type == "cpu" or self.mixes:
            own = tree_sum([self._gradient(images, labels, total) for images, labels in parts])
        else:
            images, labels = (torch.cat(list(tensors)) for tensors in zip(*parts, strict=True))
            own = self._gradient(images, labels, total)
        if self.device.type == "cpu":
            return tree_sum(self.workers.all_gather(own))
        self.workers.all_reduce_sum([own])
        return own

    def _gradient(self, images: Tensor, labels: Tensor, total: int) -> Tensor:
        """The flat gradient of (sum of losses) / total, summed over microbatches that fit the cache."""
        self.optimizer.zero_grad()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        microbatch = len(images) if self.mixes else min(len(images), self.spec.microbatch(self.device))
        for part, targets in zip(images.split(microbatch), labels.split(microbatch), strict=True):
            (F.cross_entropy(self.forward(part), targets, reduction="sum") / total).backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in self.network.parameters()])  # type: ignore[union-attr]

    def _resume(self) -> int:
        done = 0
        while done < self.config.epochs and checkpoint_path(self.folder, self.trial, done).exists():
            done += 1
        done = self.workers.broadcast(done)
        if 0 < done < self.config.epochs:
            saved = safetensors_io.load(checkpoint_path(self.folder, self.trial, done - 1), again=True)
            self.network.load_state_dict(weights_of(saved))
            for i, parameter in enumerate(self.network.parameters()):
                if f"momentum.{i}" in saved:
                    self.optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{i}"].to(parameter.device)
        return done

    def _logits(self, pixels: Tensor) -> Tensor:
        images = self.memory_format.images(self.normalization.apply(pixels))
        with autocast(self.config.precision, self.device):
            return self.network(images).float()


def load_proxy(spec: NetworkSpec, path: Path, device: torch.device) -> nn.Module:
    """The proxy of a checkpoint, in evaluation mode."""
    network = spec.build(0)
    network.load_state_dict(weights_of(safetensors_io.load(path)))
    return network.to(device).eval().requires_grad_(False)


def weights_of(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network in a checkpoint."""
    return {key.removeprefix("weight."): value for key, value in saved.items() if key.startswith("weight.")}


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of 2^k tensors in the order of a binary tree, so that workers can add subtrees first with the same result."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]

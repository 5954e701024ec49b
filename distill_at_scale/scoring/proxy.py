"""Proxies: networks trained from scratch on all the data, with a checkpoint after every epoch.

One trial is one network with its own initialisation and order of batches; trials are independent, so they run anywhere.
An interrupted trial goes on from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale import rng, tensors
from distill_at_scale.config import ScoreSection
from distill_at_scale.data.pool import Normalization
from distill_at_scale.errors import DistillationDiverged
from distill_at_scale.networks import NetworkSpec, maybe_compile, mixes_samples

Advance = Callable[[int], None]  # called with 1 after each epoch, also for those that were there already


def network_spec(config: ScoreSection, shape: tuple[int, ...], classes: int) -> NetworkSpec:
    return NetworkSpec(config.network, shape, classes, config.width, config.depth)


def checkpoint_path(folder: Path, trial: int, epoch: int) -> Path:
    return folder / f"trial-{trial:02d}" / f"epoch-{epoch:03d}.safetensors"


def train_trial(
    pixels: Tensor, labels: Tensor, normalization: Normalization, spec: NetworkSpec, config: ScoreSection,
    trial: int, seed: int, folder: Path, device: torch.device, advance: Advance = lambda epochs: None,
) -> None:  # fmt: skip
    """Train one proxy on uint8 pixels [n, *shape] and labels [n]; writes a checkpoint per epoch into `folder`.

    Raises DistillationDiverged with trial, epoch and learning rate where the loss is not finite.
    """
    network = spec.build(rng.derive(seed, "proxy", trial)).to(device)
    optimizer = torch.optim.SGD(network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    start = _resume(network, optimizer, folder, trial, config.epochs)
    advance(start)
    at_once = config.batch if mixes_samples(network) else min(config.batch, spec.at_once(device))
    forward = maybe_compile(network, config.compile, spec.work(len(labels) * config.epochs))
    for epoch in range(start, config.epochs):
        order = torch.randperm(len(labels), generator=rng.generator(seed, "proxy order", trial, epoch))
        for first in range(0, len(order), config.batch):
            rows = order[first : first + config.batch]
            if len(rows) < config.batch and first > 0:
                break  # fixed-shape batches; which samples sit out an epoch is random
            _step(forward, optimizer, normalization.apply(pixels[rows].to(device)), labels[rows].to(device), at_once)
        _check_finite(network, trial, epoch, config.lr)
        _save(network, optimizer, checkpoint_path(folder, trial, epoch))
        advance(1)


def load_proxy(spec: NetworkSpec, path: Path, device: torch.device) -> nn.Module:
    """A proxy in evaluation mode, from a checkpoint."""
    network = spec.build(0)
    weights = {k.removeprefix("weight."): v for k, v in tensors.load(path).items() if k.startswith("weight.")}
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False)


def _step(
    forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, at_once: int
) -> None:
    """One SGD step on the mean loss of a batch, whose gradient is summed over parts that fit the cache."""
    optimizer.zero_grad()
    for part, targets in zip(images.split(at_once), labels.split(at_once), strict=True):
        (F.cross_entropy(forward(part), targets, reduction="sum") / len(labels)).backward()
    optimizer.step()


def _save(network: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    found = {f"weight.{k}": v for k, v in network.state_dict().items()}
    for i, parameter in enumerate(network.parameters()):
        buffer: Any = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            found[f"momentum.{i}"] = buffer
    tensors.save(path, found)


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, trial: int, epochs: int) -> int:
    done = 0
    while done < epochs and checkpoint_path(folder, trial, done).exists():
        done += 1
    if 0 < done < epochs:
        saved = tensors.load(checkpoint_path(folder, trial, done - 1))
        network.load_state_dict({k.removeprefix("weight."): v for k, v in saved.items() if k.startswith("weight.")})
        for i, parameter in enumerate(network.parameters()):
            if f"momentum.{i}" in saved:
                optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{i}"].to(parameter.device)
    return done


def _check_finite(network: nn.Module, trial: int, epoch: int, lr: float) -> None:
    if not all(torch.isfinite(p).all() for p in network.parameters()):
        raise DistillationDiverged(
            f"proxy training diverged in trial {trial}, epoch {epoch}, at score.lr = {lr}; lower score.lr"
        )

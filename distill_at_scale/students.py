"""Training a network on a small set by the protocol that the set expects, and testing it (METHOD.md section 4).

A `TrainingProtocol` travels in the card of a synthetic set; a `TrainingSet` is what is trained on: the synthetic set, or
a control of real images under the same protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale import rng
from distill_at_scale.augment import Augmentation, cutmix
from distill_at_scale.data.pool import Normalization
from distill_at_scale.errors import UserError
from distill_at_scale.networks import NetworkSpec
from distill_at_scale.sections import EvaluateSection


@dataclass(frozen=True)
class TrainingProtocol:
    """How a student is trained: SGD with the rate divided by ten at half time, or AdamW with a cosine."""

    epochs: int
    augment: str = "none"  # siamese families, parameters per image
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cutmix: float = 0.0  # the share of batches that are cut and mixed
    labels: Literal["hard", "soft", "views"] = "hard"  # soft: one per image; views: one per image, epoch and view
    temperature: float = 1.0  # of soft labels
    view_scale: float = 1.0  # labels: views: the smallest share of an image that a view shows

    def card(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> TrainingProtocol:
        """From a card; what this version does not know is an error, since it would change the result.

        Raises UserError naming the key.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(card) - known):
            raise UserError(
                f"the set expects a training with {unknown[0]!r}, which this version does not know; update it"
            )
        return cls(**card)

    def overridden(self, section: EvaluateSection) -> TrainingProtocol:
        """With whatever the configuration says of it."""
        keys = ("epochs", "batch", "lr", "momentum", "weight_decay")
        return replace(self, **{key: value for key in keys if (value := getattr(section, key)) is not None})


@dataclass(frozen=True)
class TrainingSet:
    """Images float32 (normalised) or uint8 (with their normalisation) [n, *shape], labels int64 [n], and soft labels.

    `soft` holds what the protocol's `labels` needs: "soft_labels" [n, classes], logits whose softmax is the target.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None
    soft: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> TrainingSet:
        soft = {key: value.to(device) for key, value in self.soft.items()}
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), soft=soft)


Loss = Callable[[Tensor], Tensor]  # logits -> a scalar


def train(
    spec: NetworkSpec, made: TrainingSet, protocol: TrainingProtocol, seed: int, device: torch.device
) -> nn.Module:
    """A network trained from scratch; the whole set lies on the device."""
    network = spec.build(rng.derive(seed, "network")).to(device).train()
    optimizer, scheduler = _optimizer(network, protocol)
    made = made.to(device)
    for epoch in range(protocol.epochs):
        generator = rng.generator(seed, "epoch", epoch)
        for rows in torch.randperm(len(made.labels), generator=generator).split(protocol.batch):
            images, loss_of = _batch(made, rows.to(device), protocol, generator)
            loss = loss_of(network(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network


def _batch(
    made: TrainingSet, rows: Tensor, protocol: TrainingProtocol, generator: torch.Generator
) -> tuple[Tensor, Loss]:
    """Augmented images, and the loss of their logits."""
    images = made.images[rows]
    if made.normalization is not None:
        images = made.normalization.apply(images)
    images = Augmentation(protocol.augment).draw(generator, per_image=len(rows)).apply(images)
    loss_of = _loss(made, rows, protocol)
    if protocol.cutmix and len(rows) > 1 and float(torch.rand(1, generator=generator)) < protocol.cutmix:
        mixed = cutmix(images, generator)
        other = _loss(made, rows[mixed.order], protocol)
        return mixed.images, lambda logits: mixed.share * loss_of(logits) + (1 - mixed.share) * other(logits)
    return images, loss_of


def _loss(made: TrainingSet, rows: Tensor, protocol: TrainingProtocol) -> Loss:
    if protocol.labels == "soft":
        targets = (made.soft["soft_labels"][rows] / protocol.temperature).softmax(1)
        return lambda logits: F.cross_entropy(logits, targets)
    targets = made.labels[rows]
    return lambda logits: F.cross_entropy(logits, targets)


def _optimizer(
    network: nn.Module, protocol: TrainingProtocol
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters, decay = network.parameters(), protocol.weight_decay
    if protocol.optimizer == "adamw":
        adam = torch.optim.AdamW(parameters, protocol.lr, weight_decay=decay)
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, protocol.epochs)
    sgd = torch.optim.SGD(parameters, protocol.lr, protocol.momentum, weight_decay=decay)
    return sgd, torch.optim.lr_scheduler.MultiStepLR(sgd, [protocol.epochs // 2 + 1], gamma=0.1)


@torch.no_grad()
def test(
    network: nn.Module, pixels: Tensor, labels: Tensor, normalization: Normalization, device: torch.device, at_once: int
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on stored pixels [n, *shape], as fractions; `at_once` images at a time."""
    network.eval()
    right1 = right5 = 0
    for first in range(0, len(labels), at_once):
        logits = network(normalization.apply(pixels[first : first + at_once].to(device)))
        targets = labels[first : first + at_once].to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right1 += int((best[:, 0] == targets).sum())
        right5 += int((best == targets[:, None]).any(1).sum())
    return right1 / len(labels), right5 / len(labels)

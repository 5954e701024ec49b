"""Training a network on a small set by the protocol that the set expects, and testing it (METHOD.md section 4).

A `TrainingProtocol` travels in the card of a synthetic set; a `TrainingSet` is what is trained on: the synthetic set, or
a control of real images under the same protocol. With `labels: views` the batches and what they show are fixed by the
protocol's `view_seed` (soft_labels.py), for every student alike, and the loss is the Kullback-Leibler divergence from the
teacher at temperature T times T^2 (Hinton et al. 2015). The code of SRe2L and RDED leaves the T^2 out, which AdamW does
not notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.sections import EvaluateSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation.augment import Augmentation, cutmix
from distill_at_scale.distillation.soft_labels import Labels, ViewPlan, merged
from distill_at_scale.models.spec import NetworkSpec, mixes_samples

FEW = 16  # images in a batch, below which batch norm's statistics say little


@dataclass(frozen=True)
class TrainingProtocol:
    """How a student is trained: SGD with the rate divided by ten at half time, or AdamW with a cosine."""

    epochs: int
    augment: str = "none"  # siamese families, parameters per image; labels: views: flip or none, what views do
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cutmix: float = 0.0  # the share of batches that are cut and mixed
    labels: Literal["hard", "soft", "views"] = "hard"  # soft: one per image; views: one per image, epoch and view
    temperature: float = 1.0  # of soft labels
    view_scale: float = 1.0  # labels: views: the smallest share of an image that a view shows
    view_seed: int = 0  # labels: views: what they and their batches are drawn from

    @property
    def plan(self) -> ViewPlan:
        """Of `labels: views`, the batches and views of every epoch."""
        return ViewPlan(self.view_seed, self.batch, self.view_scale, self.augment == "flip", self.cutmix)

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
        """With whatever the configuration says of it.

        Raises UserError for another batch than the one that the labels of views were made for.
        """
        if self.labels == "views" and section.batch not in (None, self.batch):
            raise UserError(
                f"evaluate.batch = {section.batch}: the set has labels for batches of {self.batch} views; leave it out, or "
                "set student_batch in the method's section and distil again"
            )
        keys = ("epochs", "batch", "lr", "momentum", "weight_decay")
        return replace(self, **{key: value for key in keys if (value := getattr(section, key)) is not None})


@dataclass(frozen=True)
class TrainingSet:
    """Images float32 (normalised) or uint8 (with their normalisation) [n, *shape], labels int64 [n], and soft labels.

    `soft` holds what the protocol's `labels` needs: "soft_labels" [n, classes], logits whose softmax is the target;
    `views` is what gives the labels of views.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None
    soft: Mapping[str, Tensor] = field(default_factory=dict)
    views: Labels | None = None

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
    mixes = mixes_samples(network)
    if mixes:
        _warn_of_few(spec, min(protocol.batch, len(made.labels)))
    for epoch in range(protocol.epochs):
        steps = (
            _views(made, protocol, epoch) if protocol.labels == "views" else _steps(made, protocol, seed, epoch, mixes)
        )
        for images, loss_of in steps:
            loss = loss_of(network(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network


def _warn_of_few(spec: NetworkSpec, batch: int) -> None:
    if batch < FEW:
        warnings.warn(
            f"the network {spec.name} has batch norm, whose statistics over batches of {batch} images are poor; a last batch "
            "of one image is merged into the one before, else it is trained as it is: a network without batch norm is safer",
            stacklevel=3,
        )


def _steps(
    made: TrainingSet, protocol: TrainingProtocol, seed: int, epoch: int, mixes: bool
) -> Iterator[tuple[Tensor, Loss]]:
    """An epoch's batches; of networks with batch norm a last one of one image is merged into the one before."""
    generator = rng.generator(seed, "epoch", epoch)
    batches = torch.randperm(len(made.labels), generator=generator).split(protocol.batch)
    for rows in merged(batches) if mixes else batches:
        yield _batch(made, rows.to(made.images.device), protocol, generator)


def _views(made: TrainingSet, protocol: TrainingProtocol, epoch: int) -> Iterator[tuple[Tensor, Loss]]:
    """An epoch's views with the teacher's labels for exactly these."""
    assert made.views is not None
    epoch, heat = epoch % made.views.epochs, protocol.temperature
    for batch in protocol.plan.batches(epoch, len(made.labels)):
        views = batch.apply(_normalised(made, batch.rows.to(made.images.device)))
        targets = (made.views.of(epoch, batch, views) / heat).log_softmax(1)
        yield views, partial(_divergence, targets, heat)


def _divergence(targets: Tensor, heat: float, logits: Tensor) -> Tensor:
    found = (logits / heat).log_softmax(1)
    return F.kl_div(found, targets, reduction="batchmean", log_target=True) * heat**2


def _normalised(made: TrainingSet, rows: Tensor) -> Tensor:
    images = made.images[rows]
    return images if made.normalization is None else made.normalization.apply(images)


def _batch(
    made: TrainingSet, rows: Tensor, protocol: TrainingProtocol, generator: torch.Generator
) -> tuple[Tensor, Loss]:
    """Augmented images, and the loss of their logits."""
    images = _normalised(made, rows)
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


@dataclass(frozen=True)
class Tested:
    """Fractions of the tested images that are right; per class None where none was tested."""

    top1: float
    top5: float
    per_class: list[float | None]  # top-1


def test(
    network: nn.Module, pixels: Tensor, labels: Tensor, normalization: Normalization, device: torch.device, at_once: int
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on stored pixels [n, *shape], as fractions; `at_once` images at a time."""
    found = examine(network, pixels, labels, normalization, device, at_once)
    return found.top1, found.top5


@torch.no_grad()
def examine(
    network: nn.Module, pixels: Tensor, labels: Tensor, normalization: Normalization, device: torch.device, at_once: int
) -> Tested:
    """As `test`, and the top-1 accuracy of every class that the network knows."""
    network.eval()
    right5, right = 0, torch.zeros(len(labels), dtype=torch.bool)
    classes = 0
    for first in range(0, len(labels), at_once):
        logits = network(normalization.apply(pixels[first : first + at_once].to(device)))
        targets = labels[first : first + at_once].to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right[first : first + at_once] = (best[:, 0] == targets).cpu()
        right5 += int((best == targets[:, None]).any(1).sum())
        classes = logits.shape[1]
    return Tested(int(right.sum()) / len(labels), right5 / len(labels), _by_class(right, labels.cpu(), classes))


def _by_class(right: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    tested, found = (torch.bincount(rows, minlength=classes).tolist() for rows in (labels, labels[right]))
    return [round(hits / count, 6) if count else None for hits, count in zip(found, tested, strict=True)]

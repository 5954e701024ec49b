"""Training a network on a small set by the protocol that the set expects, and testing it on real data.

With `labels: views` the loss is the Kullback-Leibler divergence from the teacher at temperature T, times T^2 (Hinton et al.
2015). The official code of SRe2L and RDED omits the T^2; AdamW is invariant to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.methods import EvaluateSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import RunWarning, UserError
from distill_at_scale.core.progress import Progressed
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation.augment import FLIP, Augmentation, cutmix
from distill_at_scale.distillation.soft_labels import (
    StoredLabels,
    TeacherLabels,
    ViewPlan,
    crop_and_flip,
    merge_last_batch,
    resized_crop_boxes,
)
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec, mixes_samples
from distill_at_scale.pruning.infobatch import InfoBatch

SMALL_BATCH = 16  # images below which the statistics of batch norm are poor

# shares, classes or (log) probabilities, and rows of their samples
WeightedTargets = list[tuple[float, Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingProtocol:
    """How a student is trained; saved in the card of a synthetic set.

    SGD divides the learning rate by ten after half of the epochs; AdamW anneals it with a cosine.
    """

    epochs: int
    augment: str = "none"  # siamese families joined by `_`, parameters per image; for labels: views "flip" or "none"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch: int = 256  # images per step
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cutmix: float = 0.0  # share of batches that CutMix mixes
    labels: Literal["hard", "soft", "views"] = "hard"  # soft: per image; views: per image, epoch and view
    temperature: float = 1.0  # of soft labels
    view_scale: float = 1.0  # labels: views: smallest share of an image's area in a view
    view_seed: int = 0  # labels: views: seed of views and batches
    crop: tuple[float, float] | None = None  # smallest and largest share of an image in a random crop; not for views

    @property
    def plan(self) -> ViewPlan:
        """The batches and views of `labels: views`."""
        return ViewPlan(self.view_seed, self.batch, self.view_scale, self.augment == "flip", self.cutmix)

    def card(self) -> dict[str, Any]:
        """JSON values; without `crop`, if there is none, so that earlier versions read it."""
        crop = {} if self.crop is None else {"crop": list(self.crop)}
        return {key: value for key, value in asdict(self).items() if key != "crop"} | crop

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> TrainingProtocol:
        """Raises UserError for a key that this version does not know, since it would change the result."""
        if unknown := sorted(set(card) - {f.name for f in fields(cls)}):
            raise UserError(f"the set is trained with {unknown[0]!r}, which this version does not know; update it")
        crop: dict[str, Any] = {"crop": tuple(card["crop"])} if "crop" in card else {}
        return cls(**{**card, **crop})

    def overridden(self, section: EvaluateSection) -> TrainingProtocol:
        """This protocol with the values that the configuration sets.

        Raises UserError if the configuration changes the batch that the labels of views were made for.
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
    """The images and labels that a student is trained on.

    Attributes:
        images: [n, *shape], float32 and normalised, or uint8 with their `normalization`.
        labels: int64 [n].
        soft: for `labels: soft`: "soft_labels" [n, classes], logits whose softmax at the temperature is the target.
        views: for `labels: views`: the labels of the views.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None
    soft: Mapping[str, Tensor] = field(default_factory=dict)
    views: StoredLabels | TeacherLabels | None = None

    def normalized(self, rows: Tensor) -> Tensor:
        images = self.images[rows.to(self.images.device)]
        return images if self.normalization is None else self.normalization.apply(images)


def train(
    spec: NetworkSpec, data: TrainingSet, protocol: TrainingProtocol, seed: int, device: torch.device,
    precision: str = "fp32", progressed: Progressed = lambda percent: None, infobatch: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Train a network from scratch; the whole set is held on the device, the weights are float32 in any `precision`.

    `progressed` takes per cent. `infobatch` is the r of `pruning/infobatch.py`, for hard labels; batches that CutMix mixes are
    rescaled, and their losses are not remembered.
    """
    network = spec.build(rng.derive(seed, "network")).to(device).train()
    parameters = list(network.parameters())
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if protocol.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, protocol.lr, weight_decay=protocol.weight_decay, fused=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs)
    else:
        optimizer = torch.optim.SGD(
            parameters, protocol.lr, protocol.momentum, weight_decay=protocol.weight_decay, fused=True
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [protocol.epochs // 2 + 1], gamma=0.1)
    soft = {key: value.to(device) for key, value in data.soft.items()}
    data = replace(data, images=data.images.to(device), labels=data.labels.to(device), soft=soft)
    has_batch_norm, batch = mixes_samples(network), min(protocol.batch, len(data.labels))
    if has_batch_norm and batch < SMALL_BATCH:
        warnings.warn(
            f"the network {spec.name} has batch norm, whose statistics over batches of {batch} images are poor (a last batch "
            "of one image is merged into the one before); a network without batch norm is safer",
            RunWarning,
            stacklevel=2,
        )
    at_once = len(data.labels) if has_batch_norm else spec.microbatch(device)
    total = protocol.epochs * len(data.labels)
    rule = InfoBatch(infobatch, len(data.labels), protocol.epochs, seed, device)
    for epoch in range(protocol.epochs):
        seen, kept = epoch * len(data.labels), rule.start(epoch)
        if protocol.labels == "views":
            batches = view_batches(data, protocol, epoch)
        else:
            batches = epoch_batches(data, protocol, rng.generator(seed, "epoch", epoch), has_batch_norm, kept=kept)
        for images, weighted in batches:
            optimizer.zero_grad()
            for part, targets in _parts(images, weighted, at_once):
                with autocast(precision, device):
                    logits = network(part)
                (_loss(protocol, logits.float(), targets, rule) * (len(part) / len(images))).backward()
            optimizer.step()
            seen += len(images)
            progressed(100 * seen // total)
        scheduler.step()
    return network


def epoch_batches(
    data: TrainingSet, protocol: TrainingProtocol, generator: torch.Generator, merge: bool, shuffle: bool = True,
    kept: Tensor | None = None,
) -> Iterator[tuple[Tensor, WeightedTargets]]:  # fmt: skip
    """An epoch's augmented images with their targets; `merge`: avoid a last batch of one image. `kept` bool [n]: of these.

    With `protocol.crop` every image is cropped, and mirrored with the crop if `augment` has flip; the other families follow.
    """

    def targets(rows: Tensor) -> Tensor:
        if protocol.labels == "soft":
            return (data.soft["soft_labels"][rows] / protocol.temperature).softmax(1)
        return data.labels[rows]

    augmentation, crop, mirror = Augmentation(protocol.augment), protocol.crop, False
    if crop is not None:
        mirror = "flip" in augmentation.families
        augmentation.families = tuple(name for name in augmentation.families if name != "flip")
    order = torch.randperm(len(data.labels), generator=generator) if shuffle else torch.arange(len(data.labels))
    batches = (order if kept is None else order[kept[order]]).split(protocol.batch)
    for rows in merge_last_batch(batches) if merge else batches:
        rows = rows.to(data.images.device)
        images = data.normalized(rows)
        if crop is not None:
            boxes = resized_crop_boxes(torch.rand(len(rows), 4, generator=generator), *crop)
            images = crop_and_flip(images, boxes, torch.rand(len(rows), generator=generator) < FLIP * mirror)
        images = augmentation.draw(generator, per_image=len(rows)).apply(images)
        weighted = [(1.0, targets(rows), rows)]
        if protocol.cutmix and len(rows) > 1 and float(torch.rand(1, generator=generator)) < protocol.cutmix:
            mixed = cutmix(images, generator)
            images, others = mixed.images, rows[mixed.order]
            weighted = [(mixed.share, targets(rows), rows), (1 - mixed.share, targets(others), others)]
        yield images, weighted


def view_batches(data: TrainingSet, protocol: TrainingProtocol, epoch: int) -> Iterator[tuple[Tensor, WeightedTargets]]:
    """An epoch's views with the teacher's labels for exactly these views."""
    assert data.views is not None
    epoch = epoch % data.views.epochs
    for batch in protocol.plan.batches(epoch, len(data.labels)):
        views = batch.apply(data.normalized(batch.rows))
        targets = (data.views.logits(epoch, batch, views) / protocol.temperature).log_softmax(1)
        yield views, [(1.0, targets, batch.rows)]


def _parts(images: Tensor, weighted: WeightedTargets, at_once: int) -> Iterator[tuple[Tensor, WeightedTargets]]:
    """A batch in parts of at most `at_once` images and of at most two sizes."""
    count = -(-len(images) // at_once)
    targets = [zip(t.tensor_split(count), rows.tensor_split(count), strict=True) for _, t, rows in weighted]
    for part, *its_targets in zip(images.tensor_split(count), *targets, strict=True):
        yield part, [(share, *own) for (share, *_), own in zip(weighted, its_targets, strict=True)]


def _loss(protocol: TrainingProtocol, logits: Tensor, weighted: WeightedTargets, rule: InfoBatch) -> Tensor:
    if protocol.labels == "views":
        log_probabilities = (logits / protocol.temperature).log_softmax(1)
        divergence = F.kl_div(log_probabilities, weighted[0][1], reduction="batchmean", log_target=True)
        return divergence * protocol.temperature**2
    losses = [(w, rule.cross_entropy(logits, t, rows, remember=len(weighted) == 1)) for w, t, rows in weighted]
    return torch.stack([weight * loss for weight, loss in losses]).sum()


@dataclass(frozen=True)
class TopKAccuracy:
    """Fractions of the tested images that are right; `per_class` is top-1, None for a class without test images."""

    top1: float
    top5: float
    per_class: list[float | None]


@torch.no_grad()
def test(
    network: nn.Module, pixels: Tensor, labels: Tensor, normalization: Normalization, device: torch.device, at_once: int,
    precision: str = "fp32",  # noqa: PT028
) -> TopKAccuracy:  # fmt: skip
    """Accuracy on stored pixels [n, *shape], `at_once` images per forward pass."""
    network.eval()
    classes, top5_hits, hits = 0, 0, torch.zeros(len(labels), dtype=torch.bool)
    for first in range(0, len(labels), at_once):
        with autocast(precision, device):
            logits = network(normalization.apply(pixels[first : first + at_once].to(device))).float()
        targets = labels[first : first + at_once].to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits[first : first + at_once] = (best[:, 0] == targets).cpu()
        top5_hits += int((best == targets[:, None]).any(1).sum())
        classes = logits.shape[1]
    labels = labels.cpu()
    tested, right = (torch.bincount(rows, minlength=classes).tolist() for rows in (labels, labels[hits]))
    per_class = [round(r / t, 6) if t else None for r, t in zip(right, tested, strict=True)]
    return TopKAccuracy(int(hits.sum()) / len(labels), top5_hits / len(labels), per_class)

"""Soft labels of views (FKD, Shen & Xing 2022, arXiv 2112.01528): a teacher's answer to every view that a student will see.

An epoch shows every image once, as a random resized crop, perhaps flipped, and cut and mixed with others of its batch. All
of that follows from (seed, epoch) alone and is not stored. Stored are the teacher's logits as 16-bit floats, on request
only the `top_k` largest with their classes: logits are kept relative to the level t of the rest, exp(t / T) = mean of
exp(logit / T) over it, so that classes that are not stored count as 0. The probabilities of the stored classes at
temperature T then are the teacher's, and what is left is spread evenly over the others.

Left out: how a teacher is trained (backends/teachers.py), and the training of students (students.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.collectives import Collectives
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation.augment import Mixed, cutmix
from distill_at_scale.models.spec import NetworkSpec, in_parts, is_plug_in

TEACHER = "teacher.safetensors"  # in the folder of a method's networks
WIDEST = math.log(4 / 3)  # of the logarithm of a crop's ratio of sides
FEW_CLASSES = 2**15  # whose numbers fit into 16 bits

Stored = tuple[Tensor, Tensor | None]  # values float16 [..., k] and their classes, or None for all in order


def boxes_of(numbers: Tensor, smallest: float) -> Tensor:
    """Uniform numbers [n, 4] -> random resized crops (top, left, height, width) [n, 4], as shares of the sides.

    The area is uniform in [smallest, 1]; the logarithm of the ratio of sides is uniform in +-log(4 / 3), less where the
    crop would not fit.
    """
    area = smallest + numbers[:, 0] * (1 - smallest)
    ratio = ((2 * numbers[:, 1] - 1) * (-area.log()).clamp(0, WIDEST)).exp()
    height, width = (area / ratio).sqrt(), (area * ratio).sqrt()
    return torch.stack([numbers[:, 2] * (1 - height), numbers[:, 3] * (1 - width), height, width], 1)


def shown(images: Tensor, boxes: Tensor, flipped: Tensor | None = None) -> Tensor:
    """Crops of images [n, C, H, W], or clips [n, T, C, H, W], enlarged to their size; mirrored where `flipped` [n] is set.

    Differentiable in the images.
    """
    if images.dim() == 5:
        each = [None if x is None else x.repeat_interleave(images.shape[1], 0) for x in (boxes, flipped)]
        return shown(images.flatten(0, 1), each[0], each[1]).view(images.shape)  # type: ignore[arg-type]
    top, left, height, width = boxes.to(images.device).unbind(1)
    turned = width if flipped is None else torch.where(flipped.to(images.device), -width, width)
    zero = torch.zeros_like(top)
    theta = torch.stack([turned, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class ViewBatch:
    """Images of one batch, by their rows, and what is shown of them; `first` is its place within the epoch."""

    first: int
    rows: Tensor
    boxes: Tensor
    flipped: Tensor | None
    mixing: int | None  # the seed of cutting and mixing; None: the views stay whole

    def apply(self, images: Tensor) -> Tensor:
        """The views of normalised images [n, *shape], those of `rows`."""
        views = shown(images, self.boxes, self.flipped)
        return views if self.mixing is None else self._mixed(views).images

    def _mixed(self, views: Tensor) -> Mixed:
        return cutmix(views, torch.Generator().manual_seed(int(self.mixing or 0)))


@dataclass(frozen=True)
class ViewPlan:
    """Which views every epoch shows, and in what batches."""

    seed: int
    batch: int
    smallest: float  # share of an image in a view
    flip: bool
    cutmix: float  # share of batches

    def batches(self, epoch: int, count: int) -> Iterator[ViewBatch]:
        """All views of an epoch of `count` images; a last batch of one image is merged into the one before."""
        draw = rng.generator(self.seed, "views", epoch)
        boxes, flipped = boxes_of(torch.rand(count, 4, generator=draw), self.smallest), None
        if self.flip:
            flipped = torch.rand(count, generator=draw) < 0.5
        first = 0
        for number, rows in enumerate(merged(torch.randperm(count, generator=draw).split(self.batch))):
            mixes = len(rows) > 1 and float(torch.rand(1, generator=draw)) < self.cutmix
            mixing = rng.derive(self.seed, "cutmix", epoch, number) if mixes else None
            yield ViewBatch(first, rows, boxes[rows], None if flipped is None else flipped[rows], mixing)
            first += len(rows)


def merged(batches: tuple[Tensor, ...]) -> list[Tensor]:
    """Batches of rows; a last one of one row, of which batch norm can make nothing, is merged into the one before."""
    if len(batches) > 1 and len(batches[-1]) == 1:
        return [*batches[:-2], torch.cat(batches[-2:])]
    return list(batches)


def compact(logits: Tensor, top_k: int | None, temperature: float) -> Stored:
    """Logits [n, classes] as they are stored: values float16 [n, k], and classes int16 [n, k] (int32 of very many)."""
    count = logits.shape[1]
    if top_k is None or top_k >= count:
        return (logits - logits.mean(1, keepdim=True)).half(), None
    values, classes = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, classes, -math.inf) / temperature
    level = temperature * (rest.logsumexp(1, keepdim=True) - math.log(count - top_k))
    return (values - level).half(), classes.to(torch.int16 if count <= FEW_CLASSES else torch.int32)


def expand(stored: Stored, count: int) -> Tensor:
    """What `compact` made -> logits float32 [n, classes], relative to those of the classes that are not stored."""
    values, classes = stored
    if classes is None:
        return values.float()
    return torch.zeros(len(values), count, device=values.device).scatter(1, classes.long(), values.float())


class Labels(Protocol):
    @property
    def epochs(self) -> int:
        """Of views that have labels; later epochs begin again with the first."""

    def of(self, epoch: int, batch: ViewBatch, views: Tensor) -> Tensor:
        """Logits float32 [n, classes] whose softmax at the temperature is the target of the views [n, *shape]."""


@dataclass(frozen=True)
class StoredLabels:
    """The labels of a set, values [epochs, n, k], by their places within the epochs."""

    values: Tensor
    classes: Tensor | None
    count: int  # of classes

    @property
    def epochs(self) -> int:
        return len(self.values)

    def of(self, epoch: int, batch: ViewBatch, views: Tensor) -> Tensor:
        place = epoch, slice(batch.first, batch.first + len(batch.rows))
        classes = None if self.classes is None else self.classes[place].to(views.device)
        return expand((self.values[place].to(views.device), classes), self.count)

    @classmethod
    def of_tensors(cls, held: Mapping[str, Tensor], count: int) -> StoredLabels:
        return cls(held["values"], held.get("classes"), count)


@dataclass(frozen=True)
class TeacherFacts:
    """Everything about a teacher but its weights; goes into cards.

    It sees images that are normalised as the data is, and turns them into what its weights expect: x * scale + shift per
    channel. `columns` are the data's classes among its `outputs`, None for all.
    """

    network: str
    shape: tuple[int, ...]
    outputs: int
    width: int
    depth: int | None
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    columns: tuple[int, ...] | None = None
    origin: str = "trained on the kept samples"

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> TeacherFacts:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card.items()}
        return cls(**values)

    def trusted(self, network: str | None) -> TeacherFacts:
        """These facts, which an artefact said; `network` is the teacher's name in the configuration, if there is one.

        Raises UserError where the artefact names code (`package.module:Object`) that the configuration does not name.
        """
        if is_plug_in(self.network) and self.network != network:
            raise UserError(
                f"the artefact's teacher is code of somebody ({self.network!r}), which nothing but your own configuration or "
                "call may name; name that network there if you trust it"
            )
        return self

    @property
    def spec(self) -> NetworkSpec:
        return NetworkSpec(self.network, self.shape, self.outputs, self.width, self.depth)

    @property
    def classes(self) -> int:
        return self.outputs if self.columns is None else len(self.columns)


class Teacher(nn.Module):
    """Normalised images [n, *shape] -> logits float32 [n, classes]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, facts: TeacherFacts, network: nn.Module):
        super().__init__()
        self.facts, self.network = facts, network
        self.columns = None if facts.columns is None else list(facts.columns)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.tensor(getattr(facts, name)).view(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, facts: TeacherFacts, state: Mapping[str, Tensor], device: torch.device) -> Teacher:
        """From a state dict of its network; in evaluation mode and without gradients of the weights."""
        network = facts.spec.build(0)
        network.load_state_dict(state)
        return cls(facts, network).to(device).eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, device: torch.device, network: str | None = None) -> Teacher:
        """Raises UserError where the file is not whole, or names code; `network` is as in `TeacherFacts.trusted`."""
        try:
            with safe_open(path, "pt") as handle:
                facts = TeacherFacts.of(json.loads(handle.metadata()["teacher"]))
            return cls.of(facts.trusted(network), safetensors_io.load(path), device)
        except Exception as error:
            raise UserError(f"the teacher {path} cannot be read ({error}); remove it to train it again") from None

    def save(self, path: Path) -> None:
        safetensors_io.save(path, self.network.state_dict(), {"teacher": json.dumps(asdict(self.facts))})

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images * self.scale + self.shift)
        return logits if self.columns is None else logits[:, self.columns]

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Logits of any number of images, some at a time."""
        return in_parts(self, images, self.facts.spec.at_once(images.device))


@dataclass(frozen=True)
class TeacherLabels:
    """Labels that are not stored but asked of the teacher, and rounded as stored ones are: for controls."""

    teacher: Teacher
    epochs: int
    top_k: int | None
    temperature: float

    def of(self, epoch: int, batch: ViewBatch, views: Tensor) -> Tensor:
        return expand(compact(self.teacher.answers(views), self.top_k, self.temperature), self.teacher.facts.classes)


def relabel(images: Tensor, plan: ViewPlan, asked: TeacherLabels, workers: Collectives) -> dict[str, Tensor]:
    """The labels of a whole set [n, *shape], `StoredLabels` by name, on rank 0 alone; elsewhere empty.

    Workers take the epochs in turn and hand each over as it is made, so that only rank 0 holds them all.
    """
    made: list[Stored] = []
    for first in range(0, asked.epochs, workers.size):
        epoch = first + workers.rank
        own = _labels_of(images, plan, asked, epoch) if epoch < asked.epochs else None
        found = workers.gather(own)
        if workers.rank == 0:
            made += [stored for stored in found if stored is not None]
    if not made:
        return {}
    labels = {"values": torch.stack([values for values, _ in made])}
    if made[0][1] is not None:
        labels["classes"] = torch.stack([classes for _, classes in made if classes is not None])
    return labels


def _labels_of(images: Tensor, plan: ViewPlan, asked: TeacherLabels, epoch: int) -> Stored:
    device, parts = asked.teacher.scale.device, []
    for batch in plan.batches(epoch, len(images)):
        views = batch.apply(images[batch.rows.to(images.device)].to(device))
        parts.append(compact(asked.teacher.answers(views), asked.top_k, asked.temperature))
    values = torch.cat([values for values, _ in parts]).cpu()
    return values, None if parts[0][1] is None else torch.cat([c for _, c in parts if c is not None]).cpu()


def size_of(labels: Mapping[str, Tensor]) -> int:
    """Bytes of the labels."""
    return sum(tensor.numel() * tensor.element_size() for tensor in labels.values())


def converted(facts: TeacherFacts, own: Any, expected: Any) -> TeacherFacts:
    """For weights that expect a normalisation (mean, std) per channel other than the data's own."""
    (mean, std), (theirs, spread) = own, expected
    scale = tuple(s / t for s, t in zip(std, spread, strict=True))
    shift = tuple((m - n) / t for m, n, t in zip(mean, theirs, spread, strict=True))
    return replace(facts, scale=scale, shift=shift)

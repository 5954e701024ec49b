"""Soft labels of views (FKD, Shen & Xing 2022, arXiv 2112.01528): a teacher's logits for every view that a student sees.

Views follow from (seed, epoch) alone and are not stored (`distillation/README.md`, "Soft labels").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.atomic_files import set_aside
from distill_at_scale.core.collectives import Collectives
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation.augment import cutmix
from distill_at_scale.models.spec import NetworkSpec, in_parts, is_plug_in

TEACHER = "teacher.safetensors"  # in the folder of a method's networks
MAX_LOG_RATIO = math.log(4 / 3)  # of a crop's width to its height
INT16_CLASSES = 2**15  # class numbers up to this many fit into 16 bits

CompactLogits = tuple[Tensor, Tensor | None]  # float16 values [..., k] and their classes; None: all classes in order


def resized_crop_boxes(numbers: Tensor, min_area: float, max_area: float = 1.0) -> Tensor:
    """Uniform numbers [n, 4] -> random resized crops (top, left, height, width) [n, 4], as shares of the sides.

    The area is uniform in [min_area, max_area], the log of the aspect ratio in +-log(4 / 3), less if the crop would not fit.
    """
    area = min_area + numbers[:, 0] * (max_area - min_area)
    ratio = ((2 * numbers[:, 1] - 1) * (-area.log()).clamp(0, MAX_LOG_RATIO)).exp()
    height, width = (area / ratio).sqrt(), (area * ratio).sqrt()
    return torch.stack([numbers[:, 2] * (1 - height), numbers[:, 3] * (1 - width), height, width], 1)


def crop_and_flip(images: Tensor, boxes: Tensor, flipped: Tensor | None = None) -> Tensor:
    """Crops of images [n, C, H, W] or clips [n, T, C, H, W], resized to [H, W]; mirrored where `flipped` bool [n] is set.

    Differentiable in the images.
    """
    if images.dim() == 5:
        per_frame = [None if x is None else x.repeat_interleave(images.shape[1], 0) for x in (boxes, flipped)]
        return crop_and_flip(images.flatten(0, 1), per_frame[0], per_frame[1]).view(images.shape)  # type: ignore[arg-type]
    top, left, height, width = boxes.to(images.device).unbind(1)
    x_scale = width if flipped is None else torch.where(flipped.to(images.device), -width, width)
    zero = torch.zeros_like(top)
    theta = torch.stack([x_scale, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class ViewBatch:
    """One batch of an epoch: the rows of its images, their views, and the number of views before it."""

    first: int
    rows: Tensor
    boxes: Tensor
    flipped: Tensor | None
    cutmix_seed: int | None  # None: no CutMix

    def apply(self, images: Tensor) -> Tensor:
        """The views of normalised images [n, *shape], those of `rows`."""
        views = crop_and_flip(images, self.boxes, self.flipped)
        if self.cutmix_seed is None:
            return views
        return cutmix(views, torch.Generator().manual_seed(self.cutmix_seed)).images


@dataclass(frozen=True)
class ViewPlan:
    """The batches and views of every epoch."""

    seed: int
    batch: int
    min_area: float  # share of an image in a view
    flip: bool
    cutmix: float  # share of batches

    def batches(self, epoch: int, count: int) -> Iterator[ViewBatch]:
        """All views of an epoch of `count` images."""
        draw = rng.generator(self.seed, "views", epoch)
        boxes, flipped = resized_crop_boxes(torch.rand(count, 4, generator=draw), self.min_area), None
        if self.flip:
            flipped = torch.rand(count, generator=draw) < 0.5
        first = 0
        for number, rows in enumerate(merge_last_batch(torch.randperm(count, generator=draw).split(self.batch))):
            mixes = len(rows) > 1 and float(torch.rand(1, generator=draw)) < self.cutmix
            seed = rng.derive(self.seed, "cutmix", epoch, number) if mixes else None
            yield ViewBatch(first, rows, boxes[rows], None if flipped is None else flipped[rows], seed)
            first += len(rows)


def merge_last_batch(batches: tuple[Tensor, ...]) -> list[Tensor]:
    """Batches of rows; a last batch of one row is merged into the one before, as batch norm needs two."""
    is_single = len(batches) > 1 and len(batches[-1]) == 1
    return [*batches[:-2], torch.cat(batches[-2:])] if is_single else list(batches)


def compact(logits: Tensor, top_k: int | None, temperature: float) -> CompactLogits:
    """Logits [n, classes] in their stored form: all classes, or the `top_k` largest with their class numbers.

    The top-k values are relative to the level t of the other classes, exp(t / T) = mean of exp(logit / T), so that a class
    that is not stored counts as 0: at temperature T the stored classes keep the teacher's probabilities, and the rest is spread
    evenly over the others.
    """
    count = logits.shape[1]
    if top_k is None or top_k >= count:
        return (logits - logits.mean(1, keepdim=True)).half(), None
    values, classes = logits.topk(top_k, dim=1)
    others = logits.scatter(1, classes, -math.inf) / temperature
    level = temperature * (others.logsumexp(1, keepdim=True) - math.log(count - top_k))
    return (values - level).half(), classes.to(torch.int16 if count <= INT16_CLASSES else torch.int32)


def expand(stored: CompactLogits, count: int) -> Tensor:
    """The output of `compact` -> logits float32 [n, classes]; classes that are not stored are 0."""
    values, classes = stored
    if classes is None:
        return values.float()
    return torch.zeros(len(values), count, device=values.device).scatter(1, classes.long(), values.float())


@dataclass(frozen=True)
class StoredLabels:
    """The labels in the folder of a set: one file per epoch, with values [n, k] and their classes in the order of the views.

    They are read as they are needed, so that no process holds those of all epochs.
    """

    folder: Path
    epochs: int
    class_count: int

    def file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def logits(self, epoch: int, batch: ViewBatch, views: Tensor) -> Tensor:
        """float32 [n, classes] for views [n, *shape]; the target is their softmax at the temperature."""
        last = batch.first + len(batch.rows)
        with safe_open(self.file(epoch), framework="pt") as file:
            names = ["values", "classes"] if "classes" in file.keys() else ["values"]  # noqa: SIM118
            parts = [file.get_slice(name)[batch.first : last].to(views.device) for name in names]
        return expand((parts[0], parts[1] if len(parts) > 1 else None), self.class_count)

    def problem(self, count: int) -> str | None:
        """What is wrong with the files, for a set of `count` images; None if each epoch has labels for all of them."""
        for epoch in range(self.epochs):
            path = self.file(epoch)
            try:
                with safe_open(path, framework="pt") as file:
                    shape = file.get_slice("values").get_shape()
            except Exception as error:  # missing, cut short, or other tensors
                return f"{path} cannot be read ({str(error).splitlines()[0]})"
            if shape[:1] != [count]:
                return f"{path} has labels for {shape[0]} views, not {count}"
        return None


@dataclass(frozen=True)
class TeacherFacts:
    """Everything about a teacher except its weights; saved in cards.

    The teacher takes images in the data's normalisation and converts them to that of its weights: x * scale + shift per
    channel. `columns` are the data's classes among its `outputs`; None: all.
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
    def from_card(cls, card: Mapping[str, Any]) -> TeacherFacts:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card.items()}
        return cls(**values)

    def trusted(self, network: str | None) -> TeacherFacts:
        """These facts, read from an artefact; `network` is the teacher's name in the configuration.

        Raises UserError if the artefact names code (`package.module:Object`) that the configuration does not name.
        """
        if is_plug_in(self.network) and self.network != network:
            raise UserError(
                f"the artefact's teacher is custom code ({self.network!r}), which only your own configuration or call may "
                "name; name that network there if you trust it"
            )
        return self

    @property
    def spec(self) -> NetworkSpec:
        return NetworkSpec(self.network, self.shape, self.outputs, self.width, self.depth)


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
    def from_state(cls, facts: TeacherFacts, state: Mapping[str, Tensor], device: torch.device) -> Teacher:
        """From a state dict of its network; in evaluation mode, with frozen weights."""
        network = facts.spec.build(0)
        network.load_state_dict(state)
        return cls(facts, network).to(device).eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, device: torch.device, network: str | None = None) -> Teacher:
        """Raises UserError if the file is damaged or names untrusted code; `network` as in `TeacherFacts.trusted`."""

        def damaged(error: Exception) -> UserError:
            return UserError(f"the teacher {path} cannot be read ({error}); {set_aside(path)}")

        try:
            facts = TeacherFacts.from_card(json.loads(safetensors_io.metadata(path)["teacher"]))
        except Exception as error:
            raise damaged(error) from None
        facts.trusted(network)
        try:
            return cls.from_state(facts, safetensors_io.load(path), device)
        except Exception as error:
            raise damaged(error) from None

    def save(self, path: Path) -> None:
        safetensors_io.save(path, self.network.state_dict(), {"teacher": json.dumps(asdict(self.facts))})

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images * self.scale + self.shift)
        return logits if self.columns is None else logits[:, self.columns]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The logits of any number of images, a microbatch at a time."""
        return in_parts(self, images, self.facts.spec.microbatch(images.device))


@dataclass(frozen=True)
class TeacherLabels:
    """The same as StoredLabels, computed by the teacher when needed and rounded like stored ones."""

    teacher: Teacher
    epochs: int
    top_k: int | None
    temperature: float

    def compact_logits(self, views: Tensor) -> CompactLogits:
        return compact(self.teacher.logits(views), self.top_k, self.temperature)

    def logits(self, epoch: int, batch: ViewBatch, views: Tensor) -> Tensor:
        facts = self.teacher.facts
        return expand(self.compact_logits(views), facts.outputs if facts.columns is None else len(facts.columns))


def relabel(images: Tensor, plan: ViewPlan, labels: TeacherLabels, workers: Collectives, folder: Path) -> int:
    """Write the labels of a whole set [n, *shape] to a folder of rank 0, as `StoredLabels` reads them; returns their bytes.

    Workers take the epochs in turn and send each one when it is done, so that rank 0 holds one epoch per worker. Epochs whose
    file exists are not labelled again.
    """
    device, stored = labels.teacher.scale.device, StoredLabels(folder, labels.epochs, 0)
    missing = workers.broadcast([epoch for epoch in range(labels.epochs) if not stored.file(epoch).exists()])
    for first in range(0, len(missing), workers.size):
        own = None
        if first + workers.rank < len(missing):
            epoch = missing[first + workers.rank]
            batches = plan.batches(epoch, len(images))
            views = (batch.apply(images[batch.rows.to(images.device)].to(device)) for batch in batches)
            tensors = zip(("values", "classes"), zip(*map(labels.compact_logits, views), strict=True), strict=True)
            own = epoch, {name: torch.cat(parts).cpu() for name, parts in tensors if parts[0] is not None}
        gathered = workers.gather(own)
        for done, part in [one for one in gathered if one is not None] if workers.rank == 0 else []:
            safetensors_io.save(stored.file(done), part)
    if workers.rank:
        return 0
    first_epoch = safetensors_io.load(stored.file(0))
    return labels.epochs * sum(tensor.numel() * tensor.element_size() for tensor in first_epoch.values())


def with_normalization(facts: TeacherFacts, own: Any, expected: Any) -> TeacherFacts:
    """Facts of weights that expect another normalisation (mean, std) per channel than the data's own."""
    (mean, std), (expected_mean, expected_std) = own, expected
    scale = tuple(s / t for s, t in zip(std, expected_std, strict=True))
    shift = tuple((m - n) / t for m, n, t in zip(mean, expected_mean, expected_std, strict=True))
    return replace(facts, scale=scale, shift=shift)

"""SRe2L: squeeze, recover, relabel (Yin, Xing & Shen 2023, arXiv 2306.13092; see `distillation/README.md`).

A step is one Adam update of all own images. They pass the teacher in batches that mix classes: the j-th images of the own
classes follow each other in an order drawn for each j. What is drawn for an image does not depend on the number of
workers, but a batch holds classes of one worker only, so with more workers the images are similar but not equal.

With `class_statistics` (LPLD, Xiao & He 2024, arXiv 2410.15919) each class is recovered alone, against the statistics of its
own kept images in the teacher. Then the images are equal for any number of workers.

Options of later recoveries: `crop_schedule: cosine` (CDA, Yin & Shen 2023, arXiv 2311.18838); `init: patches` and `blocks`
with `residual` and `block_sizes` (FADRM, Cui et al. 2025, arXiv 2506.24125).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import SRe2LSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest.sample_types import sample_shape
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.base import ImageMethod
from distill_at_scale.distillation.methods.contract import Cost, MethodContext
from distill_at_scale.distillation.methods.shared.teacher import TeacherMethod
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, crop_and_flip, resized_crop_boxes
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec

PATCHES, PATCH_SCALE = (
    300,
    0.5,
)  # real images per class that patches are taken from, and the smallest share that one shows
FIRST_LAYER = 10.0  # weight of the first batch norm's statistics, with class statistics (the official code's)


class SRe2L(TeacherMethod, ImageMethod):
    default_steps: ClassVar[int] = 4000
    no_runtime: ClassVar[str] = "sre2l matches the statistics that a teacher has remembered, so there is no real batch"
    teacher_needs_batch_norm: ClassVar[bool] = True
    section_name: ClassVar[str] = "sre2l"
    options: SRe2LSection

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        own = [Cost("statistics of the classes", cls.section(config).teacher_network, "kept", 1, backward=False)]
        return [*super().costs(config), *(own if cls.section(config).class_statistics else [])]

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """Raises UserError, besides the reasons of a teacher, if the teacher cannot take images of `block_sizes`."""
        protocol, section = super().protocol(config), cls.section(config)
        if not section.block_sizes:
            return protocol
        shape = sample_shape(config.data)
        teacher = NetworkSpec(section.teacher_network, shape, 10, config.distill.width, config.distill.depth).skeleton()
        for size in [shape[-1], *section.block_sizes]:
            try:
                teacher(torch.empty(2, *shape[:-2], size, size, device="meta"))
            except Exception as error:
                if size == shape[-1]:  # it cannot be tried without data
                    break
                raise UserError(
                    f"distill.sre2l.teacher_network = {section.teacher_network!r} takes no images of {size} pixels, which "
                    f"distill.sre2l.block_sizes names ({str(error).splitlines()[0]}); take a network with global pooling, such "
                    "as resnet18_bn, or leave block_sizes out"
                ) from None
        return protocol

    def __init__(self, context: MethodContext) -> None:
        self.options = self.section(context.config)
        super().__init__(context, self.options.init, self.options.image_lr, 0.0)
        self.flip = self.protocol(context.config).augment == "flip"

    def prepare(self, real: ClassSampler) -> None:
        context, options = self.context, self.options
        self.teacher = Teacher.load(context.networks / TEACHER, context.device, options.teacher_network)
        super().prepare(real)
        self.start = self.images.detach().clone() if options.blocks > 1 else None
        self._start_block(self.images.detach(), 0)
        first = self.options.first_layer
        if first is None:
            first = FIRST_LAYER if self.options.class_statistics else 1.0
        self.batch_norm_loss = BatchNormLoss(self.teacher, first)
        self.class_moments: dict[
            int, Tensor
        ] = {}  # by label, see `BatchNormLoss.moments`; the first step computes them
        pixel = (1, *context.spec.shape[:-2], 1, 1)
        black, white = torch.zeros(pixel), torch.ones(pixel)
        self.lowest, self.highest = (real.normalization.apply(255 * x).to(context.device) for x in (black, white))
        self.targets = torch.tensor(context.labels, device=context.device).repeat_interleave(self.ipc)
        order = []  # of the own images, flat
        for j in range(self.ipc):
            keys = {k: rng.derive(context.seed, "recovery order", j, label) for k, label in enumerate(context.labels)}
            order += [k * self.ipc + j for k in sorted(keys, key=keys.__getitem__)]
        if options.class_statistics:
            order = list(range(len(order)))
        parts = torch.tensor(order).split(self.ipc) if options.class_statistics else [torch.tensor(order)]
        self.batches = [rows for own in parts for rows in own.tensor_split(math.ceil(len(own) / options.recover_batch))]

    def step(self, i: int) -> dict[str, float]:
        """One update along the gradient of cross-entropy + `statistics` * batch norm loss, each averaged over a batch."""
        for label in self.context.labels if self.options.class_statistics else ():
            if label not in self.class_moments:
                self.class_moments[label] = self.batch_norm_loss.moments(self._real_images(label)).to(
                    self.context.device
                )
        block = self._block(i)
        if i and block != self._block(i - 1):
            images = self._resized(self.images.detach(), self.context.spec.shape[-1])
            assert self.start is not None
            self._start_block(self.options.residual * images + (1 - self.options.residual) * self.start, block)
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * i / self.context.steps)) / 2
        boxes, flipped = self._views(i)
        syn = self.images.detach().flatten(0, 1)
        gradient, losses, statistics = torch.zeros_like(syn), torch.zeros(len(syn), device=syn.device), 0.0
        for rows in self.batches:
            batch = syn[rows].requires_grad_(True)
            with self.batch_norm_loss.against(self.class_moments.get(int(self.targets[rows[0]]))):
                logits = self.teacher(crop_and_flip(batch, boxes[rows], None if flipped is None else flipped[rows]))
                distance = self.batch_norm_loss.value()
            entropy = F.cross_entropy(logits, self.targets[rows], reduction="none")
            (entropy.mean() + self.options.statistics * distance).backward()
            gradient[rows] = batch.grad  # type: ignore[assignment]
            losses[rows] = entropy.detach() + self.options.statistics * distance.detach()
            statistics += float(distance.detach()) * len(rows) / len(syn)
        self.images.grad = gradient.view_as(self.images)
        class_losses = losses.view(-1, self.ipc).mean(1)
        self.update(list(class_losses), i)
        self.raise_if_diverged()
        with torch.no_grad():
            self.images.clamp_(self.lowest, self.highest)
        return {"loss": float(class_losses.mean()), "statistics": statistics}

    def _views(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Crops [own images, 4] and flips [own images] of a step; those of a class depend on (seed, step, class) only."""
        draws = [rng.generator(self.context.seed, "recovery view", step, label) for label in self.context.labels]
        numbers = torch.cat([torch.rand(self.ipc, 5, generator=draw) for draw in draws])
        smallest = self.options.recover_scale
        if self.options.crop_schedule == "cosine":
            smallest += (1 - smallest) * (1 + math.cos(math.pi * step / self.context.steps)) / 2
        return resized_crop_boxes(numbers, smallest), numbers[:, 4] < 0.5 if self.flip else None

    def _block(self, step: int) -> int:
        return step * self.options.blocks // self.context.steps

    def _start_block(self, images: Tensor, block: int) -> None:
        """Learn the images [own classes, ipc, *shape] in the size of a block, with a new optimizer."""
        sizes = self.options.block_sizes or [self.context.spec.shape[-1]]
        self.images = self._resized(images, sizes[block % len(sizes)]).requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.images], self.lr, (self.options.beta1, self.options.beta2))

    def _resized(self, images: Tensor, size: int) -> Tensor:
        """Images of any size [..., channels, height, width] in a square of `size` pixels; the same if they have it."""
        if images.shape[-1] == size:
            return images
        flat = images.flatten(0, -4)
        resized = F.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return resized.view(*images.shape[:-2], size, size)

    def real_images(self, label: int) -> Tensor:
        """With `init: patches`, one random crop each of up to PATCHES kept images; those whose loss is in the middle."""
        if self.init != "patches":
            return super().real_images(label)
        images = self.real.draw([label], PATCHES, "patches")[0].images
        numbers = torch.rand(len(images), 4, generator=rng.generator(self.context.seed, "patch crops", label))
        patches = crop_and_flip(images, resized_crop_boxes(numbers, PATCH_SCALE))
        targets = torch.full((len(patches),), label, device=patches.device)
        losses = F.cross_entropy(self.teacher.logits(patches), targets, reduction="none")
        middle = (len(losses) - self.ipc) // 2
        return patches[losses.argsort(stable=True)[middle : middle + self.ipc]]

    def snapshot(self) -> tuple[Tensor, Tensor]:
        images, labels = super().snapshot()
        return self._resized(images, self.context.spec.shape[-1]), labels

    def _real_images(self, label: int) -> Iterable[Tensor]:
        """The kept images of a class, normalised [n, *shape], in parts that the teacher takes at one time."""
        device, count = self.context.device, self.real.count(label)
        for rows in torch.arange(count).split(self.teacher.facts.spec.microbatch(device)):
            yield self.real.normalization.apply(self.real.placement.take(label, rows).to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {
            f"class moments/{label}": value.cpu() for label, value in self.class_moments.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        size = state[f"images/{self.context.labels[0]}"].shape[-1]
        if size != self.images.shape[-1]:  # of another block
            self.images = self._resized(self.images.detach(), size).requires_grad_(True)
            self.optimizer = torch.optim.Adam([self.images], self.lr, (self.options.beta1, self.options.beta2))
        super().load_state_dict(state)
        known = {label: state.get(f"class moments/{label}") for label in self.context.labels}
        self.class_moments = {
            label: value.to(self.context.device) for label, value in known.items() if value is not None
        }


class BatchNormLoss:
    """Within a `with` block, how far the inputs of a network's batch norms are from given statistics."""

    def __init__(self, network: nn.Module, first: float = 1.0):
        """`first` is the weight of the first batch norm; the others have weight 1."""
        self.network, self.first, self.recording = network, first, False
        self.terms, self.sums = list[Tensor](), dict[nn.Module, Tensor]()
        self.layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        for layer in self.layers:
            layer.register_forward_pre_hook(self._record)
        self.against(None)

    def against(self, moments: Tensor | None) -> BatchNormLoss:
        """Compare with `moments` [2, channels of all layers], the result of the method of this name; None: with the running
        statistics.
        """
        if moments is None:
            moments = torch.stack(
                [torch.cat([getattr(x, key) for x in self.layers]) for key in ("running_mean", "running_var")]
            )
        means, variances = (one.split([layer.num_features for layer in self.layers]) for one in moments)
        pairs = zip(means, variances, strict=True)
        self.targets: dict[nn.Module, tuple[Tensor, Tensor]] = dict(zip(self.layers, pairs, strict=True))
        return self

    @torch.no_grad()
    def moments(self, images: Iterable[Tensor]) -> Tensor:
        """Means and variances [2, channels of all layers] of what enters the batch norms, over all images, in parts
        [n, *shape]. Sums are in float64.
        """
        self.sums = {layer: torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in self.layers}
        for part in images:
            self.network(part)
        count, total, squares = torch.cat(list(self.sums.values()), dim=1)
        self.sums = {}
        return torch.stack([total / count, (squares / count - (total / count).square()).clamp(min=0)]).float()

    def __enter__(self) -> BatchNormLoss:
        self.terms, self.recording = [], True
        return self

    def __exit__(self, *_: object) -> None:
        self.terms, self.recording = [], False

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.recording and not self.sums:
            return
        channels = inputs[0].transpose(0, 1).flatten(1)  # C x all others
        if self.sums:
            sums = [channels.sum(1, dtype=torch.float64), channels.square().sum(1, dtype=torch.float64)]
            self.sums[layer] += torch.stack([torch.full_like(sums[0], channels.shape[1]), *sums]).cpu()
            return
        mean, variance = channels.mean(1), channels.var(1, correction=0)
        target_mean, target_variance = self.targets[layer]
        weight = self.first if layer is self.layers[0] else 1.0
        self.terms.append(weight * ((mean - target_mean).norm() + (variance - target_variance).norm()))

    def value(self) -> Tensor:
        """Weighted sum over the layers passed so far of |mean - target mean| + |variance - target variance|."""
        return torch.stack(self.terms).sum()

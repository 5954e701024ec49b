"""The core that DC, DSA and IDC share: one image update that pulls every class's gradient towards that of its real batch.

Classes go through the network in groups, so memory does not grow with their number, and each group's backward pass adds to
the gradient of the images. Within a group all classes share one forward and one backward pass (classwise.py) on a GPU, as
many as fit into BYTES; on a CPU only where a class has at most FEW images (measured on an EPYC core, ConvNet-3 at 32 x 32:
up to 1.5 times as fast at 1 image and 100 classes, equal at 4, slower from 8 on), else class by class in parts that stay
in the cache. A class whose images exceed BYTES under a second-order graph is taken in parts: the distance depends on the
mean gradient alone, so its derivative there, found once, pulls on each part.

RealBatch norm would mix the samples of a batch. As DC's authors do, a real batch of several classes first sets its statistics,
and then it stays in evaluation mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler, RealBatch
from distill_at_scale.distillation.augment import Augmentation, AugmentParams
from distill_at_scale.distillation.methods.base import ImageMethod, MethodContext
from distill_at_scale.distillation.methods.shared.class_gradients import class_gradients, supports_class_gradients
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    GradientDistance,
    of_single_class,
    real_gradient,
    sample_losses,
    synthetic_gradient,
)
from distill_at_scale.distillation.methods.shared.treatment_effect import gradient_effects
from distill_at_scale.models.spec import mixes_samples

BYTES = {"cpu": 2**30, "cuda": 2**32}  # that a group may take
FIRST_ORDER, SECOND_ORDER = 12, 40  # bytes of an image's graph, in those of its widest layer
COPIES = 4  # of a real batch at once: drawn, augmented, joined with those of the other classes
FEW = 2  # images per class up to which a CPU gains by taking classes together
NORM_BATCH, NORM_EACH = 256, 16  # real images that set batch norm's statistics: in all, and per class

View = Callable[[Tensor], Tensor]  # a class's images as they are stored -> as the network sees them


class MatchingMethod(ImageMethod):
    """Images with their optimiser, a metric between gradients, and `match`."""

    batch_norm: ClassVar[str] = "any"

    def __init__(
        self,
        context: MethodContext,
        init: str,
        lr: float,
        momentum: float,
        augment: str,
        real_batch: int,
        metric: GradientDistance,
    ) -> None:
        super().__init__(context, init, lr, momentum)
        self.augmentation, self.real_batch, self.metric = Augmentation(augment), real_batch, metric
        self.judged = metric  # by which the effects of real samples are found
        self.at_once = context.spec.at_once(context.device)
        size, room = context.spec.work(1), BYTES.get(context.device.type, BYTES["cuda"])
        on_cpu = context.device.type == "cpu"
        self.first = self.at_once if on_cpu else max(1, room // (FIRST_ORDER * size))
        self.second = max(1, room // (SECOND_ORDER * size))  # images under one second-order graph
        self.room = max(1, room // (COPIES * 4 * real_batch * math.prod(context.spec.shape)))  # classes' real batches
        self.used = self.drawn = 0  # real samples since the last step: those that counted, and all
        self.together: bool | None = None  # whether classes may be taken together; asked with the first network
        self.mixes = mixes_samples(context.spec.skeleton())
        if self.mixes:
            warnings.warn(_norm_message(context.spec.name), stacklevel=2)

    @property
    def shown(self) -> int:
        """How many images the network sees of a class."""
        return self.ipc

    def view(self, draw: AugmentParams, step: int, outer: int, label: int) -> View:
        """How a class's images are shown to the network in this update."""
        return draw.apply

    def match(self, network: nn.Module, step: int, outer: int, visit: int) -> float:
        """One image update; returns the sum of the own classes' distances. `visit` counts updates over all steps."""
        if self.together is None:
            spec = self.context.spec
            self.together = supports_class_gradients(network, spec.shape, spec.classes, self.context.device)
        self.images.grad = torch.zeros_like(self.images)
        distances: list[Tensor] = []
        for places in self._groups():
            labels = [self.context.labels[k] for k in places]
            draws = [self._draw(step, outer, label) for label in labels]
            views = [self.view(draw, step, outer, label) for draw, label in zip(draws, labels, strict=True)]
            batches = self._real(network, places, draws, views, (step, outer, visit))
            targets = self._real_gradients(network, batches, labels)
            own = self.images.detach()[places[0] : places[-1] + 1].requires_grad_(True)
            seen = torch.cat([view(images) for view, images in zip(views, own.unbind(), strict=True)])
            found, pull = self._pull(network, seen, labels, targets)
            self.images.grad[places[0] : places[-1] + 1] = torch.autograd.grad(seen, own, pull)[0]
            distances += found
        self.update(distances, step)
        return float(torch.stack(distances).sum())

    def _groups(self) -> Iterator[list[int]]:
        """Places of own classes whose synthetic images are matched together."""
        limit = min(self.second, self.first) if self.context.device.type == "cpu" else self.second
        return _chunks(len(self.images), min(self.room, self._number(self.shown, limit)))

    def _number(self, each: int, limit: int) -> int:
        """How many classes of so many images are taken together."""
        if not self.together or (self.context.device.type == "cpu" and each > FEW):
            return 1
        return max(1, limit // each)

    def _draw(self, step: int, outer: int, label: int) -> AugmentParams:
        """The draw that the real and the synthetic images of a class share."""
        return self.augmentation.draw(generator(self.context.seed, "siamese", step, outer, label))

    def _real(
        self,
        network: nn.Module,
        places: Sequence[int],
        draws: Sequence[AugmentParams],
        views: Sequence[View],
        when: tuple[int, int, int],
    ) -> list[Tensor]:
        """The real batches after runtime pruning, as the network sees them; the one door of every rule."""
        step, outer, visit = when
        batches = [
            self.real.draw([self.context.labels[k]], self.real_batch, "real batch", step, outer)[0] for k in places
        ]
        masks = [self.pruning.forecast(b.label, b.rows, self.real.count(b.label), visit) for b in batches]
        images = [
            draw.apply(batch.images if mask is None else batch.images[mask.to(batch.images.device)])
            for draw, batch, mask in zip(draws, batches, masks, strict=True)
        ]
        looked = [k for k, b in enumerate(batches) if masks[k] is None and self.pruning.dropped(len(b.rows))]
        of_all = cache(lambda: self._losses(network, [batches[k] for k in looked], [images[k] for k in looked]))
        for place, k in enumerate(looked):
            batch, own = batches[k], self.images[places[k]].detach()
            effects = partial(self._effects, network, images[k], own, views[k], batch.label, step, outer)
            values = self.pruning.values(loss=partial(_item, of_all, place), ite=effects)
            kept = self.pruning.look(batch.label, batch.rows, self.real.count(batch.label), values)
            images[k] = images[k][kept.to(images[k].device)]
        self.used += sum(map(len, images))
        self.drawn += sum(len(batch.rows) for batch in batches)
        return images

    def metrics(self, total: float, updates: int) -> dict[str, float]:
        """Of a step: the mean distance of the own classes over its updates, and the share of the real batches that counted."""
        share = self.used / max(1, self.drawn)
        self.used = self.drawn = 0
        return {"loss": total / (updates * len(self.context.labels)), "real_share": share}

    def _losses(self, network: nn.Module, batches: Sequence[RealBatch], images: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cross-entropy of every sample, class by class."""
        together, counts = torch.cat(list(images)), [len(x) for x in images]
        labels = torch.tensor([b.label for b in batches]).repeat_interleave(torch.tensor(counts))
        return sample_losses(network, together, labels.to(together.device), self.at_once).split(counts)

    def _effects(
        self, network: nn.Module, real: Tensor, own: Tensor, view: View, label: int, step: int, outer: int
    ) -> Tensor:
        chance, metric = generator(self.context.seed, "probes", step, outer, label), of_single_class(self.judged)
        return gradient_effects(network, real, own, view, label, metric, self.pruning.probes, chance, self.at_once)

    def _real_gradients(self, network: nn.Module, images: Sequence[Tensor], labels: Sequence[int]) -> list[Tensor]:
        """Per matched parameter the gradients of the classes' real batches [classes, *parameter]."""
        parts = []
        for chunk in _chunks(len(labels), self._number(max(len(x) for x in images), self.first)):
            own = [labels[k] for k in chunk]
            if len(chunk) == 1:
                gradient = real_gradient(network, images[chunk[0]], own[0], self.first)
                parts.append([g[None] for g in gradient])
            else:
                parts.append(class_gradients(network, *_filled([images[k] for k in chunk], own)))
        return [torch.cat(gradients) for gradients in zip(*parts, strict=True)]

    def _pull(
        self, network: nn.Module, seen: Tensor, labels: Sequence[int], targets: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The classes' distances, and their gradient in what the network sees, `seen` [classes * m, *shape]."""
        leaf = seen.detach().requires_grad_(True)
        if len(labels) > 1:
            weights = leaf.new_full((len(leaf),), len(labels) / len(leaf))
            found = self.metric(targets, class_gradients(network, leaf, labels, weights, differentiable=True))
            found.sum().backward(inputs=[leaf])
        elif len(leaf) <= self.second:
            gradient = synthetic_gradient(network, leaf, labels[0])
            found = self.metric(targets, [g[None] for g in gradient])
            found.sum().backward(inputs=[leaf])
        else:
            found = self._pull_in_parts(network, leaf, labels[0], targets)
        assert leaf.grad is not None
        return list(found.detach()), leaf.grad

    def _pull_in_parts(self, network: nn.Module, leaf: Tensor, label: int, targets: list[Tensor]) -> Tensor:
        mean = [g.requires_grad_(True) for g in real_gradient(network, leaf.detach(), label, self.first)]
        found = self.metric(targets, [g[None] for g in mean])
        slopes = torch.autograd.grad(found.sum(), mean, allow_unused=True)
        for part in leaf.split(self.second):
            gradient = synthetic_gradient(network, part, label)
            pairs = [(s, g) for s, g in zip(slopes, gradient, strict=True) if s is not None]
            pull = torch.stack([(s * g).sum() for s, g in pairs]).sum() * (len(part) / len(leaf))
            pull.backward(inputs=[leaf])
        return found

    def set_batch_norm_statistics(self, network: nn.Module, step: int, outer: int) -> None:
        """Set the statistics of batch norm from a real batch, the same on every worker, and keep them."""
        if not self.mixes:
            return
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # so that the statistics become those of this batch
        with torch.no_grad():
            network(self._norm_batch(step, outer))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    def _norm_batch(self, step: int, outer: int) -> Tensor:
        """Real images of up to NORM_BATCH classes, their workers' shares added up."""
        classes = self.context.spec.classes
        order = torch.randperm(classes, generator=generator(self.context.seed, "norm classes", step, outer))
        chosen, each = order[:NORM_BATCH].tolist(), max(1, min(NORM_EACH, NORM_BATCH // classes))
        batch = torch.zeros(len(chosen), each, *self.context.spec.shape, device=self.context.device)
        for k, label in enumerate(chosen):
            if label in self.context.labels:
                batch[k] = repeated(self.real, label, each, "norm batch", step, outer)
        self.context.workers.all_reduce_sum([batch])
        return batch.flatten(0, 1)


def repeated(real: ClassSampler, label: int, n: int, purpose: str, *index: int) -> Tensor:
    """n real images of a class [n, *shape]; where fewer are kept they repeat."""
    images = real.draw([label], n, purpose, *index)[0].images
    return images[torch.arange(n, device=images.device) % len(images)]


def _filled(images: Sequence[Tensor], labels: Sequence[int]) -> tuple[Tensor, Sequence[int], Tensor]:
    """Classes of any number of images filled up to the largest with copies that weigh nothing: images, labels, weights."""
    most = max(len(x) for x in images)
    filled = torch.cat([torch.cat([x, x[:1].expand(most - len(x), *x.shape[1:])]) for x in images])
    weights = torch.cat([(torch.arange(most) < len(x)) / len(x) for x in images])
    return filled, labels, weights.to(filled.device)


def _item(values: Callable[[], Sequence[Tensor]], place: int) -> Tensor:
    return values()[place]


def _chunks(n: int, size: int) -> Iterator[list[int]]:
    return (list(range(first, min(n, first + size))) for first in range(0, n, size))


def _norm_message(name: str) -> str:
    return (
        f"distill.network = {name!r} has batch norm: a real batch of several classes sets its statistics before every "
        "matching, in which it then stays in evaluation mode, so that samples are independent"
    )

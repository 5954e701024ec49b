"""The update that DC, DSA and IDC share: it pulls the gradient of each class's images towards that of its real batch.

Classes are matched in groups, so memory does not grow with their number. Within a group all classes share one forward and
one backward pass (`class_gradients.py`): on a GPU as many as fit into MEMORY; on a CPU only if a class has at most
CPU_IMAGES images (EPYC core, ConvNet-3 at 32 x 32, 100 classes: up to 1.5 times as fast at 1 image, equal at 4, slower from
8 on), else classes follow each other in parts that stay in the cache. A class whose second-order graph exceeds MEMORY is
taken in parts: the distance depends on the mean gradient alone, so its derivative there, computed once, serves every part.

What needs first derivatives only, the real batches and the training of networks, is compiled and in `distill.precision`
where the run is long enough (EPYC core, width 128: 190 images a second, compiled 300, compiled in bf16 560; in bf16 and not
compiled 125, so code on a CPU that is not compiled stays in float32). Second derivatives are neither.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill_at_scale.core.errors import RunWarning
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.augment import Augmentation, AugmentParams, apply_each
from distill_at_scale.distillation.methods.base import USUAL_WORKERS, ImageMethod
from distill_at_scale.distillation.methods.contract import Judge, MethodContext
from distill_at_scale.distillation.methods.shared.class_gradients import class_gradients, supports_class_gradients
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    GradientDistance,
    real_gradient,
    sample_losses,
    synthetic_gradient,
)
from distill_at_scale.distillation.methods.shared.treatment_effect import SampleGradients, gradient_effects
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import Precision, autocast
from distill_at_scale.models.spec import mixes_samples

MEMORY = {"cpu": 2**30, "cuda": 2**32}  # bytes that a group of classes may take
FIRST_ORDER, SECOND_ORDER = 12, 40  # bytes of an image's graph, per byte of its widest layer
COPIES = 4  # of a real batch at one time: drawn, augmented, concatenated with those of the other classes
CPU_IMAGES = 2  # images per class up to which it pays on a CPU to match classes together
NORM_BATCH, NORM_PER_CLASS = 256, 16  # real images that set batch norm's statistics: in total, and per class


class MatchingMethod(ImageMethod):
    """Base class of methods that match gradients: `match` is one update of the images.

    A subclass calls, within `step`, `new_network`, then `set_batch_norm_statistics` and `match` for each of its updates, then
    `raise_if_diverged`, and returns `metrics`. It may override `shown` and `images_shown`, which say what the network sees
    of the stored images, and `effect_distance`.

    Attributes:
        augmentation: siamese augmentation: one draw for the real and the synthetic images of a class.
        real_batch: real samples per class and update, at most.
        distance: the distance between gradients of several classes, `[classes]`.
        effect_distance: the distance that the effects of real samples (runtime rule `ite`) are computed by; it must have a
            second derivative. By default `distance`.
        at_once: images per forward pass where no group of classes is computed together.
        net: the network of the current step. Set by `prepare` and `new_network`.
        forward_mode: whether `forward` is compiled, and in which precision. Set by `prepare`.
        part: images per call of `forward`, at most. Set by `prepare`.
    """

    batch_norm: ClassVar[str] = "any"
    forward_mode: ForwardMode

    def __init__(
        self, context: MethodContext, init: str, lr: float, momentum: float, augment: str, real_batch: int,
        distance: GradientDistance,
    ) -> None:  # fmt: skip
        super().__init__(context, init, lr, momentum)
        self.augmentation, self.real_batch, self.distance = Augmentation(augment), real_batch, distance
        self.effect_distance, self.at_once = distance, context.spec.microbatch(context.device)
        self.on_cpu = context.device.type == "cpu"
        widest, memory = context.spec.activation_bytes(1), MEMORY.get(context.device.type, MEMORY["cuda"])
        self.first_order_images = self.at_once if self.on_cpu else max(1, memory // (FIRST_ORDER * widest))
        self.second_order_images = max(1, memory // (SECOND_ORDER * widest))
        self.real_batches_in_memory = max(1, memory // (COPIES * 4 * real_batch * math.prod(context.spec.shape)))
        self.used = self.drawn = 0  # real samples since the last step: after and before runtime pruning
        self.mixes = mixes_samples(context.spec.skeleton())
        if self.mixes:
            warnings.warn(
                f"distill.network = {context.spec.name!r} has batch norm: a real batch of several classes sets its "
                "statistics before each matching, which then runs in evaluation mode, so that samples are independent",
                RunWarning,
                stacklevel=2,
            )

    def first_order_samples(self, real_batch: int) -> int:
        """The samples of all workers that go through `forward` in a step, with real batches of this size."""
        return self.context.spec.classes * real_batch

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        context, spec = self.context, self.context.spec
        largest = max(min(self.real_batch, real.count(label)) for label in context.labels)
        largest = context.workers.all_reduce_max(largest)  # so that any number of workers compiles, or none does
        trained = self.first_order_samples(largest) * context.steps
        choice = "auto" if self.on_cpu else "never"  # on a GPU not measured
        precision = context.config.distill.precision
        self.forward_mode = ForwardMode(
            spec, choice, precision, not self.on_cpu, trained=trained, processes=USUAL_WORKERS
        )
        self.part = self.first_order_images
        if self.forward_mode.compiled:
            self.part = -(-largest // -(-largest // self.part))  # the fewest parts, of one size
        self.net = spec.build(0).to(context.device).train()  # one module for all steps, so that it is compiled once
        for norm in batch_norms(self.net):
            norm.eval()
        # whether classes may share a pass
        self.joint = supports_class_gradients(self.net, spec.shape, spec.classes, context.device)
        self.logits = self.forward_mode.compile(self._logits)

    def _logits(self, images: Tensor, precision: Precision) -> Tensor:
        with autocast(precision, self.context.device):
            return self.net(images).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of at most `part` images under the current network, for first derivatives."""
        missing = self.part - len(images) if self.forward_mode.compiled else 0  # compiled code wants one shape
        padded = torch.cat([images, images[:1].expand(missing, *images.shape[1:])]) if missing else images
        return self.logits(padded)[: len(images)]

    def new_network(self, step: int) -> None:
        """Make `net` the random network of a step, in training mode."""
        self.context.spec.renew(self.net, derive(self.context.seed, "network", step))
        self.net.train()

    @property
    def images_shown(self) -> int:
        """How many images of a class the network sees in an update."""
        return self.ipc

    def shown(
        self, syn: Tensor, labels: Sequence[int], params: Sequence[AugmentParams], step: int, outer: int
    ) -> Tensor:
        """What the network sees in this update of the stored images [classes, ipc, *shape] of `labels`, class by class.

        It must be affine in the images.
        """
        return apply_each(params, syn.flatten(0, 1), [self.ipc] * len(labels))

    def matching_draws(self, step: int, outer: int) -> Iterator[DrawRequest]:
        """The draws of `set_batch_norm_statistics` followed by `match`."""
        if self.mixes:
            labels, per_class = self._norm_classes(step, outer)
            for label in labels:
                if label in self.context.labels:
                    yield DrawRequest((label,), per_class, "norm batch", (step, outer))
        for first in range(0, len(self.context.labels), self.group_size):
            group = tuple(self.context.labels[first : first + self.group_size])
            yield DrawRequest(group, self.real_batch, "real batch", (step, outer))

    @property
    def group_size(self) -> int:
        """How many classes are matched together."""
        limit = min(self.second_order_images, self.first_order_images) if self.on_cpu else self.second_order_images
        return min(self.real_batches_in_memory, self._classes_per_pass(self.images_shown, limit))

    def match(self, step: int, outer: int, update: int) -> float:
        """One update of the images along the gradient of sum_c D(g_real_c, g_syn_c) (DC, Algorithm 1).

        `step` and `outer` seed the real batches and the augmentation; `update` counts the updates over all steps, for runtime
        pruning. Returns the sum of the distances of the own classes.
        """
        spec, seed = self.context.spec, self.context.seed
        self.images.grad = torch.zeros_like(self.images)
        distances: list[Tensor] = []
        of_class = self.augmentation.draw_each(generator(seed, "siamese", step, outer), spec.classes)
        size = self.group_size
        for first in range(0, len(self.images), size):
            labels = self.context.labels[first : first + size]
            params = [of_class[label] for label in labels]
            syn = self.images.detach()[first : first + size].requires_grad_(True)
            batch_real, known = self._real_batches(syn.detach(), labels, params, (step, outer, update))
            grad_real = self._real_gradients(batch_real, labels, known)
            seen = self.shown(syn, labels, params, step, outer)
            group_distances, grad_seen = self._distances(seen, labels, grad_real)
            self.images.grad[first : first + size] = torch.autograd.grad(seen, syn, grad_seen)[0]
            distances += group_distances
        return sum(self.update(distances, step))

    def judge(self, step: int) -> Judge:
        """The losses of samples, without augmentation, under the network as the step left it."""

        def losses(label: int, parts: Iterable[Tensor]) -> Tensor:
            return torch.cat([sample_losses(self.forward, x, torch.full((len(x),), label, device=x.device), self.part)
                              for x in parts])  # fmt: skip

        return losses

    def metrics(self, total: float, updates: int) -> dict[str, float]:
        """The metrics of a step: mean distance per class and update, and the share of real samples left by pruning."""
        share = self.used / max(1, self.drawn)
        self.used = self.drawn = 0
        return {"loss": total / (updates * len(self.context.labels)), "real_share": share}

    def _classes_per_pass(self, images_per_class: int, limit: int) -> int:
        if not self.joint or (self.on_cpu and images_per_class > CPU_IMAGES):
            return 1
        return max(1, limit // images_per_class)

    def _real_batches(
        self, syn: Tensor, labels: Sequence[int], params: Sequence[AugmentParams],
        when: tuple[int, int, int],
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:  # fmt: skip
        """The augmented real batch of each class after runtime pruning; `syn` are the classes' stored images.

        Also the gradients of those batches for which the rule leads to them, by the position of the class.
        """
        step, outer, update = when
        batches = self.real.draw(labels, self.real_batch, "real batch", step, outer)
        images, rated = self.augmented_batches(batches, params, update)

        @cache
        def losses() -> dict[int, Tensor]:
            counts = [len(images[k]) for k in rated]
            targets = torch.tensor([labels[k] for k in rated]).repeat_interleave(torch.tensor(counts))
            together = torch.cat([images[k] for k in rated])
            each = sample_losses(self.net, together, targets.to(together.device), self.at_once).split(counts)
            return dict(zip(rated, each, strict=True))

        known: dict[int, list[Tensor]] = {}

        def effects(k: int) -> Tensor:
            rng = generator(self.context.seed, "probes", step, outer, labels[k])
            sample_gradients = SampleGradients(self.net, labels[k], self.at_once, self.joint)

            def view(stored: Tensor) -> Tensor:
                return self.shown(stored[None], labels[k : k + 1], params[k : k + 1], step, outer)

            values, known[k] = gradient_effects(
                sample_gradients, images[k], syn[k], view, self.effect_distance, self.pruning.probes, rng
            )
            return values

        for k in rated:
            kept = self.kept_mask(batches[k], partial(lambda k: losses()[k], k), partial(effects, k))
            kept = kept.to(images[k].device)
            if k in known:
                known[k] = self._gradient_of_kept(images[k], labels[k], kept, known[k])
            images[k] = images[k][kept]
        self.used += sum(map(len, images))
        self.drawn += sum(len(batch.rows) for batch in batches)
        return images, known

    def _gradient_of_kept(self, images: Tensor, label: int, kept: Tensor, whole: list[Tensor]) -> list[Tensor]:
        """The gradient of a batch's kept samples; `whole` is that of all, from which that of few others is taken away."""
        dropped = 1 - float(kept.float().mean())
        if dropped > 0.5:
            return real_gradient(self.net, images[kept], label, self.part, self.forward)
        if not dropped:
            return whole
        others = real_gradient(self.net, images[~kept], label, self.part, self.forward)
        return [(g - dropped * other) / (1 - dropped) for g, other in zip(whole, others, strict=True)]

    def _real_gradients(
        self, images: Sequence[Tensor], labels: Sequence[int], known: dict[int, list[Tensor]]
    ) -> list[Tensor]:
        """Per matched parameter the gradients of the classes' real batches [classes, *parameter], some of them known."""
        size = self._classes_per_pass(max(len(x) for x in images), self.first_order_images)
        if self.forward_mode.compiled or known:
            size = 1  # compiled code is twice as fast as classes together; known are those of all classes that drop samples
        parts = []
        for first in range(0, len(labels), size):
            some, own = images[first : first + size], labels[first : first + size]
            if len(own) == 1:
                single = known.get(first) or real_gradient(self.net, some[0], own[0], self.part, self.forward)
                parts.append([g[None] for g in single])
                continue
            # batches of any size, padded to the largest with copies of weight zero
            sizes = list(map(len, some))
            counts, places = torch.tensor(sizes)[:, None], torch.arange(max(sizes))
            inside = places < counts
            weights, padded = (inside / counts).flatten(), torch.cat(list(some))
            if min(sizes) < max(sizes):
                rows = counts.cumsum(0) - counts + places * inside
                padded = padded[rows.flatten().to(padded.device, non_blocking=True)]
            weights = weights.to(padded.device, non_blocking=True)
            with autocast(self.forward_mode.eager_precision, self.context.device):
                parts.append(class_gradients(self.net, padded, own, weights))
        return [torch.cat(gradients) for gradients in zip(*parts, strict=True)]

    def _distances(self, seen: Tensor, labels: Sequence[int], grad_real: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The distance of each class, and the gradient of their sum in `seen` [classes * m, *shape]."""
        leaf = seen.detach().requires_grad_(True)
        if len(labels) == 1 and len(leaf) > self.second_order_images:
            distances = self._backward_in_parts(leaf, labels[0], grad_real)
        else:
            if self.joint and (len(labels) > 1 or self.on_cpu):  # on a CPU also 10 % faster for one class
                weights = leaf.new_full((len(leaf),), len(labels) / len(leaf))
                grad_syn = class_gradients(self.net, leaf, labels, weights, differentiable=True)
            else:
                grad_syn = [g[None] for g in synthetic_gradient(self.net, leaf, labels[0])]
            distances = self.distance(grad_real, grad_syn)
            distances.sum().backward(inputs=[leaf])
        assert leaf.grad is not None
        return list(distances.detach()), leaf.grad

    def _backward_in_parts(self, leaf: Tensor, label: int, grad_real: list[Tensor]) -> Tensor:
        """The distance [1] of one class; fills `leaf.grad` with the second-order graph of one part at a time."""
        mean = [g.requires_grad_(True) for g in real_gradient(self.net, leaf.detach(), label, self.first_order_images)]
        distances = self.distance(grad_real, [g[None] for g in mean])
        slopes = torch.autograd.grad(distances.sum(), mean, allow_unused=True)
        for part in leaf.split(self.second_order_images):
            pairs = zip(slopes, synthetic_gradient(self.net, part, label), strict=True)
            pull = torch.stack([(s * g).sum() for s, g in pairs if s is not None]).sum() * (len(part) / len(leaf))
            pull.backward(inputs=[leaf])
        return distances

    def set_batch_norm_statistics(self, step: int, outer: int) -> None:
        """Set batch norm's statistics from a real batch, equal in all workers, and switch it to evaluation mode."""
        if not self.mixes:
            return
        norms = batch_norms(self.net)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the statistics become those of this batch
        with torch.no_grad():
            self.net(self._norm_batch(step, outer))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    def _norm_classes(self, step: int, outer: int) -> tuple[list[int], int]:
        """Up to NORM_BATCH labels in random order, and the number of images of each."""
        classes = self.context.spec.classes
        order = torch.randperm(classes, generator=generator(self.context.seed, "norm classes", step, outer))
        return order[:NORM_BATCH].tolist(), max(1, min(NORM_PER_CLASS, NORM_BATCH // classes))

    def _norm_batch(self, step: int, outer: int) -> Tensor:
        """Real images of several classes; each worker fills in its own classes."""
        labels, per_class = self._norm_classes(step, outer)
        batch = torch.zeros(len(labels), per_class, *self.context.spec.shape, device=self.context.device)
        for k, label in enumerate(labels):
            if label in self.context.labels:
                batch[k] = repeated_draw(self.real, label, per_class, "norm batch", step, outer)
        self.context.workers.all_reduce_sum([batch])
        return batch.flatten(0, 1)


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def repeated_draw(real: ClassSampler, label: int, n: int, purpose: str, *index: int) -> Tensor:
    """n real images of a class [n, *shape]; if fewer are kept, they repeat."""
    images = real.draw([label], n, purpose, *index)[0].images
    return images[torch.arange(n, device=images.device) % len(images)]

"""SRe2L: squeeze, recover, relabel (Yin, Xing & Shen 2023, arXiv 2306.13092; METHOD.md section 4).

The data is squeezed into a teacher with batch norm. Images are recovered from noise: their crops shall be classified as
their class, and the mean and variance of what enters each batch norm shall be those that the teacher has remembered. The
finished images are labelled view by view by the same teacher (soft_labels.py). Real images are used by the teacher alone.

A step is one Adam update of all own images. They go through the teacher in batches that mix the classes, since the
remembered statistics are those of all classes together: the j-th images of the own classes follow each other, in an order
that is drawn anew for each j. What is drawn for an image does not depend on the number of workers, but a batch holds the
classes of one worker only, so with more workers the statistics are matched over other (and, with fewer own classes, less
mixed) batches: images from different numbers of workers agree in kind, not to the last bit.

Left out: the tenfold weight of the first layer's statistics in the authors' code. Clips work where the teacher takes them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import SRe2LSection
from distill_at_scale.core import rng
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.base import ImageMethod, MethodContext
from distill_at_scale.distillation.methods.shared.teacher import TeacherMethod
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, boxes_of, shown

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class SRe2L(TeacherMethod, ImageMethod):
    default_steps: ClassVar[int] = 4000
    no_runtime: ClassVar[str] = "sre2l matches the statistics that a teacher has remembered, so there is no real batch"
    teacher_needs_batch_norm: ClassVar[bool] = True

    @classmethod
    def section(cls, config: Config) -> SRe2LSection:
        return config.distill.sre2l

    @classmethod
    def init_of(cls, config: Config) -> str:
        return cls.section(config).init

    def __init__(self, context: MethodContext) -> None:
        self.options = self.section(context.config)
        super().__init__(context, self.options.init, self.options.image_lr, 0.0)
        self.flip = self.protocol(context.config).augment == "flip"

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        betas = self.options.beta1, self.options.beta2
        self.adam = torch.optim.Adam([self.images], self.lr, betas)
        self.teacher = Teacher.load(self.context.networks / TEACHER, self.context.device, self.options.teacher_network)
        self.statistics = BatchNormLoss(self.teacher)
        black, white = torch.zeros(1, *self.context.spec.shape), torch.ones(1, *self.context.spec.shape)
        ends = [real.normalization.apply(255 * end).to(self.context.device) for end in (black, white)]
        self.lowest, self.highest = ends
        self.batches = self._batches()
        self.targets = torch.tensor(self.context.labels, device=self.context.device).repeat_interleave(self.ipc)

    def _batches(self) -> list[Tensor]:
        """Places among the own images, class by class, of batches of nearly one size."""
        labels, seed = self.context.labels, self.context.seed
        places = []
        for j in range(self.ipc):
            keys = {k: rng.derive(seed, "recovery order", j, label) for k, label in enumerate(labels)}
            places += [k * self.ipc + j for k in sorted(keys, key=keys.__getitem__)]
        return list(torch.tensor(places).tensor_split(math.ceil(len(places) / self.options.recover_batch)))

    def step(self, i: int) -> dict[str, float]:
        self.adam.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * i / self.context.steps)) / 2
        boxes, flipped = self._views(i)
        images = self.images.detach().flatten(0, 1)
        gradient, losses, matched = torch.zeros_like(images), torch.zeros(len(images), device=images.device), 0.0
        for places in self.batches:
            part = images[places].requires_grad_(True)
            flips = None if flipped is None else flipped[places]
            with self.statistics:
                logits = self.teacher(shown(part, boxes[places], flips))
                distance = self.statistics.distance()
            entropy = F.cross_entropy(logits, self.targets[places], reduction="none")
            (entropy.mean() + self.options.statistics * distance).backward()
            gradient[places] = part.grad  # type: ignore[assignment]
            losses[places] = entropy.detach() + self.options.statistics * distance.detach()
            matched += float(distance.detach()) * len(places) / len(images)
        self.images.grad = gradient.view_as(self.images)
        each = losses.view(-1, self.ipc).mean(1)
        self.update(list(each), i)
        self.raise_if_diverged()
        return {"loss": float(each.mean()), "statistics": matched}

    def _views(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The crops [own images, 4] and flips of a step; those of a class depend on nothing but seed, step and class."""
        draws = [rng.generator(self.context.seed, "recovery view", step, label) for label in self.context.labels]
        numbers = torch.cat([torch.rand(self.ipc, 5, generator=draw) for draw in draws])
        return boxes_of(numbers, self.options.recover_scale), numbers[:, 4] < 0.5 if self.flip else None

    def _move(self) -> int | None:
        """One Adam update, clipped to pixels that exist; undone where something is not finite, with the class returned."""
        before, state = self.images.detach().clone(), {k: v.clone() for k, v in self._moments().items()}
        self.adam.step()
        with torch.no_grad():
            self.images.clamp_(self.lowest, self.highest)
        broken = (~torch.isfinite(self.images.detach().flatten(1)).all(1)).nonzero()
        if not len(broken):
            return None
        with torch.no_grad():
            self.images.copy_(before)
        self.adam.state[self.images] = state
        return int(broken[0])

    def _moments(self) -> dict[str, Any]:
        return self.adam.state.get(self.images, {})

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if moments := self._moments():
            state["adam_steps"] = moments["step"].cpu()
            for name in MOMENTS:
                state |= {f"{name}/{c}": moments[name][k].cpu() for k, c in enumerate(self.context.labels)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        if "adam_steps" in state:
            labels, device = self.context.labels, self.context.device
            moments = {m: torch.stack([state[f"{m}/{c}"] for c in labels]).to(device) for m in MOMENTS}
            self.adam.state[self.images] = {"step": state["adam_steps"].clone(), **moments}


class BatchNormLoss:
    """Inside a `with`, how far what enters the batch norms of a network is from what they have remembered."""

    def __init__(self, network: nn.Module):
        self.found: list[Tensor] = []
        self.open = False
        for layer in network.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(partial(self._note))

    def __enter__(self) -> BatchNormLoss:
        self.found, self.open = [], True
        return self

    def __exit__(self, *_: object) -> None:
        self.found, self.open = [], False

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.open:
            return
        channels = inputs[0].transpose(0, 1).flatten(1)  # C x all others
        mean, spread = channels.mean(1), channels.var(1, correction=0)
        self.found.append((mean - layer.running_mean).norm() + (spread - layer.running_var).norm())  # type: ignore[operator]

    def distance(self) -> Tensor:
        """Sum over the layers that were passed of ||mean - remembered mean|| + ||variance - remembered variance||."""
        return torch.stack(self.found).sum()

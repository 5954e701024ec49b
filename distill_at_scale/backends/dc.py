"""DC, gradient matching (Zhao, Mopuri & Bilen 2021, arXiv 2006.05929; METHOD.md section 4).

Every step draws a new network; per outer iteration the synthetic images of each class move so that their gradient agrees with
that of the class's real batch, and then the network is trained on the synthetic set for `inner` epochs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.augment import Augmentation
from distill_at_scale.backends.base import ImageBackend, Setting
from distill_at_scale.backends.gradients import class_gradients, distance, synthetic_gradient
from distill_at_scale.config import Config, MatchingSection
from distill_at_scale.data.pool import Draw
from distill_at_scale.rng import derive, generator

TOGETHER = 512  # real images that go through the network at once; bounds memory

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # ipc -> outer, inner


def default_loops(ipc: int) -> tuple[int, int]:
    """The official table, and for a count between its entries that of the next smaller one."""
    return LOOPS[max(known for known in LOOPS if known <= ipc)]


class GradientMatching(ImageBackend):
    default_steps: ClassVar[int] = 1000

    @staticmethod
    def section(config: Config) -> MatchingSection:
        return config.distill.dc

    @classmethod
    def init_of(cls, config: Config) -> str:
        return cls.section(config).init

    @classmethod
    def protocol(cls, config: Config) -> dict[str, Any]:
        augment = cls.section(config).augment
        return {"epochs": 300 if augment == "none" else 1000, "augment": augment}

    def __init__(self, setting: Setting) -> None:
        self.options = self.section(setting.config)
        super().__init__(setting, self.options.init, self.options.image_lr, self.options.image_momentum)
        outer, inner = default_loops(self.ipc)
        self.outer, self.inner = self.options.outer or outer, self.options.inner or inner
        self.augmentation = Augmentation(self.options.augment)

    def step(self, i: int) -> dict[str, float]:
        network = self.setting.spec.build(derive(self.setting.seed, "network", i)).to(self.setting.device).train()
        total = 0.0
        for outer in range(self.outer):
            total += self._match(network, i, outer)
            if outer < self.outer - 1:
                self._train(network, i, outer)
        self.settle()
        return {"loss": total / (self.outer * len(self.setting.labels))}

    def _match(self, network: nn.Module, step: int, outer: int) -> float:
        """One image update; returns the sum of the own classes' distances."""
        targets = self._real_gradients(network, step, outer)
        self.optimizer.zero_grad()
        losses = []
        for k, label in enumerate(self.setting.labels):
            augmented = self._augment(step, outer, label).apply(self.images[k])
            loss = distance(targets[k], synthetic_gradient(network, augmented, label))
            loss.backward(inputs=[self.images])  # class by class: only one second-order graph is alive
            losses.append(loss.detach())
        self.update(losses, step)
        return float(torch.stack(losses).sum())

    def _real_gradients(self, network: nn.Module, step: int, outer: int) -> list[list[Tensor]]:
        gradients: list[list[Tensor]] = []
        n = self.options.real_batch
        together = max(1, TOGETHER // n)
        labels = self.setting.labels
        for first in range(0, len(labels), together):
            draws = self.real.draw(labels[first : first + together], n, "real batch", step, outer)
            batches = [self._augment(step, outer, draw.label).apply(draw.images) for draw in draws]
            gradients += class_gradients(network, batches, [draw.label for draw in draws], self._keep(draws))
        return gradients

    def _keep(self, draws: list[Draw]) -> Any:
        """The runtime rule, or None where it drops nothing, so that this path is the one without pruning."""
        return self.pruning.mask if any(self.pruning.dropped(len(d.rows)) for d in draws) else None

    def _augment(self, step: int, outer: int, label: int) -> Any:
        """The draw that the real and the synthetic images of a class share."""
        return self.augmentation.draw(generator(self.setting.seed, "siamese", step, outer, label))

    def _train(self, network: nn.Module, step: int, outer: int) -> None:
        """Train the network on the whole synthetic set; workers add up the gradients of their own classes' images."""
        total = self.setting.spec.classes * self.ipc
        own = torch.tensor(self.setting.labels).repeat_interleave(self.ipc)
        places = own * self.ipc + torch.arange(self.ipc).repeat(len(self.setting.labels))  # place in the whole set
        images = self.images.detach().flatten(0, 1)
        parameters = list(network.parameters())
        for epoch in range(self.inner):
            order = torch.randperm(total, generator=generator(self.setting.seed, "inner order", step, outer, epoch))
            for number, batch in enumerate(order.split(self.options.network_batch)):
                mine = torch.isin(places, batch)
                gradients = [torch.zeros_like(p) for p in parameters]
                if bool(mine.any()):
                    rng = generator(self.setting.seed, "inner augmentation", step, outer, epoch, number)
                    draw = self.augmentation.draw(rng, per_image=total)
                    draw = type(draw)(draw.family, draw.numbers[places[mine]] if draw.family else draw.numbers)
                    logits = network(draw.apply(images[mine.to(images.device)]))
                    loss = F.cross_entropy(logits, own[mine].to(images.device), reduction="sum") / len(batch)
                    gradients = list(torch.autograd.grad(loss, parameters))
                self.setting.workers.sum_(gradients)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=self.options.network_lr)

"""DC, gradient matching (Zhao, Mopuri & Bilen 2021, arXiv 2006.05929; METHOD.md section 4).

Every step draws a new network; per outer iteration the synthetic images of each class move so that their gradient
agrees with that of the class's real batch, and then the network is trained on the synthetic set for `inner` epochs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.augment import Augmentation, Draw
from distill_at_scale.backends.base import ImageBackend, Setting
from distill_at_scale.backends.gradients import distance, losses, real_gradient, synthetic_gradient
from distill_at_scale.config import Config
from distill_at_scale.method_sections import MatchingSection
from distill_at_scale.rng import derive, generator
from distill_at_scale.students import TrainingProtocol

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
    def protocol(cls, config: Config) -> TrainingProtocol:
        augment = cls.section(config).augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    def __init__(self, setting: Setting) -> None:
        self.options = self.section(setting.config)
        super().__init__(setting, self.options.init, self.options.image_lr, self.options.image_momentum)
        outer, inner = default_loops(self.ipc)
        self.outer, self.inner = self.options.outer or outer, self.options.inner or inner
        self.augmentation = Augmentation(self.options.augment)
        self.at_once = setting.spec.at_once(setting.device)

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
        self.optimizer.zero_grad()
        distances = []
        for k, label in enumerate(self.setting.labels):
            augment = self._augment(step, outer, label)
            target = self._real_gradient(network, label, augment, step, outer)
            found = distance(target, synthetic_gradient(network, augment.apply(self.images[k]), label))
            found.backward(inputs=[self.images])  # class by class: only one second-order graph is alive
            distances.append(found.detach())
        self.update(distances, step)
        return float(torch.stack(distances).sum())

    def _real_gradient(self, network: nn.Module, label: int, augment: Draw, step: int, outer: int) -> list[Tensor]:
        """The gradient of a class's real batch after runtime pruning, under the same augmentation as the synthetic images."""
        batch = self.real.draw([label], self.options.real_batch, "real batch", step, outer)[0]
        held, visit = self.real.count(label), step * self.outer + outer
        kept = self.pruning.forecast(label, batch.rows, held, visit)
        if kept is None and self.pruning.dropped(len(batch.rows)):
            values = self.pruning.values(loss=lambda: losses(network, augment.apply(batch.images), label, self.at_once))
            kept = self.pruning.look(label, batch.rows, held, values)
        images = batch.images if kept is None else batch.images[kept.to(batch.images.device)]
        return real_gradient(network, augment.apply(images), label, self.at_once)

    def _augment(self, step: int, outer: int, label: int) -> Draw:
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

"""DC, gradient matching (Zhao, Mopuri & Bilen 2021, arXiv 2006.05929; METHOD.md section 4).

Every step draws a new network; per outer iteration the synthetic images of each class move so that their gradient
agrees with that of the class's real batch, and then the network is trained on the synthetic set for `inner` epochs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DCSection
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.methods.shared.gradient_distance import cosine_distance
from distill_at_scale.distillation.methods.shared.gradient_matching import MatchingMethod
from distill_at_scale.distillation.student import TrainingProtocol

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # ipc -> outer, inner


def default_loops(ipc: int) -> tuple[int, int]:
    """The official table, and for a count between its entries that of the next smaller one."""
    return LOOPS[max(known for known in LOOPS if known <= ipc)]


class DC(MatchingMethod):
    default_steps: ClassVar[int] = 1000

    @staticmethod
    def section(config: Config) -> DCSection:
        return config.distill.dc

    @classmethod
    def init_of(cls, config: Config) -> str:
        return cls.section(config).init

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        augment = cls.section(config).augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    def __init__(self, context: MethodContext) -> None:
        self.options = self.section(context.config)
        made = self.options
        super().__init__(
            context, made.init, made.image_lr, made.image_momentum, made.augment, made.real_batch, cosine_distance
        )
        outer, inner = default_loops(self.ipc)
        self.outer, self.inner = self.options.outer or outer, self.options.inner or inner

    def step(self, i: int) -> dict[str, float]:
        network = self.context.spec.build(derive(self.context.seed, "network", i)).to(self.context.device).train()
        total = 0.0
        for outer in range(self.outer):
            self.set_batch_norm_statistics(network, i, outer)
            total += self.match(network, i, outer, i * self.outer + outer)
            if outer < self.outer - 1:
                self._train(network, i, outer)
        self.raise_if_diverged()
        return self.metrics(total, self.outer)

    def _train(self, network: nn.Module, step: int, outer: int) -> None:
        """Train the network on the whole synthetic set; workers add up the gradients of their own classes' images."""
        total = self.context.spec.classes * self.ipc
        own = torch.tensor(self.context.labels).repeat_interleave(self.ipc)
        places = own * self.ipc + torch.arange(self.ipc).repeat(len(self.context.labels))  # place in the whole set
        images = self.images.detach().flatten(0, 1)
        parameters = list(network.parameters())
        for epoch in range(self.inner):
            order = torch.randperm(total, generator=generator(self.context.seed, "inner order", step, outer, epoch))
            for number, batch in enumerate(order.split(self.options.network_batch)):
                mine = torch.isin(places, batch)
                gradients = [torch.zeros_like(p) for p in parameters]
                if bool(mine.any()):
                    rng = generator(self.context.seed, "inner augmentation", step, outer, epoch, number)
                    draw = self.augmentation.draw(rng, per_image=total)
                    draw = type(draw)(draw.family, draw.numbers[places[mine]] if draw.family else draw.numbers)
                    logits = network(draw.apply(images[mine.to(images.device)]))
                    loss = F.cross_entropy(logits, own[mine].to(images.device), reduction="sum") / len(batch)
                    gradients = list(torch.autograd.grad(loss, parameters))
                self.context.workers.all_reduce_sum(gradients)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=self.options.network_lr)

"""DC, dataset condensation with gradient matching (Zhao, Mopuri & Bilen 2021, arXiv 2006.05929)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from distill_at_scale.config.methods import DCSection
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.methods.contract import Judge, MethodContext
from distill_at_scale.distillation.methods.shared.gradient_distance import cosine_distance, gradient_in_parts
from distill_at_scale.distillation.methods.shared.gradient_matching import MatchingMethod

# ipc -> outer, inner loops of the official code
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}

JUDGE_EPOCHS = 50  # of training, at least, before a network rates samples for select.refresh


def default_loops(ipc: int) -> tuple[int, int]:
    """The official outer and inner loops; between two entries of the table, those of the smaller ipc."""
    return LOOPS[max(known for known in LOOPS if known <= ipc)]


class DC(MatchingMethod):
    default_steps: ClassVar[int] = 1000
    section_name: ClassVar[str] = "dc"

    def __init__(self, context: MethodContext) -> None:
        options: DCSection = self.section(context.config)
        self.options = options
        super().__init__(
            context, options.init, options.image_lr, options.image_momentum, options.augment, options.real_batch,
            cosine_distance,
        )  # fmt: skip
        outer, inner = default_loops(self.ipc)
        self.outer, self.inner = options.outer or outer, options.inner or inner

    def first_order_samples(self, real_batch: int) -> int:
        classes = self.context.spec.classes
        return classes * (self.outer * real_batch + (self.outer - 1) * self.inner * self.ipc)

    def draws(self, step: int) -> Iterator[DrawRequest]:
        for outer in range(self.outer):
            yield from self.matching_draws(step, outer)

    def step(self, i: int) -> dict[str, float]:
        """Algorithm 1 of the paper for one random network."""
        self.new_network(i)
        total = 0.0
        for outer in range(self.outer):
            self.set_batch_norm_statistics(i, outer)
            total += self.match(i, outer, i * self.outer + outer)
            if outer < self.outer - 1:
                self._train_network(i, outer, self.inner)
        self.raise_if_diverged()
        return self.metrics(total, self.outer)

    def judge(self, step: int) -> Judge:
        """The losses under the step's network, after at least JUDGE_EPOCHS epochs on the synthetic set."""
        self._train_network(step, self.outer - 1, JUDGE_EPOCHS - (self.outer - 1) * self.inner)
        return super().judge(step)

    def _train_network(self, step: int, outer: int, epochs: int) -> None:
        """Some epochs of SGD on the whole synthetic set; workers sum the gradients of their own classes' images."""
        size = self.context.spec.classes * self.ipc
        labels = torch.tensor(self.context.labels).repeat_interleave(self.ipc)
        indices = labels * self.ipc + torch.arange(self.ipc).repeat(len(self.context.labels))  # within the whole set
        syn, parameters = self.images.detach().flatten(0, 1), list(self.net.parameters())
        for epoch in range(epochs):
            order = torch.randperm(size, generator=generator(self.context.seed, "inner order", step, outer, epoch))
            for number, batch in enumerate(order.split(self.options.network_batch)):
                own = torch.isin(indices, batch)
                gradients = [torch.zeros_like(p) for p in parameters]
                if bool(own.any()):
                    rng = generator(self.context.seed, "inner augmentation", step, outer, epoch, number)
                    params = self.augmentation.draw(rng, per_image=size)
                    if params.family:  # of the parameters of all images, those of the own ones
                        params = type(params)(params.family, params.numbers[indices[own]])
                    seen, targets = params.apply(syn[own.to(syn.device)]), labels[own].to(syn.device)
                    gradients = gradient_in_parts(self.forward, parameters, seen, targets, len(batch), self.part)
                self.context.workers.all_reduce_sum(gradients)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=self.options.network_lr)

"""DM, distribution matching (Zhao & Bilen 2023, arXiv 2110.04181; METHOD.md section 4).

Every step draws a new random network and moves each class's synthetic images so that their mean feature agrees with
that of the class's real batch, under a shared siamese augmentation. Classes are independent, so workers need not
talk to each other, and a worker goes through its classes in groups that fit a fixed memory: beside the synthetic
images, their gradient and their optimiser's state, memory does not grow with the number of classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.sampling.class_sampler import RealBatch
from distill_at_scale.distillation.augment import Augmentation, AugmentParams
from distill_at_scale.distillation.methods.base import ImageMethod, MethodContext
from distill_at_scale.distillation.methods.shared.treatment_effect import feature_effects
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import in_parts, maybe_compile, will_compile

GROUP_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # of a group's images and activations
KEPT_LAYERS = 5  # activations that the backward pass needs, in outputs of the widest layer
COPIES = 4  # of a real batch at once: drawn, normalised, augmented, joined with those of the other classes


class DM(ImageMethod):
    default_steps: ClassVar[int] = 20_000

    @staticmethod
    def init_of(config: Config) -> str:
        return config.distill.dm.init

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        augment = config.distill.dm.augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    def __init__(self, context: MethodContext) -> None:
        self.options = context.config.distill.dm
        default_lr = 10.0 if context.config.distill.ipc >= 100 else 1.0
        super().__init__(context, self.options.init, self.options.image_lr or default_lr, self.options.image_momentum)
        self.augmentation = Augmentation(self.options.augment)
        self.at_once = context.spec.at_once(context.device)
        self.network = context.spec.build(0).to(context.device).train().requires_grad_(False)
        self.embed = context.spec.embedding(self.network)
        self.group = self._classes_at_once()

    def _classes_at_once(self) -> int:
        """How many classes go through a step together."""
        spec = self.context.spec
        real = self.options.real_batch * COPIES * 4 * torch.Size(spec.shape).numel()
        budget = GROUP_BYTES.get(self.context.device.type, GROUP_BYTES["cpu"])
        return max(1, budget // (spec.work(self.ipc) * KEPT_LAYERS + real))

    def prepare(self, real: Any) -> None:
        super().prepare(real)
        images = self.options.real_batch * self.context.spec.classes * self.context.steps  # whoever owns the classes
        work = self.context.spec.work(images)
        self.embed_real = maybe_compile(self.embed, "auto", work)
        self.layout = self.context.spec.layout("match", self.context.device, will_compile("auto", work))
        self.layout.network(self.network)

    def step(self, i: int) -> dict[str, float]:
        fresh = self.context.spec.build(derive(self.context.seed, "network", i))
        self.network.load_state_dict(fresh.state_dict())
        self.optimizer.zero_grad()  # before there is a new one
        gradient, losses = torch.empty_like(self.images.detach()), []
        embedded = drawn = 0
        for first in range(0, len(self.context.labels), self.group):
            span = slice(first, first + self.group)
            images = self.images.detach()[span].requires_grad_(True)
            found, counts = self._losses(images, self.context.labels[span], i)
            gradient[span] = torch.autograd.grad(found.sum(), images)[0]
            losses.append(found.detach())
            embedded, drawn = embedded + counts[0], drawn + counts[1]
        self.images.grad = gradient
        self.update(list(torch.cat(losses)), i)
        self.raise_if_diverged()
        return {"loss": float(torch.cat(losses).mean()), "real_share": embedded / drawn}

    def _losses(self, images: Tensor, labels: list[int], step: int) -> tuple[Tensor, tuple[int, int]]:
        """The losses [classes] of images [classes, ipc, *shape]; how many real samples were embedded, and of how many."""
        draws = [self.augmentation.draw(generator(self.context.seed, "siamese", step, c)) for c in labels]
        synthetic = torch.cat([draw.apply(own) for draw, own in zip(draws, images.unbind(), strict=True)])
        means = self.embed(synthetic).view(len(draws), self.ipc, -1).mean(1)  # classes x features
        targets, counts = self._real_means(images.detach(), means.detach(), labels, draws, step)
        return (targets - means).square().sum(1), counts

    def _real_means(
        self, images: Tensor, means: Tensor, labels: list[int], draws: list[AugmentParams], step: int
    ) -> tuple[Tensor, tuple[int, int]]:
        """Mean feature of each class's real batch after runtime pruning [classes, features], and the counts."""
        batches = self.real.draw(labels, self.options.real_batch, "real batch", step)
        drawn = sum(len(batch.rows) for batch in batches)
        forecasts = [self.pruning.forecast(b.label, b.rows, self.real.count(b.label), step) for b in batches]
        real = [
            draw.apply(batch.images if forecast is None else batch.images[forecast.to(batch.images.device)])
            for draw, batch, forecast in zip(draws, batches, forecasts, strict=True)
        ]
        features = list(self._embed(torch.cat(real)).split([len(x) for x in real]))
        for k, (batch, forecast) in enumerate(zip(batches, forecasts, strict=True)):
            if forecast is None and self.pruning.dropped(len(batch.rows)):
                features[k] = features[k][self._look(batch, features[k], images[k], means[k], draws[k], step)]
        return torch.stack([found.mean(0) for found in features]), (sum(len(x) for x in real), drawn)

    def _look(
        self, batch: RealBatch, features: Tensor, images: Tensor, mean: Tensor, draw: AugmentParams, step: int
    ) -> Tensor:
        """Which samples of a batch that was embedded in full count."""

        def effects() -> Tensor:
            rng = generator(self.context.seed, "effects", step, batch.label)
            return feature_effects(
                self.embed, features, images, draw.apply, self.pruning.probes, rng, max(self.at_once // 2, 1)
            )

        values = self.pruning.values(loss=lambda: (features - mean).square().sum(1), ite=effects)
        return self.pruning.look(batch.label, batch.rows, self.real.count(batch.label), values)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Features [n, features]."""
        return in_parts(self.embed_real, self.layout.images(images), self.at_once)

"""DM, distribution matching (Zhao & Bilen 2023, arXiv 2110.04181; METHOD.md section 4).

Every step draws a new random network and moves each class's synthetic images so that their mean feature agrees with
that of the class's real batch, under a shared siamese augmentation. Classes are independent, so workers need not
talk to each other.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_at_scale.augment import Augmentation
from distill_at_scale.backends.base import ImageBackend, Setting
from distill_at_scale.config import Config
from distill_at_scale.networks import in_parts, maybe_compile, will_compile
from distill_at_scale.rng import derive, generator
from distill_at_scale.students import TrainingProtocol


class DistributionMatching(ImageBackend):
    default_steps: ClassVar[int] = 20_000

    @staticmethod
    def init_of(config: Config) -> str:
        return config.distill.dm.init

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        augment = config.distill.dm.augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    def __init__(self, setting: Setting) -> None:
        self.options = setting.config.distill.dm
        default_lr = 10.0 if setting.config.distill.ipc >= 100 else 1.0
        super().__init__(setting, self.options.init, self.options.image_lr or default_lr, self.options.image_momentum)
        self.augmentation = Augmentation(self.options.augment)
        self.at_once = setting.spec.at_once(setting.device)
        self.network = setting.spec.build(0).to(setting.device).train().requires_grad_(False)
        self.embed = setting.spec.embedding(self.network)

    def prepare(self, real: Any) -> None:
        super().prepare(real)
        images = self.options.real_batch * self.setting.spec.classes * self.setting.steps  # whoever owns the classes
        work = self.setting.spec.work(images)
        self.embed_real = maybe_compile(self.embed, "auto", work)
        self.channels_last = self.setting.spec.clips_last(self.setting.device, will_compile("auto", work))
        if self.channels_last:
            self.setting.spec.lay_out(self.network)

    def step(self, i: int) -> dict[str, float]:
        fresh = self.setting.spec.build(derive(self.setting.seed, "network", i))
        self.network.load_state_dict(fresh.state_dict())
        draws = [self.augmentation.draw(generator(self.setting.seed, "siamese", i, c)) for c in self.setting.labels]
        synthetic = torch.cat([draw.apply(self.images[k]) for k, draw in enumerate(draws)])
        means = self.embed(synthetic).view(len(draws), self.ipc, -1).mean(1)  # own classes x features
        targets, share = self._real_means(means.detach(), draws, i)
        losses = (targets - means).square().sum(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.update(list(losses), i)
        self.settle()
        return {"loss": float(losses.detach().mean()), "real_share": share}

    def _real_means(self, synthetic: Tensor, draws: list[Any], step: int) -> tuple[Tensor, float]:
        """Mean feature of each class's real batch after runtime pruning [own classes, features], and the share embedded."""
        batches = self.real.draw(self.setting.labels, self.options.real_batch, "real batch", step)
        forecasts, images = [], []
        for draw, batch in zip(draws, batches, strict=True):
            forecast = self.pruning.forecast(batch.label, batch.rows, self.real.count(batch.label), step)
            forecasts.append(forecast)
            images.append(draw.apply(batch.images if forecast is None else batch.images[forecast]))
        features = self._embed(torch.cat(images)).split([len(x) for x in images])
        means = []
        for k, (batch, forecast) in enumerate(zip(batches, forecasts, strict=True)):
            distances = (features[k] - synthetic[k]).square().sum(1)
            rows = batch.rows if forecast is None else batch.rows[forecast]
            if forecast is None and self.pruning.dropped(len(rows)):
                kept = self.pruning.look(batch.label, rows, self.real.count(batch.label), distances)
                means.append(features[k][kept].mean(0))
            else:
                means.append(features[k].mean(0))
        return torch.stack(means), sum(len(x) for x in images) / sum(len(b.rows) for b in batches)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Features [n, features]."""
        return in_parts(
            self.embed_real, self.setting.spec.laid_out(images) if self.channels_last else images, self.at_once
        )

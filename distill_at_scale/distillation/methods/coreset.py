"""Coreset: the first kept samples of each class, in the order of the manifest's rank, as they are.

With it every selection is a row of its own in a comparison. Nothing is optimised.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.distillation.methods.shared.real_images import RealImagesMethod
from distill_at_scale.distillation.student import TrainingProtocol


class Coreset(RealImagesMethod):
    no_runtime: ClassVar[str] = "coreset takes its real samples as they are, so there is no real batch to prune"
    section_name: ClassVar[str] = "coreset"

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        augment = cls.section(config).student_augment
        return TrainingProtocol(300 if augment == "none" else 1000, augment)

    @classmethod
    def first_kept(cls, config: Config) -> int:
        return config.distill.ipc

    def build(self, label: int) -> tuple[Tensor, dict[str, float]]:
        return self.real.normalization.apply(self.real.placement.of_class(label)).cpu(), {}

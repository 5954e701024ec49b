"""TESLA (Cui et al. 2023, arXiv 2211.10586): MTT with memory constant in `student_steps`, and learned soft labels.

With `learn_labels` the labels are logits [images, classes], learned with the images and saved as `soft_labels`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import TESLASection
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.contract import FinalOutputs
from distill_at_scale.distillation.methods.mtt import MTT
from distill_at_scale.distillation.methods.shared import unroll
from distill_at_scale.distillation.soft_labels import TeacherFacts
from distill_at_scale.distillation.student import TrainingProtocol

CLASS_LOGIT = 5.0  # of an image's class, the others 0, if labels start from the class alone


class TESLA(MTT):
    section_name: ClassVar[str] = "tesla"
    options: TESLASection

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        protocol = super().protocol(config)
        return replace(protocol, labels="soft") if cls.section(config).learn_labels else protocol

    def prepare(self, real: ClassSampler) -> None:
        self.logits: Tensor | None = None  # [own classes, ipc, classes]
        super().prepare(real)
        if not self.options.learn_labels:
            return
        logits = CLASS_LOGIT * F.one_hot(self.labels, self.context.spec.classes).float()
        if self.options.label_init == "experts" and self.options.init == "real":
            images = self.images.detach().flatten(0, 1)
            logits = torch.zeros_like(logits)
            for number in range(self.options.experts):
                (theta,) = self.experts.parameters(number, self.options.expert_epochs)
                logits += self.student.logits(theta, images) / self.options.experts
            # the logit of the image's own class is raised to the largest
            logits = logits.scatter(1, self.labels[:, None], logits.max(1, keepdim=True).values)
        self.logits = logits.view(*self.images.shape[:2], -1).requires_grad_(True)
        self.optimizer.add_param_group({"params": [self.logits], "lr": self.options.label_lr})

    def learned(self) -> dict[str, Tensor]:
        logits = {} if self.logits is None else {"logits": self.logits}
        return {"images": self.images, **logits, "rate": self.student_lr}

    def synthetic(self) -> unroll.SyntheticData:
        synthetic = super().synthetic()
        if self.logits is None:
            return synthetic
        return replace(synthetic, targets=self.logits.detach().flatten(0, 1).requires_grad_(True))

    def match(self, segment: unroll.TrajectorySegment, synthetic: unroll.SyntheticData) -> unroll.LossAndGradients:
        return unroll.recomputed(self.student, segment, synthetic, self.student_lr, self.options.gradient == "exact")

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        outputs = super().finalize(images, labels)
        if self.logits is None:
            return outputs
        extras = {**outputs.extras, "soft_labels": self.logits.detach().flatten(0, 1).cpu()}
        spec, card = self.context.spec, dict(outputs.card)
        if spec.kind != "tensors":  # an expert goes with the set, to give other images (of controls) soft labels
            (theta,) = self.experts.parameters(0, self.options.expert_epochs)
            views = zip(self.student.names, theta.split(self.student.sizes), self.student.shapes, strict=True)
            extras |= {f"teacher/{name}": part.view(shape).cpu() for name, part, shape in views}
            ones, zeros = (1.0,) * spec.shape[-3], (0.0,) * spec.shape[-3]  # the data's own normalisation
            facts = TeacherFacts(
                spec.name, spec.shape, spec.classes, spec.width, spec.depth, ones, zeros, origin="the first expert"
            )
            card["teacher"] = asdict(facts)
        return replace(outputs, extras=extras, card=card)

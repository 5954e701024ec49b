"""TESLA (Cui et al. 2023, arXiv 2211.10586): MTT with memory constant in `student_steps`, and learned soft labels.

`gradient: exact` is MTT's gradient, with the activations of one student step in memory. `gradient: fixed` is the paper's own
form, which ignores how the images of a step act through later parameters (both in `shared/unroll.py`). With `learn_labels`
the labels are logits [images, classes], learned with the images and saved as `soft_labels`. They start from the mean logits
of the trained experts (`label_init: experts`) or from the class alone, as they always do if the images start from noise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import TESLASection
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.base import FinalOutputs
from distill_at_scale.distillation.methods.mtt import MTT
from distill_at_scale.distillation.methods.shared import unroll
from distill_at_scale.distillation.student import TrainingProtocol

CLASS_LOGIT = 5.0  # of an image's class, the others 0, if labels start from the class alone


class TESLA(MTT):
    options: TESLASection

    @staticmethod
    def section(config: Config) -> TESLASection:
        return config.distill.tesla

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
            logits = self._expert_logits(torch.zeros_like(logits))
        self.logits = logits.view(*self.images.shape[:2], -1).requires_grad_(True)
        self.optimizer.add_param_group({"params": [self.logits], "lr": self.options.label_lr})

    @torch.no_grad()
    def _expert_logits(self, logits: Tensor) -> Tensor:
        """Adds the mean logits [n, classes] of the trained experts for the initial images.

        If another class has the largest logit, that of the image's own class is raised to the same value.
        """
        images = self.images.detach().flatten(0, 1)
        for number in range(self.options.experts):
            (theta,) = self.experts.parameters(number, self.options.expert_epochs)
            logits += self.student.logits(theta, images) / self.options.experts
        return logits.scatter(1, self.labels[:, None], logits.max(1, keepdim=True).values)

    def _learned(self) -> list[tuple[Tensor, float]]:
        images, student_lr = super()._learned()
        return [images, *([] if self.logits is None else [(self.logits, self.options.label_lr)]), student_lr]

    def synthetic(self) -> unroll.SyntheticData:
        synthetic = super().synthetic()
        if self.logits is None:
            return synthetic
        return replace(synthetic, targets=self.logits.detach().flatten(0, 1).requires_grad_(True))

    def match(self, segment: unroll.TrajectorySegment, synthetic: unroll.SyntheticData) -> unroll.LossAndGradients:
        return unroll.recomputed(
            self.student, segment, synthetic, self.student_lr, exact=self.options.gradient == "exact"
        )

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        outputs = super().finalize(images, labels)
        if self.logits is None:
            return outputs
        return replace(outputs, extras={**outputs.extras, "soft_labels": self.logits.detach().flatten(0, 1).cpu()})

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if self.logits is None:
            return state
        state |= {f"logits/{c}": self.logits[k].detach().cpu() for k, c in enumerate(self.context.labels)}
        buffer = self._buffer(self.logits)
        if buffer is None:
            return state
        return state | {f"logits momentum/{c}": buffer[k].cpu() for k, c in enumerate(self.context.labels)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.logits is None:
            return
        labels, device = self.context.labels, self.context.device
        with torch.no_grad():
            self.logits.copy_(torch.stack([state[f"logits/{c}"] for c in labels]))
        if f"logits momentum/{labels[0]}" in state:
            buffer = torch.stack([state[f"logits momentum/{c}"] for c in labels]).to(device)
            self.optimizer.state[self.logits]["momentum_buffer"] = buffer

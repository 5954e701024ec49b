"""TESLA (Cui et al. 2023, arXiv 2211.10586): trajectory matching with memory constant in student_steps, and soft labels.

`gradient: exact` is MTT's gradient with one step's activations in memory; `gradient: fixed` is TESLA's own form, which
leaves out how a step's images act through later parameters (both in `distillation/methods/shared/unroll.py`, which says what exactly is dropped).
With `learn_labels` the labels are logits [images, classes] that are learned with the images and saved as
`soft_labels`; they start from the mean logits of the trained experts, or (always where the images start from noise, of which
experts know nothing) from the class alone.
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
from distill_at_scale.distillation.methods.shared.unroll import (
    LossAndGradients,
    SyntheticData,
    TrajectorySegment,
    recomputed,
)
from distill_at_scale.distillation.student import TrainingProtocol

CERTAIN = 5.0  # the logit of an image's class, the others 0, where labels start from the class alone


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
        self.logits: Tensor | None = None
        super().prepare(real)
        if self.options.learn_labels:
            told = self.options.label_init == "experts" and self.options.init == "real"
            start = self._expert_logits() if told else self._class_logits()
            self.logits = start.view(*self.images.shape[:2], -1).requires_grad_(True)
            self.optimizer.add_param_group({"params": [self.logits], "lr": self.options.label_lr})

    def _class_logits(self) -> Tensor:
        return CERTAIN * F.one_hot(self.hard, self.context.spec.classes).float()

    @torch.no_grad()
    def _expert_logits(self) -> Tensor:
        """Mean logits [n, classes] that the experts give the initial images at their end.

        Where another class than the image's own is ahead, the own one is raised to draw level with it.
        """
        images, logits = self.images.detach().flatten(0, 1), torch.zeros_like(self._class_logits())
        for number in range(self.options.experts):
            (theta,) = self.experts.parameters(number, self.options.expert_epochs)
            logits += self.student.logits(theta, images) / self.options.experts
        return logits.scatter(1, self.hard[:, None], logits.max(1, keepdim=True).values)

    def _learned(self) -> list[tuple[Tensor, float]]:
        images, rate = super()._learned()
        return [images, *([] if self.logits is None else [(self.logits, self.options.label_lr)]), rate]

    def synthetic(self) -> SyntheticData:
        made = super().synthetic()
        return made if self.logits is None else replace(made, targets=self._flat_logits().requires_grad_(True))

    def _flat_logits(self) -> Tensor:
        assert self.logits is not None
        return self.logits.detach().flatten(0, 1)

    def match(self, task: TrajectorySegment, synthetic: SyntheticData) -> LossAndGradients:
        return recomputed(self.student, task, synthetic, self.rate, through=self.options.gradient == "exact")

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        made = super().finalize(images, labels)
        if self.logits is None:
            return made
        return replace(made, extras={**made.extras, "soft_labels": self._flat_logits().cpu()})

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

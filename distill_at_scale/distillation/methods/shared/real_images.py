"""Methods that build their images from real samples and optimise nothing: RDED, coresets and PCA.

Steps only divide the work: step i of n builds the classes whose label is i modulo n. One step is enough.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.contract import Method, MethodContext


class RealImagesMethod(Method):
    """A subclass builds the images of one class in `build`; this class has the steps, the state and the set.

    Attributes:
        images: float32 [own classes, ipc, *shape], normalised, on the CPU; zeros until their class is built.
        real: the kept samples of the own classes, or the first ones if `first_kept` says how many. Set by `prepare`.
    """

    default_steps: ClassVar[int] = 1
    batch_norm: ClassVar[str] = "any"  # distill.network is not used

    def __init__(self, context: MethodContext) -> None:
        self.context, self.ipc = context, context.config.distill.ipc

    @staticmethod
    def init_of(config: Config) -> str:
        return "noise"  # has its own minimum of kept samples, or none

    def build(self, label: int) -> tuple[Tensor, dict[str, float]]:
        """The images of a class [ipc, *shape], normalised, and values to log."""
        raise NotImplementedError

    def prepare(self, real: ClassSampler) -> None:
        self.real = real
        self.images = torch.zeros(len(self.context.labels), self.ipc, *self.context.spec.shape)

    def step(self, i: int) -> dict[str, float]:
        logged = []
        for k, label in enumerate(self.context.labels):
            if label % self.context.steps == i:
                self.images[k], values = self.build(label)
                logged.append(values)
        means = {key: sum(values[key] for values in logged) / len(logged) for key in (logged[0] if logged else {})}
        return {**means, "classes": float(len(logged))}

    def snapshot(self) -> tuple[Tensor, Tensor]:
        return self.images.flatten(0, 1).clone(), torch.tensor(self.context.labels).repeat_interleave(self.ipc)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"images/{label}": self.images[k] for k, label in enumerate(self.context.labels)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images = torch.stack([state[f"images/{label}"] for label in self.context.labels])

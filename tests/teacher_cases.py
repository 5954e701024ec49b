"""Small teachers of SRe2L and RDED."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from distill_at_scale.config import load as configuration
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher
from distill_at_scale.models.spec import NetworkSpec

SHAPE, CLASSES, HELD = (1, 8, 8), 3, 20
CPU = torch.device("cpu")
NAMES = ["zero", "one", "two"]
QUICK = {"teacher_network": "convnet_bn", "teacher_epochs": 3, "teacher_batch": 16, "teacher_augment": "none",
         "label_epochs": 2}  # fmt: skip


class Pooled(nn.Module):
    """A teacher with global pooling, so that it takes images of any size."""

    def __init__(self, spec: NetworkSpec):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(spec.shape[0], 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Linear(6, spec.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def make_sampler() -> ClassSampler:
    """Classes of different clearly different brightness."""
    chance = torch.Generator().manual_seed(0)
    noise = torch.randint(-20, 20, (CLASSES, HELD, *SHAPE), generator=chance)
    pixels = {c: (noise[c] + 60 + 60 * c).to(torch.uint8) for c in range(CLASSES)}
    return ClassSampler(pixels, Normalization((0.5,), (0.25,)), seed=0)


def make_config(method: str = "rded", **options):
    values = {"distill": {"method": method, "width": 6, "ipc": 2, method: QUICK | options},
              "data": {"size": 8, "channels": 1}}  # fmt: skip
    return configuration.validate(values)


def make_context(folder, method: str = "rded", steps: int = 1, **options) -> MethodContext:
    config = make_config(method, **options)
    spec = NetworkSpec("convnet", SHAPE, CLASSES, 6)
    context = MethodContext(config, spec, NAMES, list(range(CLASSES)), SingleProcess(), CPU, steps, folder)
    return replace(context, work=folder / "work")


def make_teacher(context: MethodContext, real: ClassSampler | None = None) -> Teacher:
    method = METHODS[context.config.distill.method]
    method.make_network(TEACHER, context, real or make_sampler())
    return Teacher.load(context.networks / TEACHER, CPU, method.section(context.config).teacher_network)

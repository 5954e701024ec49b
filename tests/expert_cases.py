"""MTT and TESLA on two small experts, and a reference unroll to compare their steps with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.models.spec import NetworkSpec

SHAPE, CLASSES, HELD = (1, 8, 8), 3, 9
CPU = torch.device("cpu")
SMALL = {"image_lr": 1.0, "image_momentum": 0.0, "student_lr": 0.1, "student_lr_rate": 1e-3, "student_steps": 4,
         "experts": 2, "expert_epochs": 4, "max_start": 2, "target_epochs": 2, "expert_batch": 8, "expert_lr": 0.1,
         "expert_augment": "none", "augment": "none"}  # fmt: skip


def make_sampler() -> ClassSampler:
    chance = torch.Generator().manual_seed(0)
    pixels = {c: torch.randint(256, (HELD, *SHAPE), dtype=torch.uint8, generator=chance) for c in range(CLASSES)}
    return ClassSampler(pixels, Normalization((0.5,), (0.3,)), seed=0)


def make_config(method: str = "mtt", ipc: int = 2, network: str = "convnet", **options) -> Config:
    own = {**SMALL, **options}
    section = {"method": method, "ipc": ipc, "width": 6, "network": network, "precision": "fp32", method: own}
    return configuration.validate({"distill": section})


def make_context(config: Config, folder: Path, workers=None, shape=SHAPE) -> MethodContext:
    spec = NetworkSpec(config.distill.network, shape, CLASSES, width=6)
    return MethodContext(config, spec, ["zero", "one", "two"], [0, 1, 2], workers or SingleProcess(), CPU, 1, folder)


def train_experts(folder: Path, **options) -> Path:
    config = make_config(**options)
    for name in METHODS["mtt"].networks(config):
        METHODS["mtt"].make_network(name, make_context(config, folder), make_sampler())
    return folder


def make_method(folder: Path, method: str = "mtt", workers=None, **options):
    matcher = METHODS[method](make_context(make_config(method, **options), folder, workers))
    matcher.prepare(make_sampler())
    return matcher


def assert_close(actual, expected, tolerance=1e-4):
    assert float(expected.abs().max()) > 0
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def reference_unroll(network, task, images, labels, rate):
    """Loss and gradients of images and rate: named parameters, one after the other, through every step."""
    images, rate = images.clone().requires_grad_(True), rate.clone().requires_grad_(True)
    named = dict(network.named_parameters())
    start, parts = {}, task.start.split([p.numel() for p in named.values()])
    for (name, like), part in zip(named.items(), parts, strict=True):
        start[name] = part.reshape(like.shape).clone().requires_grad_(True)
    theta = start
    for step in task.steps:
        loss = F.cross_entropy(functional_call(network, theta, (images[step.rows],)), labels[step.rows])
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {name: theta[name] - rate * g for name, g in zip(theta, gradients, strict=True)}
    end = torch.cat([p.reshape(-1) for p in theta.values()])
    loss = (end - task.target).pow(2).sum() / (task.start - task.target).pow(2).sum()
    return loss.detach(), *torch.autograd.grad(loss, [images, rate])

"""DC on a small subset at one image per class, for Monte Carlo subsets (`score.monte_carlo.learn: dc`).

Runs in this process, without runtime pruning, checkpoints and log.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core import rng
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.contract import MethodContext
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.pruning.scoring.monte_carlo import Distil, spec_of


def dc_distiller(config: Config, prepared: PreparedDataset, device: torch.device) -> Distil | None:
    """A function from a subset to one image per class; None if networks train on the subset itself."""
    section = config.score.monte_carlo
    if section.learn != "dc":
        return None
    overrides = {"distill.method": "dc", "distill.ipc": 1, "distill.dc.init": "real", "runtime.rule": "none",
                 "distill.precision": config.score.precision}  # fmt: skip
    spec, normalization = spec_of(config, prepared), normalization_of(prepared, whitened=False)

    def distil(stored: Mapping[int, Tensor], subset: int) -> tuple[Tensor, Tensor]:
        seed = rng.derive(config.run.seed, "monte carlo dc", subset)
        seeded, labels = with_overrides(config, {**overrides, "distill.seed": seed}), list(stored)
        method = DC(MethodContext(seeded, spec, prepared.class_names, labels, SingleProcess(), device, section.steps))
        pixels = {label: values.to(device) for label, values in stored.items()}
        method.prepare(ClassSampler(pixels, normalization, seed, device))
        for step in range(section.steps):
            method.step(step)
        images, targets = method.snapshot()
        return images.to(device), targets.to(device)

    return distil

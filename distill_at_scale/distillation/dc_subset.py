"""A small subset distilled by DC at one image per class, for Monte Carlo subsets (`score.monte_carlo.learn: dc`).

It is the backend itself, in this process, without runtime pruning, checkpoints and log. Left out: the training of a
network on the result (`pruning/scoring/monte_carlo.py`).
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
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.pruning.scoring.monte_carlo import Distil, spec_of


def distiller(config: Config, prepared: PreparedDataset, device: torch.device) -> Distil | None:
    """What turns a subset into one image per class, or None where networks are trained on the subset itself."""
    section = config.score.monte_carlo
    if section.learn != "dc":
        return None
    made = with_overrides(
        config, {"distill.method": "dc", "distill.ipc": 1, "distill.dc.init": "real", "runtime.rule": "none"}
    )
    spec, normalization = spec_of(config, prepared), normalization_of(prepared, whitened=False)

    def distil(stored: Mapping[int, Tensor], subset: int) -> tuple[Tensor, Tensor]:
        seed = rng.derive(config.run.seed, "monte carlo dc", subset)
        setting = MethodContext(
            with_overrides(made, {"distill.seed": seed}),
            spec,
            prepared.class_names,
            list(stored),
            SingleProcess(),
            device,
            section.steps,
        )
        backend = DC(setting)
        backend.prepare(
            ClassSampler({c: pixels.to(device) for c, pixels in stored.items()}, normalization, seed, device)
        )
        for step in range(section.steps):
            backend.step(step)
        images, labels = backend.snapshot()
        return images.to(device), labels.to(device)

    return distil

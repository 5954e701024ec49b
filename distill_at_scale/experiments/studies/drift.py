"""How utility drifts while a set is distilled: the loss of real samples under networks that learnt from it at several stages.

A stage is a distillation of so many steps, of the unpruned set, so that the selection does not decide what is found. Every
stage trains the network of the same seed; a second seed at the last one tells how much of the change is chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.core import rng
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.studies.base import UNPRUNED, StudyContext
from distill_at_scale.experiments.studies.rankings import RankSample
from distill_at_scale.models.spec import NetworkSpec, in_parts

STAGES = 4
FIRST = 0.01  # of all steps
READ_BYTES = 32 * 2**20  # of samples in memory at once

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drift:
    steps: list[int]
    losses: Array  # float32 [n, stages]
    again: Array  # float32 [n]: the last stage under a network of another seed
    accuracies: list[float]  # of each stage


def stages(config: Config) -> list[int]:
    """The configured steps, else a few of the run's: from a hundredth to all, evenly by their logarithm."""
    if config.studies.stability.steps:
        return sorted(set(config.studies.stability.steps))
    whole = config.studies.steps or config.distill.steps
    if whole is None:
        whole = int(getattr(resolve("distill.method", config.distill.method, METHODS), "default_steps", 1000))
    return sorted({max(1, round(step)) for step in np.geomspace(max(1.0, FIRST * whole), whole, STAGES).tolist()})


def points(context: StudyContext) -> list[Point]:
    overrides = {**context.overrides, **UNPRUNED}
    return [Point({**overrides, "distill.steps": step}) for step in stages(context.config)]


def measure(context: StudyContext, drawn: RankSample) -> Drift | None:
    """None where nothing is evaluated, as the data have no test split."""
    outcomes = context.points.run(points(context))
    if len(outcomes) < 2:
        return None
    steps = [outcome.point.overrides["distill.steps"] for outcome in outcomes]
    losses = [losses_of(context.config, outcome, drawn, 0) for outcome in outcomes]
    again = losses_of(context.config, outcomes[-1], drawn, 1)
    return Drift(steps, np.stack(losses, 1), again, [outcome.accuracy() for outcome in outcomes])


def losses_of(config: Config, outcome: Outcome, drawn: RankSample, draw: int) -> Array:
    """Cross-entropy float32 [n] of real training samples under a network trained on the outcome's set."""
    made, prepared = synthetic_set.load(outcome.folder / "synthetic"), PreparedDataset(outcome.folder / "prepared")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distill, classes = config.distill, len(prepared.class_names)
    name = config.evaluate.networks[0]
    spec = NetworkSpec(name, prepared.shape, classes, distill.width, distill.depth, prepared.kind)
    seed = rng.derive(config.run.seed, "drift", name, draw)
    protocol = made.protocol.overridden(config.evaluate)
    network = students.train(spec, made.training_set(), protocol, seed, device).eval()
    return _losses(network, spec, prepared, made.normalization, drawn, device)


@torch.no_grad()
def _losses(
    network: nn.Module,
    spec: NetworkSpec,
    prepared: PreparedDataset,
    normal: Normalization,
    drawn: RankSample,
    device: torch.device,
) -> Array:
    found, size = [np.zeros(0, np.float32)], max(1, READ_BYTES // prepared.sample_bytes)
    for label in np.unique(drawn.labels).tolist():
        places = drawn.places[drawn.labels == label]
        for start in range(0, len(places), size):
            samples = torch.from_numpy(prepared.take("train", label, places[start : start + size])).to(device)
            logits = in_parts(lambda part: network(normal.apply(part)), samples, spec.microbatch(device))
            targets = torch.full((len(samples),), label, device=device)
            found.append(F.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy())
    return np.concatenate(found)

"""Does utility drift while a set is distilled? The loss of real samples under networks trained on the set at several stages.

A stage is a distillation of a given number of steps from the unpruned set, so that the selection does not affect the result.
Each stage trains a network from the same seed; a second seed at the last stage shows how much of the change is chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.core import rng
from distill_at_scale.data.prepared.dataset import PreparedDataset
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
    """The configured numbers of steps; by default from a hundredth to all of the run's steps, evenly on a log scale."""
    if config.studies.stability.steps:
        return sorted(set(config.studies.stability.steps))
    steps = config.studies.steps or config.distill.steps
    if steps is None:
        steps = int(getattr(resolve("distill.method", config.distill.method, METHODS), "default_steps", 1000))
    return sorted({max(1, round(step)) for step in np.geomspace(max(1.0, FIRST * steps), steps, STAGES).tolist()})


def points(context: StudyContext) -> list[Point]:
    overrides = {**context.overrides, **UNPRUNED}
    return [Point({**overrides, "distill.steps": step}) for step in stages(context.config)]


def measure(context: StudyContext, sample: RankSample) -> Drift | None:
    """None for fewer than two stages, or where nothing is evaluated for want of a test split."""
    outcomes = context.points.run(points(context))
    if len(outcomes) < 2:
        return None
    steps = [outcome.point.overrides["distill.steps"] for outcome in outcomes]
    losses = [losses_of(context.config, outcome, sample, 0) for outcome in outcomes]
    again = losses_of(context.config, outcomes[-1], sample, 1)
    return Drift(steps, np.stack(losses, 1), again, [outcome.accuracy() for outcome in outcomes])


def losses_of(config: Config, outcome: Outcome, sample: RankSample, draw: int) -> Array:
    """Cross-entropy, float32 [n], of real training samples under a network trained on the outcome's synthetic set."""
    synthetic, prepared = synthetic_set.load(outcome.folder / "synthetic"), PreparedDataset(outcome.folder / "prepared")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distill, classes, name = config.distill, len(prepared.class_names), config.evaluate.networks[0]
    spec = NetworkSpec(name, prepared.shape, classes, distill.width, distill.depth, prepared.kind)
    seed = rng.derive(config.run.seed, "drift", name, draw)
    protocol = synthetic.protocol.overridden(config.evaluate)
    network = students.train(spec, synthetic.training_set(), protocol, seed, device, config.evaluate.precision).eval()
    normalize = synthetic.normalization.apply
    losses, size = [np.zeros(0, np.float32)], max(1, READ_BYTES // prepared.sample_bytes)
    with torch.no_grad():
        for label in np.unique(sample.labels).tolist():
            places = sample.places[sample.labels == label]
            for start in range(0, len(places), size):
                images = torch.from_numpy(prepared.take("train", label, places[start : start + size])).to(device)
                logits = in_parts(lambda part: network(normalize(part)), images, spec.microbatch(device))
                targets = torch.full((len(images),), label, device=device)
                losses.append(F.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy())
    return np.concatenate(losses)

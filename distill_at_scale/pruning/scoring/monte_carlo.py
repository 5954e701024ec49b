"""Criterion monte_carlo: the utility of a sample is the mean accuracy of its class over random subsets that contain it.

Subset k is drawn from (seed, "monte carlo", k). A small network is trained on it, or on what DC distils it into, and tested on
other samples of the training split: selecting by accuracy on the test split would bias all later results on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import MonteCarloSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.models.spec import NetworkSpec, in_parts
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO

HELD_BYTES = 2**30  # a training split up to this size is kept in the memory of each process
BATCH, MOMENTUM = 256, 0.9

Array = np.ndarray[Any, Any]
SubsetRange = tuple[int, int]  # the first subset, and the number of subsets
Distil = Callable[[Mapping[int, Tensor], int], tuple[Tensor, Tensor]]
# stored samples by class [n, *shape] and the number of the subset -> normalized images [m, *shape], labels [m]


@dataclass(frozen=True)
class Subset:
    """Positions within a class, ascending: training samples and validation samples."""

    members: Array
    validation: Array


def draw_subset(seed: int, subset: int, counts: Sequence[int], section: MonteCarloSection) -> list[Subset]:
    """One subset, class by class; a class of fewer than 2 * `per_class` samples gives half of its samples."""
    generator, classes = rng.numpy_generator(seed, "monte carlo", subset), []
    for count in counts:
        size = min(section.per_class, count // 2)
        drawn = generator.choice(count, size + min(section.validation, count - size), replace=False)
        classes.append(Subset(np.sort(drawn[:size]), np.sort(drawn[size:])))
    return classes


def check(config: Config, prepared: PreparedDataset) -> None:
    """Raises UserError if a class is too small to train and test on, or the subsets are too few for all samples."""
    section, counts = config.score.monte_carlo, prepared.counts()
    if (smallest := min(counts)) < 2:
        name = prepared.class_names[counts.index(smallest)]
        raise UserError(
            f"the class {name!r} has {smallest} training samples; the criterion {MONTE_CARLO} needs two, one to train and one "
            "to test on; leave the class out (data.classes) or use another criterion"
        )
    largest = max(counts)
    size = min(section.per_class, largest // 2)
    if (expected := section.subsets * size / largest) < 1:
        raise UserError(
            f"score.monte_carlo.subsets = {section.subsets}: a sample of the class "
            f"{prepared.class_names[counts.index(largest)]!r} ({largest} samples) would be in {expected:.2f} subsets on "
            f"average, and most would have no utility; use at least {-(-largest // size)} subsets of {size} per class, about "
            "50 times as many for a usable estimate"
        )


def work_key(config: Config, prepared: PreparedDataset) -> str:
    """A digest of everything that the accuracy of a subset depends on, but not of the number of subsets."""
    score, distils = config.score, config.score.monte_carlo.learn == "dc"
    section = score.monte_carlo.model_dump(exclude={"subsets", "at_once", *(() if distils else ("steps",))})
    dc = config.distill.dc.model_dump() if distils else None
    return digest([section, score.network, score.depth, config.run.seed, prepared.fingerprint, dc])[:16]


def subset_ranges(section: MonteCarloSection) -> list[SubsetRange]:
    """The units of work: consecutive subsets, `at_once` of them each."""
    starts = range(0, section.subsets, section.at_once)
    return [(first, min(section.at_once, section.subsets - first)) for first in starts]


def subset_part_path(folder: Path, unit: SubsetRange) -> Path:
    return folder / f"subsets-{unit[0]:07d}-{unit[1]}.safetensors"


def spec_of(config: Config, prepared: PreparedDataset) -> NetworkSpec:
    """The scoring network with the width of score.monte_carlo.width."""
    score, classes = config.score, len(prepared.class_names)
    return NetworkSpec(score.network, prepared.shape, classes, score.monte_carlo.width, score.depth, prepared.kind)


class SubsetTrials:
    """Trains and tests networks on subsets, in one process; `distil` reduces a subset first (score.monte_carlo.learn)."""

    def __init__(self, config: Config, prepared: Path, device: torch.device, distil: Distil | None = None):
        self.prepared, self.device, self.distil = PreparedDataset(prepared), device, distil
        self.section, self.seed = config.score.monte_carlo, config.run.seed
        self.spec = spec_of(config, self.prepared)
        self.normalization = normalization_of(self.prepared, whitened=False)
        self.counts, self.pixels = self.prepared.counts(), None
        if sum(self.counts) * self.prepared.sample_bytes <= HELD_BYTES:
            pixels, labels = self.prepared.load("train")
            self.pixels = {c: torch.from_numpy(pixels[labels == c]) for c in range(len(self.counts))}

    def publish(self, unit: SubsetRange, folder: Path) -> None:
        """Run a range of subsets and publish their accuracies, float32 [subsets, classes]."""
        accuracies = torch.stack([self.run(subset) for subset in range(unit[0], sum(unit))])
        safetensors_io.save(subset_part_path(folder, unit), {"accuracies": accuracies})

    def run(self, subset: int) -> Tensor:
        """The accuracy of each class, float32 [classes], averaged over `networks` networks.

        Raises DistillationDiverged if a weight is not finite.
        """
        parts = draw_subset(self.seed, subset, self.counts, self.section)
        stored = {c: self._take(c, part.members) for c, part in enumerate(parts)}
        if self.distil is None:
            images = self.normalization.apply(torch.cat(list(stored.values())).to(self.device))
            labels = torch.cat([torch.full((len(pixels),), c) for c, pixels in stored.items()]).to(self.device)
        else:
            images, labels = self.distil(stored, subset)
        tested = torch.cat([self._take(c, part.validation) for c, part in enumerate(parts)])
        tested, sizes = self.normalization.apply(tested.to(self.device)), [len(part.validation) for part in parts]
        accuracies = []
        for number in range(self.section.networks):
            network = self._train(images, labels, subset, number)
            with torch.no_grad():
                predicted = in_parts(network, tested, self.spec.microbatch(self.device)).argmax(1).cpu()
            accuracies.append(torch.stack([(own == c).float().mean() for c, own in enumerate(predicted.split(sizes))]))
        return torch.stack(accuracies).mean(0)

    def _train(self, images: Tensor, labels: Tensor, subset: int, number: int) -> nn.Module:
        network = self.spec.build(rng.derive(self.seed, "monte carlo network", subset, number)).to(self.device).train()
        parameters: list[Tensor] = list(network.parameters())
        velocities = [torch.zeros_like(parameter) for parameter in parameters]
        generator, count = rng.generator(self.seed, "monte carlo order", subset, number), len(labels)
        for _ in range(self.section.epochs):
            batches: Sequence[Tensor | slice] = [slice(None)]
            if count > BATCH:
                batches = torch.randperm(count, generator=generator).split(BATCH)
            for rows in batches:
                gradients = torch.autograd.grad(F.cross_entropy(network(images[rows]), labels[rows]), parameters)
                with torch.no_grad():
                    torch._foreach_mul_(velocities, MOMENTUM)
                    torch._foreach_add_(velocities, gradients)
                    torch._foreach_add_(parameters, velocities, alpha=-self.section.lr)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise DistillationDiverged(
                f"a Monte Carlo network diverged on subset {subset} at score.monte_carlo.lr = {self.section.lr:g}; lower it"
            )
        return network.eval()

    def _take(self, label: int, positions: Array) -> Tensor:
        if self.pixels is not None:
            return self.pixels[label][torch.from_numpy(positions)]
        return torch.from_numpy(np.array(self.prepared.take("train", label, positions)))

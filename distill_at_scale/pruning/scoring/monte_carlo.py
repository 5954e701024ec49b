"""Criterion monte_carlo: what a sample is worth, measured on many small random subsets (METHOD.md section 2).

Subset k holds `per_class` samples of every class, drawn from (seed, "monte carlo", k). A small network learns from it, or
from what DC distils it into, and is tested on `validation` other samples of every class, drawn from the rest of the
training split: they change with k, so that every sample gets a utility and none is judged by a network that has seen it.
The test split is never touched: a selection by accuracy on it would make every later figure on it too good. The utility
of a sample is the mean accuracy of its own class over the subsets that held it; high is useful.

Subsets are independent: units of some of them are published as they are done, whoever does them, and neither done again
after an interruption nor when more are asked for. Left out: how the work is spread (`pruning/scoring/monte_carlo.py`), and DC
(`distillation/dc_subset.py`, which is handed in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

HELD_BYTES = 2**30  # a training split up to this is kept in memory by every process that runs subsets
BATCH, MOMENTUM = 256, 0.9

Array = np.ndarray[Any, Any]
SubsetRange = tuple[int, int]  # the first subset, and how many
Distil = Callable[[Mapping[int, Tensor], int], tuple[Tensor, Tensor]]
# stored samples by class [n, *shape] and the number of the subset -> normalised images [m, *shape], labels [m]


@dataclass(frozen=True)
class Subset:
    """Places within a class, ascending: what is learned from, and what is tested on."""

    members: Array
    validation: Array


def draw_subset(seed: int, subset: int, counts: Sequence[int], section: MonteCarloSection) -> list[Subset]:
    """A subset by class; of a class of fewer than twice `per_class` samples half is learned from."""
    generator, found = rng.numpy_generator(seed, "monte carlo", subset), []
    for count in counts:
        few = min(section.per_class, count // 2)
        places = generator.choice(count, few + min(section.validation, count - few), replace=False)
        found.append(Subset(np.sort(places[:few]), np.sort(places[few:])))
    return found


def check(config: Config, prepared: PreparedDataset) -> None:
    """Raises UserError where a class is too small to be learned and tested, or the subsets are too few to hold every sample."""
    section, counts = config.score.monte_carlo, prepared.counts()
    if (least := min(counts)) < 2:
        name = prepared.class_names[counts.index(least)]
        raise UserError(f"the class {name!r} has {least} training samples; the criterion {MONTE_CARLO} needs two, one to learn "
                        "from and one to test on; leave the class out (data.classes) or take another criterion")  # fmt: skip
    most = max(counts)
    expected = section.subsets * min(section.per_class, most // 2) / most
    if expected < 1:
        needed = -(-most // min(section.per_class, most // 2))
        raise UserError(
            f"score.monte_carlo.subsets = {section.subsets}: a sample of the class "
            f"{prepared.class_names[counts.index(most)]!r} ({most} samples) would be in {expected:.2f} subsets on the average, "
            f"and most would have no utility; at least {needed} subsets of {section.per_class} a class are needed, some 50 "
            f"times as many for a usable estimate"
        )


def work_key(config: Config, prepared: PreparedDataset) -> str:
    """Stands for everything that the accuracy of a subset depends on; not for how many there are."""
    score = config.score
    section = score.monte_carlo.model_dump(exclude={"subsets", "at_once", *(() if _distils(config) else ("steps",))})
    dc = config.distill.dc.model_dump() if _distils(config) else None
    return digest([section, score.network, score.depth, config.run.seed, prepared.fingerprint, dc])[:16]


def subset_ranges(section: MonteCarloSection) -> list[SubsetRange]:
    return [
        (first, min(section.at_once, section.subsets - first)) for first in range(0, section.subsets, section.at_once)
    ]


def subset_part_path(pieces: Path, unit: SubsetRange) -> Path:
    return pieces / f"subsets-{unit[0]:07d}-{unit[1]}.safetensors"


class SubsetTrials:
    """What a process needs to run subsets: the training split, if it fits, and how a network is made and trained."""

    def __init__(self, config: Config, prepared: Path, device: torch.device, distil: Distil | None = None):
        self.prepared, self.section, self.device, self.distil = (
            PreparedDataset(prepared),
            config.score.monte_carlo,
            device,
            distil,
        )
        self.seed = config.run.seed
        self.spec = spec_of(config, self.prepared)
        self.normalization = normalization_of(self.prepared, whitened=False)
        self.counts = self.prepared.counts()
        held = sum(self.counts) * self.prepared.value_bytes <= HELD_BYTES
        self.pixels = dict(self._by_class()) if held else None

    def publish(self, unit: SubsetRange, pieces: Path) -> None:
        """Run the subsets of a unit and leave their accuracies, float32 [subsets, classes]."""
        found = torch.stack([self.run(subset) for subset in range(unit[0], sum(unit))])
        safetensors_io.save(subset_part_path(pieces, unit), {"accuracies": found})

    def run(self, subset: int) -> Tensor:
        """The accuracy of every class, float32 [classes], as the mean over the networks.

        Raises DistillationDiverged where a weight is not finite.
        """
        drawn = draw_subset(self.seed, subset, self.counts, self.section)
        learned = {c: self._take(c, parts.members) for c, parts in enumerate(drawn)}
        images, labels = self._given(learned) if self.distil is None else self.distil(learned, subset)
        tested = self._normal(torch.cat([self._take(c, parts.validation) for c, parts in enumerate(drawn)]))
        sizes = [len(parts.validation) for parts in drawn]
        networks = range(self.section.networks)
        return torch.stack(
            [self._accuracy(self._learn(images, labels, subset, n), tested, sizes) for n in networks]
        ).mean(0)

    def _given(self, learned: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        labels = torch.cat([torch.full((len(found),), c) for c, found in learned.items()])
        return self._normal(torch.cat(list(learned.values()))), labels.to(self.device)

    def _learn(self, images: Tensor, labels: Tensor, subset: int, number: int) -> nn.Module:
        """Plain SGD with momentum, epochs times over all of it."""
        network = self.spec.build(rng.derive(self.seed, "monte carlo network", subset, number)).to(self.device).train()
        parameters: list[Tensor] = list(network.parameters())
        speeds = [torch.zeros_like(parameter) for parameter in parameters]
        order = rng.generator(self.seed, "monte carlo order", subset, number)
        for _ in range(self.section.epochs):
            for rows in _batches(len(labels), order):
                loss = F.cross_entropy(network(images[rows]), labels[rows])
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_mul_(speeds, MOMENTUM)
                    torch._foreach_add_(speeds, gradients)
                    torch._foreach_add_(parameters, speeds, alpha=-self.section.lr)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise DistillationDiverged(
                f"a Monte Carlo network diverged on subset {subset} at score.monte_carlo.lr = {self.section.lr:g}; lower it"
            )
        return network.eval()

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, tested: Tensor, sizes: Sequence[int]) -> Tensor:
        """Samples sorted by class, so many of each -> the share that is right [classes]."""
        found = in_parts(network, tested, self.spec.at_once(self.device)).argmax(1).cpu()
        parts = found.split(list(sizes))
        return torch.stack([(part == c).float().mean() for c, part in enumerate(parts)])

    def _normal(self, stored: Tensor) -> Tensor:
        return self.normalization.apply(stored.to(self.device))

    def _take(self, label: int, places: Array) -> Tensor:
        if self.pixels is not None:
            return self.pixels[label][torch.from_numpy(places)]
        return torch.from_numpy(np.array(self.prepared.take("train", label, places)))

    def _by_class(self) -> Iterator[tuple[int, Tensor]]:
        pixels, labels = self.prepared.load("train")
        for label in range(len(self.counts)):
            yield label, torch.from_numpy(pixels[labels == label])


def spec_of(config: Config, prepared: PreparedDataset) -> NetworkSpec:
    """The scorer's network, as narrow as score.monte_carlo.width."""
    score, classes = config.score, len(prepared.class_names)
    return NetworkSpec(score.network, prepared.shape, classes, score.monte_carlo.width, score.depth, prepared.kind)


def _distils(config: Config) -> bool:
    return config.score.monte_carlo.learn == "dc"


def _batches(count: int, order: torch.Generator) -> Sequence[Tensor | slice]:
    """All at once, where that is a batch: then the order means nothing."""
    return [slice(None)] if count <= BATCH else torch.randperm(count, generator=order).split(BATCH)

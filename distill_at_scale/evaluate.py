"""How good a set is: train fresh networks on it and test them on real data (hard-label protocol, METHOD.md section 4).

Beside the distilled set always stand random real images of the same count, a new draw per seed; on request also the
kept and the full training set as upper bounds. One job is one (set, network, seed) and needs nothing of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale import rng, synthetic
from distill_at_scale.augment import Augmentation
from distill_at_scale.config import Config, EvaluateSection
from distill_at_scale.data.pool import Normalization
from distill_at_scale.data.shards import Prepared
from distill_at_scale.errors import DistillationDiverged, UserError
from distill_at_scale.networks import NetworkSpec
from distill_at_scale.pruning.manifest import kept


@dataclass(frozen=True)
class Job:
    """One network to train and test."""

    set: str  # distilled | random_real | kept | full
    network: str
    seed: int


def jobs(config: Config) -> list[Job]:
    sets = ["distilled", "random_real", *config.evaluate.bounds]
    return [Job(s, n, seed) for s in sets for n in config.evaluate.networks for seed in range(config.evaluate.seeds)]


class Evaluator:
    """Runs jobs; holds the test split in memory."""

    def __init__(self, config: Config, prepared: Path, synthetic_folder: Path, manifest: Path, device: torch.device):
        self.config, self.device, self.manifest = config, device, manifest
        self.prepared = Prepared(prepared)
        need_test_split(self.prepared)
        self.synthetic = synthetic.load(synthetic_folder)
        pixels, labels = self.prepared.load("test")
        self.test = torch.from_numpy(pixels), torch.from_numpy(labels)

    def run(self, job: Job) -> dict[str, Any]:
        """One row of evaluation.json: set, network, seed, top1, top5 (fractions of the test split) and seconds.

        Raises DistillationDiverged where training does not stay finite, naming the job.
        """
        started = time.perf_counter()
        images, labels = self._training_set(job)
        distill = self.config.distill
        classes = len(self.prepared.class_names)
        spec = NetworkSpec(job.network, self.prepared.shape, classes, distill.width, distill.depth)
        protocol = self.synthetic.card["protocol"]
        seed = rng.derive(self.config.run.seed, "evaluation", job.set, job.network, job.seed)
        normalization = self.synthetic.normalization if images.dtype == torch.uint8 else None
        network = train(spec, images, labels, self.config.evaluate, self._epochs(job), protocol["augment"], seed, self.device,
                        normalization)  # fmt: skip
        at_once = spec.at_once(self.device)
        top1, top5 = test(network, *self.test, self.synthetic.normalization, self.device, at_once)
        if not all(torch.isfinite(p).all() for p in network.parameters()):
            raise DistillationDiverged(
                f"evaluation diverged for {job}, at evaluate.lr = {self.config.evaluate.lr}; lower it"
            )
        return {**asdict(job), "top1": top1, "top5": top5, "seconds": round(time.perf_counter() - started, 3)}

    def _epochs(self, job: Job) -> int:
        if job.set in ("kept", "full"):
            return self.config.evaluate.bound_epochs
        return self.config.evaluate.epochs or int(self.synthetic.card["protocol"]["epochs"])

    def _training_set(self, job: Job) -> tuple[Tensor, Tensor]:
        """Images, normalised float32 or (for large sets) uint8, and labels."""
        if job.set == "distilled":
            return self.synthetic.images, self.synthetic.labels
        if job.set == "random_real":
            pixels, found = random_real(self.prepared, self.config.distill.ipc, self.config.run.seed, job.seed)
        else:
            pixels, found = self.prepared.load("train", only=kept(self.manifest) if job.set == "kept" else None)
        return torch.from_numpy(pixels), torch.from_numpy(found)


class Splits(Protocol):
    """Prepared data, or what will be."""

    def has_test(self) -> bool: ...


def need_test_split(prepared: Splits) -> None:
    """Raises UserError where there is nothing to test on."""
    if not prepared.has_test():
        raise UserError("the data set has no test split, so nothing can be evaluated; add one (a folder or files named test "
                        "or val) or set data.holdout, for example data.holdout=0.2")  # fmt: skip


def random_real(
    prepared: Prepared, ipc: int, seed: int, draw: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """ipc random training samples of every class (all of it, if it has fewer): pixels uint8 and labels."""
    pixels, labels = [], []
    for label, count in enumerate(prepared.counts("train")):
        places = rng.numpy_generator(seed, "random real", draw, label).permutation(count)[:ipc]
        pixels.append(prepared.take("train", label, sorted(places.tolist())))
        labels.append(np.full(len(places), label, np.int64))
    return np.concatenate(pixels), np.concatenate(labels)


def train(
    spec: NetworkSpec, images: Tensor, labels: Tensor, config: EvaluateSection, epochs: int, augment: str, seed: int,
    device: torch.device, normalization: Normalization | None = None,
) -> nn.Module:  # fmt: skip
    """A network trained from scratch: SGD, learning rate divided by ten at half time; the whole set lies on the device."""
    network = spec.build(rng.derive(seed, "network")).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2 + 1], gamma=0.1)
    augmentation = Augmentation(augment)
    images, labels = images.to(device), labels.to(device)
    for epoch in range(epochs):
        generator = rng.generator(seed, "epoch", epoch)
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(config.batch):
            batch = images[rows]
            if normalization is not None:
                batch = normalization.apply(batch)
            logits = network(augmentation.draw(generator, per_image=len(rows)).apply(batch))
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network


@torch.no_grad()
def test(
    network: nn.Module, pixels: Tensor, labels: Tensor, normalization: Normalization, device: torch.device, at_once: int
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on uint8 pixels [n, *shape], as fractions; `at_once` images at a time."""
    network.eval()
    right1 = right5 = 0
    for first in range(0, len(labels), at_once):
        logits = network(normalization.apply(pixels[first : first + at_once].to(device)))
        targets = labels[first : first + at_once].to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right1 += int((best[:, 0] == targets).sum())
        right5 += int((best == targets[:, None]).any(1).sum())
    return right1 / len(labels), right5 / len(labels)


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set and network: mean and sample standard deviation of top-1 and top-5 over seeds (std null for n = 1), and n."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["network"]), []).append(row)
    summary = []
    for (name, network), members in groups.items():
        top1, top5 = [r["top1"] for r in members], [r["top5"] for r in members]
        summary.append({"set": name, "network": network, "n": len(members), "mean": statistics.fmean(top1), "std": _std(top1),
                        "mean_top5": statistics.fmean(top5), "std_top5": _std(top5)})  # fmt: skip
    return summary


def _std(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None

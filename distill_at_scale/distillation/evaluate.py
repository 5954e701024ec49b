"""How good a set is: train fresh networks on it by the protocol that it expects, and test them on real data.

Beside the distilled set always stand random real images of the same count, a new draw per seed; on request also the
kept and the full training set as upper bounds, with hard labels. Where the set has a teacher's labels for its views, the
control gets the same teacher's, under the same protocol. One job is one (set, network, seed) and needs nothing of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core import rng
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.manifest import kept
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.soft_labels import TeacherLabels
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.spec import NetworkSpec


@dataclass(frozen=True)
class EvaluationJob:
    """One network to train and test."""

    set: str  # distilled | random_real | kept | full
    network: str
    seed: int


def jobs(config: Config) -> list[EvaluationJob]:
    controls = [] if config.evaluate.control == "none" else [config.evaluate.control]
    sets = ["distilled", *controls, *config.evaluate.bounds]
    return [
        EvaluationJob(s, n, seed)
        for s in sets
        for n in config.evaluate.networks
        for seed in range(config.evaluate.seeds)
    ]


class Evaluator:
    """Runs jobs; holds the test split in memory."""

    def __init__(self, config: Config, prepared: Path, synthetic_folder: Path, manifest: Path, device: torch.device):
        self.config, self.device, self.manifest = config, device, manifest
        self.prepared = PreparedDataset(prepared)
        need_test_split(self.prepared)
        self.synthetic = synthetic_set.load(synthetic_folder)
        pixels, labels = self.prepared.load("test")
        self.test = torch.from_numpy(pixels), torch.from_numpy(labels)

    def run(self, job: EvaluationJob) -> dict[str, Any]:
        """One row of evaluation.json: set, network, seed, top1, top5 (fractions of the test split), per_class and seconds.

        Raises DistillationDiverged where training does not stay finite, naming the job.
        """
        started = time.perf_counter()
        distill, classes = self.config.distill, len(self.prepared.class_names)
        spec = NetworkSpec(job.network, self.prepared.shape, classes, distill.width, distill.depth, self.prepared.kind)
        seed = rng.derive(self.config.run.seed, "evaluation", job.set, job.network, job.seed)
        protocol = self._protocol(job)
        network = students.train(spec, self._training_set(job), protocol, seed, self.device)
        at_once = spec.at_once(self.device)
        found = students.examine(network, *self.test, self.synthetic.normalization, self.device, at_once)
        if not all(torch.isfinite(p).all() for p in network.parameters()):
            raise DistillationDiverged(
                f"evaluation diverged for {job}, at a learning rate of {protocol.lr:g}; lower evaluate.lr"
            )
        return {**asdict(job), **asdict(found), "seconds": round(time.perf_counter() - started, 3)}

    def _protocol(self, job: EvaluationJob) -> TrainingProtocol:
        expected = self.synthetic.protocol
        if job.set != "distilled" and "student_lr" in self.synthetic.card:  # learned for these images alone
            expected = replace(expected, lr=TrainingProtocol(1).lr)
        if job.set != "distilled" and expected.labels == "soft":
            expected = replace(expected, labels="hard")
        if job.set in ("kept", "full") and expected.labels == "views":
            expected = replace(expected, labels="hard", cutmix=0.0)
        protocol = expected.overridden(self.config.evaluate)
        return replace(protocol, epochs=self.config.evaluate.bound_epochs) if job.set in ("kept", "full") else protocol

    def _training_set(self, job: EvaluationJob) -> TrainingSet:
        if job.set == "distilled":
            return self.synthetic.training_set()
        if job.set == "random_real":
            pixels, found = random_real(self.prepared, self.config.distill.ipc, self.config.run.seed, job.seed)
        else:
            pixels, found = self.prepared.load("train", only=kept(self.manifest) if job.set == "kept" else None)
        made = TrainingSet(torch.from_numpy(pixels), torch.from_numpy(found), self.synthetic.normalization)
        if job.set == "random_real" and self.synthetic.protocol.labels == "views":
            return replace(made, views=self._asked)  # the same teacher's labels, or the comparison would be unfair
        return made

    @cached_property
    def _asked(self) -> TeacherLabels:
        method = self.config.distill.method
        network = getattr(getattr(self.config.distill, method, None), "teacher_network", None)
        return self.synthetic.asked(self.device, network)


class Splits(Protocol):
    """Prepared data, or what will be."""

    def has_test(self) -> bool: ...


def need_test_split(prepared: Splits) -> None:
    """Raises UserError where there is nothing to test on."""
    if not prepared.has_test():
        raise UserError("the data set has no test split, so nothing can be evaluated; add one (a folder or files named test "
                        "or val) or set data.holdout, for example data.holdout=0.2")  # fmt: skip


def random_real(
    prepared: PreparedDataset, ipc: int, seed: int, draw: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """ipc random training samples of every class (all of it, if it has fewer): pixels uint8 and labels."""
    pixels, labels = [], []
    for label, count in enumerate(prepared.counts("train")):
        places = rng.numpy_generator(seed, "random real", draw, label).permutation(count)[:ipc]
        pixels.append(prepared.take("train", label, sorted(places.tolist())))
        labels.append(np.full(len(places), label, np.int64))
    return np.concatenate(pixels), np.concatenate(labels)


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

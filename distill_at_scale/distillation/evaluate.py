"""Evaluation of a set: train fresh networks on it by its protocol and test them on real data.

The control and the bounds are explained in `distillation/README.md`, "Evaluation protocols".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core import rng
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Progressed
from distill_at_scale.data.prepared import manifest as manifests
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.soft_labels import TeacherLabels
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.models.spec import NetworkSpec

UNPRUNED, RANDOM_KEEP = "unpruned", "random_keep"  # controls that are distilled
DISTILLED = ("distilled", UNPRUNED, RANDOM_KEEP)  # sets that are distilled; the others are real samples


@dataclass(frozen=True)
class EvaluationJob:
    """One network to train and test, independent of all other jobs."""

    set: str  # distilled | unpruned | random_keep | random_real | kept | full
    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.set} {self.network} {self.seed}"


def jobs(config: Config, controls: Sequence[str] = ()) -> list[EvaluationJob]:
    """All jobs; `controls` are the distilled ones that the run has."""
    section = config.evaluate
    sets = ["distilled", *controls, *([] if section.control == "none" else [section.control]), *section.bounds]
    return [EvaluationJob(s, n, seed) for s in sets for n in section.networks for seed in range(section.seeds)]


class Evaluator:
    """Runs jobs; holds the samples to test on in memory."""

    def __init__(self, config: Config, prepared: Path, synthetic_folder: Path, manifest: Path, device: torch.device):
        self.config, self.device, self.manifest = config, device, manifest
        self.prepared = PreparedDataset(prepared)
        self.test = samples_to_test(config, self.prepared, manifest)
        self.synthetic = synthetic_set.load(synthetic_folder)

    def run(
        self, job: EvaluationJob, folder: Path | None = None, progressed: Progressed = lambda percent: None
    ) -> dict[str, Any]:
        """One row of evaluation.json: set, network, seed, top1, top5 (fractions of the tested samples), per_class and seconds.

        `folder` holds the set of a control that is distilled; `progressed` takes per cent of the training. Raises
        DistillationDiverged, naming the job, if the trained weights are not finite.
        """
        distill, classes = self.config.distill, len(self.prepared.class_names)
        spec = NetworkSpec(job.network, self.prepared.shape, classes, distill.width, distill.depth, self.prepared.kind)
        seed = rng.derive(self.config.run.seed, "evaluation", job.set, job.network, job.seed)
        synthetic = self.synthetic if folder is None else synthetic_set.load(folder)
        protocol, started = self._protocol(job, synthetic), time.perf_counter()
        data, section = self._training_set(job, synthetic), self.config.evaluate
        infobatch = section.bound_infobatch if job.set in section.bounds else 0.0
        result = train_and_test(
            spec, data, protocol, seed, (*self.test, self.synthetic.normalization), self.device, section.precision,
            progressed, f"evaluation of {job}", infobatch,
        )  # fmt: skip
        return {**asdict(job), **result, "seconds": round(time.perf_counter() - started, 3)}

    def _protocol(self, job: EvaluationJob, synthetic: SyntheticSet) -> TrainingProtocol:
        protocol, section = synthetic.protocol, self.config.evaluate
        if job.set in DISTILLED:
            return protocol.overridden(section)
        if "student_lr" in synthetic.card:  # learned for the synthetic images alone
            protocol = replace(protocol, lr=TrainingProtocol(1).lr)
        if protocol.labels == "soft" and (job.set != "random_real" or "teacher" not in synthetic.card):
            protocol = replace(protocol, labels="hard")
        if protocol.crop is not None:  # of tiles: a real image is one sample, and the largest crop is all of it
            smallest, largest = protocol.crop
            protocol = replace(protocol, crop=(smallest / largest, 1.0))
        if job.set == "random_real":
            return protocol.overridden(section)
        if protocol.labels == "views":
            protocol = replace(protocol, labels="hard", cutmix=0.0)
        return replace(protocol.overridden(section), epochs=section.bound_epochs)

    def _training_set(self, job: EvaluationJob, synthetic: SyntheticSet) -> TrainingSet:
        if job.set in DISTILLED:
            return synthetic.training_set()
        section = self.config
        held_out = manifests.held_out(self.manifest) if section.select.held_out else None
        if job.set == "random_real":
            pixels, labels = random_real(self.prepared, section.distill.ipc, section.run.seed, job.seed, held_out)
        elif job.set == "kept":
            pixels, labels = self.prepared.load("train", only=manifests.kept(self.manifest))
        else:
            only = manifests.held_out(self.manifest, outside=False) if held_out is not None else None
            pixels, labels = self.prepared.load("train", only=only)
        data = TrainingSet(torch.from_numpy(pixels), torch.from_numpy(labels), self.synthetic.normalization)
        if job.set == "random_real" and self.synthetic.protocol.labels == "views":
            return replace(data, views=self._teacher_labels)  # without the same teacher the comparison would be unfair
        if job.set == "random_real" and self.synthetic.protocol.labels == "soft" and "teacher" in self.synthetic.card:
            images = data.normalized(torch.arange(len(data.labels))).to(self.device)
            logits = self.synthetic.teacher(self.device, self.config.distill.network).logits(images).cpu()
            # as the labels of the set start: the logit of the image's own class is raised to the largest
            logits = logits.scatter(1, data.labels[:, None], logits.max(1, keepdim=True).values)
            return replace(data, soft={"soft_labels": logits})
        return data

    @cached_property
    def _teacher_labels(self) -> TeacherLabels:
        section = getattr(self.config.distill, self.config.distill.method, None)
        return self.synthetic.teacher_labels(self.device, getattr(section, "teacher_network", None))


def train_and_test(
    spec: NetworkSpec, data: TrainingSet, protocol: TrainingProtocol, seed: int, test: tuple[Tensor, Tensor, Normalization],
    device: torch.device, precision: str, progressed: Progressed, name: str, infobatch: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Train a network on a set, and test its last epoch on stored samples, their labels and their normalisation.

    Returns top1, top5 (fractions of the test samples) and per_class. Raises DistillationDiverged, with `name`, if the trained
    weights are not finite.
    """
    network = students.train(spec, data, protocol, seed, device, precision, progressed, infobatch)
    accuracy = students.test(network, *test, device, spec.microbatch(device), precision)
    if not all(torch.isfinite(p).all() for p in network.parameters()):
        raise DistillationDiverged(f"{name} diverged, at a learning rate of {protocol.lr:g}; lower evaluate.lr")
    return asdict(accuracy)


class DataSummary(Protocol):
    """Prepared data, or the plan of it."""

    @property
    def class_names(self) -> list[str]: ...

    def has_test(self) -> bool: ...


def can_test(config: Config, prepared: DataSummary) -> bool:
    """Whether there are samples to test on: a test split, or a held-out part of the training split."""
    return config.evaluate.split == "held_out" or prepared.has_test()


def tested(config: Config, prepared: PreparedDataset, manifest: Path) -> dict[str, Any]:
    """The split that networks are tested on, and its number of samples; part of evaluation.json."""
    split = config.evaluate.split
    samples = len(manifests.held_out(manifest)) if split == "held_out" else sum(prepared.counts("test"))
    return {"split": split, "samples": samples}


def samples_to_test(config: Config, prepared: PreparedDataset, manifest: Path) -> tuple[Tensor, Tensor]:
    """Stored values [n, *shape] and labels int64 [n] of the samples of evaluate.split."""
    require_samples_to_test(config, prepared)
    held_out = config.evaluate.split == "held_out"
    pixels, labels = prepared.load("train", only=manifests.held_out(manifest)) if held_out else prepared.load("test")
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def require_samples_to_test(config: Config, prepared: DataSummary) -> None:
    """Raises UserError where there are no samples to test on."""
    if not can_test(config, prepared):
        require_test_split(prepared)


def require_test_split(prepared: DataSummary) -> None:
    """Raises UserError for data without a test split."""
    if not prepared.has_test():
        raise UserError("the data set has no test split, so nothing can be evaluated; add one (a folder or files named test "
                        "or val) or set data.holdout, for example data.holdout=0.2")  # fmt: skip


def random_real(
    prepared: PreparedDataset, ipc: int, seed: int, draw: int, without: pa.ChunkedArray | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """ipc random training samples per class (all, if it has fewer), but none of the ids `without`: stored values [n, *shape]
    and labels int64 [n].
    """
    pixels, labels = [], []
    for label, count in enumerate(prepared.counts("train")):
        places = rng.numpy_generator(seed, "random real", draw, label).permutation(count)
        if without is not None:
            places = places[~pc.is_in(prepared.ids("train", label), without).to_numpy(zero_copy_only=False)[places]]
        places = places[:ipc]
        pixels.append(prepared.take("train", label, sorted(places.tolist())))
        labels.append(np.full(len(places), label, np.int64))
    return np.concatenate(pixels), np.concatenate(labels)

"""One network of a comparison: which set it is trained on, with which labels, by which recipe.

Every set with one kind of labels is trained by the same recipe. `hard` and `soft`: the defaults of `TrainingProtocol` with the
keys of `evaluate`; `soft` is the cross-entropy to softmax(logits). `views`: the recipe of `compare.teacher`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import SIAMESE_AUGMENT, RDEDSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.evaluate import random_real, train_and_test
from distill_at_scale.distillation.methods.rded import RDED
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, TeacherLabels
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.base import Result, Unit, Worker

FULL, RANDOM = "whole training split", "random"  # sets without a file


@dataclass(frozen=True)
class Job:
    """A network to train and test; `ipc` is the number of real samples per class, 0 for a set with a file."""

    set: str
    ipc: int
    labels: str
    augment: bool
    network: str
    seed: int

    def __str__(self) -> str:
        how = f"{self.labels} labels with{'' if self.augment else 'out'} augmentation"
        return f"{self.set}{f', {self.ipc} per class' if self.ipc else ''}, {how}, {self.network} {self.seed}"


def teacher_config(config: Config) -> Config:
    """The configuration that trains the teacher, which is that of RDED with the keys of `compare.teacher`."""
    section = RDEDSection(**config.compare.teacher.model_dump())
    distill = config.distill.model_copy(update={"method": "rded", "rded": section})
    return config.model_copy(update={"distill": distill, "evaluate": type(config.evaluate)()})


def recipe(config: Config, of_set: TrainingProtocol, labels: str, augment: bool) -> TrainingProtocol:
    """The training of every set with these labels; `of_set` is the protocol of the first run's set.

    Raises UserError if the data do not take views or the augmentation.
    """
    section = config.compare
    epochs = section.epochs or config.evaluate.epochs or of_set.epochs
    if labels == "views":
        try:
            protocol = RDED.protocol(teacher_config(config))
        except UserError as error:
            raise UserError(f"compare.labels: views: {str(error).replace('distill.rded', 'compare.teacher')}") from None
        protocol = replace(protocol, epochs=epochs)
        return protocol if augment else replace(protocol, augment="none", cutmix=0.0)
    own = of_set.augment if of_set.labels != "views" and of_set.augment != "none" else SIAMESE_AUGMENT
    strategy = (section.strategy or own) if augment else "none"
    Augmentation(strategy)  # raises UserError for an unknown family
    protocol = TrainingProtocol(epochs, strategy, labels="soft" if labels == "soft" else "hard")
    return replace(protocol.overridden(config.evaluate), epochs=epochs)


class Compare(Worker):
    """Trains networks on sets and tests them; `work` is a job and its protocol, the input its set or the order of samples."""

    name, event, stages, fetches = "compare", "compare", ("ingest",), ("networks",)
    long = True

    def load(self) -> None:
        self.prepared = PreparedDataset(self.paths["prepared"])
        self.normalization = normalization_of(self.prepared)
        pixels, labels = self.prepared.load("test")
        self.test = torch.from_numpy(pixels), torch.from_numpy(labels), self.normalization

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        distill, evaluate = self.config.distill, self.config.evaluate
        for unit in units:
            job, protocol = unit.work
            began, classes = time.perf_counter(), len(self.prepared.class_names)
            spec = NetworkSpec(
                job.network, self.prepared.shape, classes, distill.width, distill.depth, self.prepared.kind
            )
            seed = rng.derive(self.config.run.seed, "comparison", *(str(value) for value in asdict(job).values()))
            data = self.training_set(job, protocol, unit)
            place, name = (self.test, self.device, evaluate.precision), f"training on {job}"
            result = train_and_test(spec, data, protocol, seed, *place, self.progressed, name)
            seconds = round(time.perf_counter() - began, 3)
            yield {**asdict(job), **result, "images": len(data.labels), "seconds": seconds}

    def progressed(self, percent: int) -> None:
        self.poll()

    def counts(self, result: Result) -> Result:
        return {"set": result["set"], "network": result["network"], "networks": 1}

    def training_set(self, job: Job, protocol: TrainingProtocol, unit: Unit) -> TrainingSet:
        """The images and labels of a job."""
        tensors = safetensors_io.load(unit.inputs[0]) if unit.inputs else {}
        if "images" in tensors:
            data = TrainingSet(tensors["images"], tensors["labels"])
        elif job.set == FULL:
            data = self._real(*self.prepared.load("train"))
        elif job.set == RANDOM:
            data = self._real(*random_real(self.prepared, job.ipc, self.config.run.seed, job.seed))
        else:
            chosen = [np.sort(tensors[str(label)][: job.ipc].numpy()) for label in range(len(tensors))]
            pixels = [self.prepared.take("train", label, places) for label, places in enumerate(chosen)]
            labels = np.repeat(np.arange(len(chosen)), [len(places) for places in chosen])
            data = self._real(np.concatenate(pixels), labels)
        if job.labels == "views":
            section = self.config.compare.teacher
            epochs = min(protocol.epochs, section.label_epochs)
            return replace(data, views=TeacherLabels(self._teacher, epochs, section.top_k, section.temperature))
        if job.labels == "hard":
            return data
        if "soft_labels" in tensors:
            return replace(data, soft={"soft_labels": tensors["soft_labels"]})
        images = data.normalized(torch.arange(len(data.labels))).to(self.device)
        return replace(data, soft={"soft_labels": self._teacher.logits(images).cpu()})

    def _real(self, pixels: Any, labels: Any) -> TrainingSet:
        return TrainingSet(torch.from_numpy(pixels), torch.from_numpy(labels), self.normalization)

    @cached_property
    def _teacher(self) -> Teacher:
        return Teacher.load(self.paths["networks"] / TEACHER, self.device, self.config.compare.teacher.teacher_network)

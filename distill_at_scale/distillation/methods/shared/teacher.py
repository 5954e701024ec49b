"""The teacher of SRe2L and RDED: its training on the kept samples, or its pretrained weights, and its soft labels.

A teacher is one file together with its normalisation. Methods share it if their `teacher_*` keys, data and selection are
equal. The card has its accuracy on the (augmented) samples of the last epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import TeacherSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.ingest.sample_types import holds_tensors, sample_shape
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization, normalization_of
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation import soft_labels
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.contract import Cost, FinalOutputs, Method, MethodContext
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, TeacherFacts
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models import pretrained, weight_check
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec, builder, mixes_samples
from distill_at_scale.models.weight_check import WeightCheck
from distill_at_scale.pruning.infobatch import InfoBatch, expected_share

STUDENT_WEIGHT_DECAY = {"adamw": 0.01, "sgd": 1e-4}  # of the official code


class TeacherMethod(Method):
    """The part of the contract that concerns a teacher: its training, and its labels in `finalize`.

    A subclass defines `section_name`, and `teacher_needs_batch_norm` if it matches batch norm statistics.
    """

    batch_norm: ClassVar[str] = "any"  # distill.network is not used
    teacher_needs_batch_norm: ClassVar[bool] = False
    context: MethodContext

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """Raises UserError if the teacher does not fit the method or the data, or if `evaluate.batch` is not its batch."""
        section: TeacherSection = cls.section(config)
        _check(config, section, cls.teacher_needs_batch_norm)
        flip = "flip" if "flip" in section.teacher_augment.split("_") else "none"
        protocol = TrainingProtocol(
            epochs=section.label_epochs, augment=flip, optimizer=section.student_optimizer, batch=section.student_batch,
            lr=section.student_lr, weight_decay=STUDENT_WEIGHT_DECAY[section.student_optimizer], cutmix=section.cutmix,
            labels="views", temperature=section.temperature, view_scale=section.view_scale, view_seed=config.distill_seed,
        )  # fmt: skip
        protocol.overridden(config.evaluate)  # raises for another batch
        return protocol

    @staticmethod
    def networks(config: Config) -> list[str]:
        return [TEACHER]

    @classmethod
    def network_options(cls, config: Config) -> dict[str, Any]:
        values = result_values(cls.section(config), locations=True)
        options = {key: value for key, value in values.items() if key.startswith("teacher_")}
        options |= {"width": config.distill.width, "depth": config.distill.depth}
        name = options.pop("teacher_weights")
        if not name:
            return options
        with _teacher_keys(config):
            digest = pretrained.digests([name])[name]
        return {k: options[k] for k in ("teacher_network", "width", "depth")} | {"teacher_weights": digest}

    @classmethod
    def network_epochs(cls, config: Config) -> int:
        section = cls.section(config)
        return 0 if section.teacher_weights else section.teacher_epochs

    @classmethod
    def make_network(cls, name: str, context: MethodContext, real: ClassSampler) -> None:
        section = cls.section(context.config)
        if section.teacher_weights:
            source = list(context.source_class_names) or context.class_names
            facts, own = _teacher_facts(context.config, context.spec), real.normalization
            teacher = pretrained_teacher(context.config, facts, own, context.class_names, source, context.device)
        else:
            teacher = TeacherTraining(section, context).run(real)
        if cls.teacher_needs_batch_norm and not mixes_samples(teacher.network):
            raise UserError(_no_batch_norm_message(context.config, section))
        teacher.save(context.networks / name)
        _checkpoint_path(context.networks).unlink(missing_ok=True)

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        section = cls.section(config)
        network, epochs = section.teacher_network, section.label_epochs
        labelling = Cost(f"label the views of {epochs} epochs", network, "synthetic", epochs, backward=False)
        if section.teacher_weights:
            return [labelling]
        passes = section.teacher_epochs * expected_share(section.teacher_infobatch, section.teacher_epochs)
        return [Cost("train the teacher", network, "kept", passes, backward=True), labelling]

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        """The teacher, and its labels for all views of the set; workers share the epochs.

        The labels are files in a folder of the unfinished work, named after the images, so an interrupted labelling goes on.
        """
        config, context = self.context.config, self.context
        section, plan = self.section(config), self.protocol(config).plan
        teacher = Teacher.load(context.networks / TEACHER, context.device, section.teacher_network)
        view_labels = soft_labels.TeacherLabels(teacher, section.label_epochs, section.top_k, section.temperature)
        folder = context.work  # of rank 0, which alone writes
        if context.workers.rank == 0:
            folder /= f"labels-{hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:16]}"
            for other in set(context.work.glob("labels-*")) - {folder}:  # of the images of an earlier evaluation
                shutil.rmtree(other)
        size = soft_labels.relabel(images, plan, view_labels, context.workers, folder)
        extras = {f"teacher/{key}": value.cpu() for key, value in teacher.network.state_dict().items()}
        facts = {"epochs": section.label_epochs, "top_k": section.top_k, "bytes_per_image": size / len(labels)}
        card = {"teacher": asdict(teacher.facts), "soft_labels": facts, "soft_label_bytes": size}
        return FinalOutputs(extras, {}, card, folder)


def _check(config: Config, section: TeacherSection, needs_batch_norm: bool) -> None:
    """Raises UserError, before anything is computed, for a teacher that does not fit the data or the method."""
    key = f"distill.{config.distill.method}"
    builder(f"{key}.teacher_network", section.teacher_network)
    Augmentation(section.teacher_augment)
    if config.data.whiten != "none":
        raise UserError(f"{key} works on pixels, not on whitened data; set data.whiten=none")
    if holds_tensors(config.data):
        raise UserError(f"{key} crops images, and data.source = {config.data.source} has none; choose another method")
    shape = sample_shape(config.data)
    has_batch_norm = _has_batch_norm(section.teacher_network, shape, config.distill.width, config.distill.depth)
    if isinstance(has_batch_norm, str):
        raise UserError(f"{key}.teacher_network = {section.teacher_network!r}: {has_batch_norm}")
    if needs_batch_norm and not has_batch_norm:
        raise UserError(_no_batch_norm_message(config, section))


@lru_cache(maxsize=16)
def _has_batch_norm(name: str, shape: tuple[int, ...], width: int, depth: int | None) -> bool | str:
    """Whether the network has batch norm, or why it cannot be built."""
    try:
        return mixes_samples(NetworkSpec(name, shape, 10, width, depth).skeleton())
    except UserError as error:
        return str(error)


def _no_batch_norm_message(config: Config, section: TeacherSection) -> str:
    method = config.distill.method
    return (
        f"distill.{method}.teacher_network = {section.teacher_network!r} has no batch norm, whose statistics {method} "
        "matches; take convnet_bn, resnet18_bn or resnet50_bn, or r3d_18_bn for clips"
    )


@contextlib.contextmanager
def _teacher_keys(config: Config) -> Iterator[None]:
    """Replaces the keys of `score` in the errors of `models/pretrained.py` by those of the teacher."""
    key = f"distill.{config.distill.method}.teacher"
    try:
        yield
    except UserError as error:
        text = str(error).replace("score.weights", f"{key}_weights")
        text = text.replace("score.network, width, depth", f"{key}_network, distill.width, distill.depth")
        raise UserError(text.replace("score.network", f"{key}_network")) from None


def check_weights(config: Config, shape: tuple[int, ...], class_names: list[str], source: list[str]) -> None:
    """Load the method's pretrained teacher once, if it has one; raises UserError if it does not fit the data."""
    section, distill = getattr(config.distill, config.distill.method, None), config.distill
    if isinstance(section, TeacherSection) and section.teacher_weights is not None:
        spec = NetworkSpec(section.teacher_network, shape, len(class_names), distill.width, distill.depth)
        with _teacher_keys(config):
            pretrained.load(section.teacher_weights, spec, class_names, source)


def check_on_sample(config: Config, prepared: PreparedDataset, pixels: Tensor, labels: Tensor) -> WeightCheck | None:
    """Test the method's pretrained teacher, if it has one, on stored samples [n, *shape] with their labels int64 [n].

    Raises UserError if it is clearly worse than guessing.
    """
    distill, names = config.distill, prepared.class_names
    section = getattr(distill, distill.method, None)
    if not isinstance(section, TeacherSection) or section.teacher_weights is None:
        return None
    spec, own = NetworkSpec(distill.network, prepared.shape, len(names)), normalization_of(prepared)
    facts, source = _teacher_facts(config, spec), prepared.source_class_names
    teacher = pretrained_teacher(config, facts, own, names, source, torch.device("cpu"))
    key = f"distill.{distill.method}.teacher_weights = {section.teacher_weights!r}"
    return weight_check.check_on_sample(key, teacher.logits(own.apply(pixels)), labels, names)


def pretrained_teacher(
    config: Config, facts: TeacherFacts, own: Normalization, names: list[str], source: list[str], device: torch.device
) -> Teacher:
    """The teacher of `teacher_weights`, for images with the normalisation `own`. Raises UserError if it does not fit."""
    section: TeacherSection = getattr(config.distill, config.distill.method)
    with _teacher_keys(config):
        weights = pretrained.load(str(section.teacher_weights), facts.spec, names, source)
    columns = None if weights.classes is None else tuple(weights.classes)
    facts = replace(facts, outputs=weights.outputs, columns=columns, origin=f"sha256 {weights.sha256}")
    if weights.normalization is not None:
        facts = soft_labels.with_normalization(facts, (own.mean, own.std), weights.normalization)
    return Teacher.from_state(facts, weights.state, device)


def _teacher_facts(config: Config, spec: NetworkSpec) -> TeacherFacts:
    distill = config.distill
    section: TeacherSection = getattr(distill, distill.method)
    ones, zeros = (1.0,) * spec.shape[-3], (0.0,) * spec.shape[-3]  # the data's own normalisation
    return TeacherFacts(section.teacher_network, spec.shape, spec.classes, distill.width, distill.depth, ones, zeros)


class TeacherTraining:
    """SGD on the kept samples of all classes, with a checkpoint after each epoch."""

    def __init__(self, section: TeacherSection, context: MethodContext):
        self.section, self.context, self.facts = section, context, _teacher_facts(context.config, context.spec)
        self.path = _checkpoint_path(context.networks)
        self.network = self.facts.spec.build(rng.derive(context.seed, "teacher")).to(context.device).train()
        self.layout = self.facts.spec.memory_format("train", context.device, compiled=False)
        self.layout.network(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), section.teacher_lr, section.teacher_momentum,
            weight_decay=section.teacher_weight_decay, fused=True,
        )  # fmt: skip
        self.augmentation = Augmentation(section.teacher_augment)
        self.rule = InfoBatch(0.0, 0, 0, 0, context.device)  # `run` knows the number of samples

    def run(self, real: ClassSampler) -> Teacher:
        """Train the epochs that are missing."""
        pixels, labels = real.all_samples()
        drop, epochs, seed = self.section.teacher_infobatch, self.section.teacher_epochs, self.context.seed
        self.rule = InfoBatch(drop, len(labels), epochs, seed, self.context.device)
        start, accuracy = self._resume()
        for epoch in range(start, self.section.teacher_epochs):
            accuracy = self._epoch(pixels, labels, real.normalization, epoch)
            self._save(epoch + 1, accuracy)
        length = f"{epochs} epochs, {accuracy:.1%} right in the last one"
        facts = replace(self.facts, origin=f"trained on the kept samples for {length}")
        return Teacher.from_state(facts, self.network.state_dict(), self.context.device)

    def _epoch(self, pixels: Tensor, labels: Tensor, normalization: Normalization, epoch: int) -> float:
        """Returns the accuracy on the epoch's augmented samples."""
        device, draw = self.context.device, rng.generator(self.context.seed, "teacher epoch", epoch)
        lr = self.section.teacher_lr * (1 + math.cos(math.pi * epoch / self.section.teacher_epochs)) / 2
        self.optimizer.param_groups[0]["lr"] = lr
        right, seen = torch.zeros((), dtype=torch.long, device=device), epoch * len(labels)
        order, kept = torch.randperm(len(labels), generator=draw), self.rule.start(epoch)
        for rows in soft_labels.merge_last_batch(order[kept[order]].split(self.section.teacher_batch)):
            images = normalization.apply(pixels[rows.to(pixels.device)].to(device))
            images = self.layout.images(self.augmentation.draw(draw, per_image=len(rows)).apply(images))
            with autocast(self.context.config.distill.precision, device):
                logits = self.network(images).float()
            targets = labels[rows].to(device)
            self.optimizer.zero_grad()
            self.rule.cross_entropy(logits, targets, rows).backward()
            self.optimizer.step()
            right += (logits.argmax(1) == targets).sum()
            seen += len(rows)
            self.context.progressed(seen)
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise DistillationDiverged(
                f"the teacher diverged in epoch {epoch} at learning rate {lr:g}; lower "
                f"distill.{self.context.config.distill.method}.teacher_lr"
            )
        return int(right) / int(kept.sum())

    def _save(self, epochs: int, accuracy: float) -> None:
        tensors = {f"weight.{key}": value for key, value in self.network.state_dict().items()}
        for i, parameter in enumerate(self.network.parameters()):
            if (buffer := self.optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None:
                tensors[f"momentum.{i}"] = buffer
        if self.rule.drop:
            tensors["losses"] = self.rule.losses
        safetensors_io.save(self.path, tensors, {"epochs": str(epochs), "right": repr(accuracy)})

    def _resume(self) -> tuple[int, float]:
        """Load the checkpoint, if any; returns the finished epochs and the accuracy in the last of them."""
        if not self.path.exists():
            return 0, 0.0
        saved, facts = safetensors_io.load(self.path, again=True), safetensors_io.metadata(self.path)
        weights = {k.removeprefix("weight."): v for k, v in saved.items() if k.startswith("weight.")}
        self.network.load_state_dict(weights)
        for i, parameter in enumerate(self.network.parameters()):
            if f"momentum.{i}" in saved:
                buffer = torch.empty_like(parameter.detach()).copy_(saved[f"momentum.{i}"])  # in the same memory format
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.rule.losses = saved.get("losses", self.rule.losses).to(self.rule.losses.device)
        return int(facts["epochs"]), float(facts["right"])


def _checkpoint_path(networks: Path) -> Path:
    return networks / f"{TEACHER}.partial"

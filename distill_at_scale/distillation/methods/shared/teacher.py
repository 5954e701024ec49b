"""What the methods with a teacher share (SRe2L, RDED): its training on the kept samples, or its ready-made weights, and the
soft labels that it gives to the finished set.

The teacher is one file with its normalisation, made once for equal `teacher_*` keys, data and selection, so that both methods
share it. Training is SGD with a cosine over the epochs, in float32; it goes on from the last finished epoch.

Left out: testing the teacher on real data; its accuracy on the (augmented) samples of its last epoch is in the card.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import TeacherSection
from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.ingest.chunks import sample_shape
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.base import Cost, FinalOutputs, MethodContext, MethodDefaults
from distill_at_scale.distillation.soft_labels import (
    TEACHER,
    Teacher,
    TeacherFacts,
    TeacherLabels,
    label_bytes,
    merge_last_batch,
    relabel,
    with_normalization,
)
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec, builder, mixes_samples

STUDENT_DECAY = {"adamw": 0.01, "sgd": 1e-4}  # weight decay, of the official code


class TeacherMethod(MethodDefaults):
    """The part of the contract that concerns the teacher and its labels."""

    batch_norm: ClassVar[str] = "any"  # distill.network is not used
    teacher_needs_batch_norm: ClassVar[bool] = False
    context: MethodContext

    @classmethod
    def section(cls, config: Config) -> TeacherSection:
        raise NotImplementedError

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """Raises UserError for a teacher that does not fit the method or the data, and for options at odds with it."""
        section = cls.section(config)
        check(config, section, cls.teacher_needs_batch_norm)
        flip = "flip" if "flip" in section.teacher_augment.split("_") else "none"
        made = TrainingProtocol(
            epochs=section.label_epochs, augment=flip, optimizer=section.student_optimizer, batch=section.student_batch,
            lr=section.student_lr, weight_decay=STUDENT_DECAY[section.student_optimizer], cutmix=section.cutmix,
            labels="views", temperature=section.temperature, view_scale=section.view_scale, view_seed=config.distill_seed,
        )  # fmt: skip
        made.overridden(config.evaluate)  # which refuses another batch
        return made

    @staticmethod
    def networks(config: Config) -> list[str]:
        return [TEACHER]

    @classmethod
    def network_options(cls, config: Config) -> dict[str, Any]:
        section, made = cls.section(config), config.distill
        options = {k: v for k, v in section.model_dump().items() if k.startswith("teacher_")}
        options |= {"width": made.width, "depth": made.depth}
        if name := options.pop("teacher_weights"):
            with _own_keys(config):
                return {k: options[k] for k in ("teacher_network", "width", "depth")} | {
                    "teacher_weights": pretrained.digests([name])[name]
                }
        return options

    @classmethod
    def make_network(cls, name: str, context: MethodContext, real: ClassSampler) -> None:
        section = cls.section(context.config)
        make = _ready_made if section.teacher_weights else _trained
        teacher = make(section, context, real)
        if cls.teacher_needs_batch_norm and not mixes_samples(teacher.network):
            raise UserError(_no_batch_norm(context.config, section))
        teacher.save(context.networks / name)
        _partial(context.networks).unlink(missing_ok=True)

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        section = cls.section(config)
        network, epochs = section.teacher_network, section.label_epochs
        training = [] if section.teacher_weights else [
            Cost("train the teacher", network, "kept", section.teacher_epochs, backward=True)
        ]  # fmt: skip
        return [*training, Cost(f"label the views of {epochs} epochs", network, "synthetic", epochs, backward=False)]

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        """The labels of all views; the workers share the epochs."""
        config, context = self.context.config, self.context
        section, plan = self.section(config), self.protocol(config).plan
        teacher = Teacher.load(context.networks / TEACHER, context.device, section.teacher_network)
        asked = TeacherLabels(teacher, section.label_epochs, section.top_k, section.temperature)
        made = relabel(images, plan, asked, context.workers)
        extras = {f"labels/{key}": value for key, value in made.items()}
        extras |= {f"teacher/{key}": value.cpu() for key, value in teacher.network.state_dict().items()}
        size = label_bytes(made)
        facts = {"epochs": section.label_epochs, "top_k": section.top_k, "bytes_per_image": size / len(labels)}
        card = {"teacher": asdict(teacher.facts), "soft_labels": facts, "soft_label_bytes": size}
        return FinalOutputs(extras, {}, card)


def check(config: Config, section: TeacherSection, needs_batch_norm: bool) -> None:
    """Raises UserError for a teacher that cannot take the data's images or clips, before anything is computed.

    Its batch norm, where the method needs it, is looked at here too.
    """
    key = f"distill.{config.distill.method}"
    builder(f"{key}.teacher_network", section.teacher_network)
    Augmentation(section.teacher_augment)
    if config.data.whiten != "none":
        raise UserError(f"{key} works on pixels, not on whitened data; set data.whiten=none")
    if config.data.source == "tensors":
        raise UserError(f"{key} crops images, and data.source = tensors has none; take another method")
    made = config.distill
    found = _skeleton(section.teacher_network, sample_shape(config.data), made.width, made.depth)
    if isinstance(found, str):
        raise UserError(f"{key}.teacher_network = {section.teacher_network!r}: {found}")
    if needs_batch_norm and not found:
        raise UserError(_no_batch_norm(config, section))


@lru_cache(maxsize=16)
def _skeleton(name: str, shape: tuple[int, ...], width: int, depth: int | None) -> bool | str:
    """Whether the network has batch norm, or why it cannot be built."""
    try:
        return mixes_samples(NetworkSpec(name, shape, 10, width, depth).skeleton())
    except UserError as error:
        return str(error)


def _no_batch_norm(config: Config, section: TeacherSection) -> str:
    method = config.distill.method
    return (
        f"distill.{method}.teacher_network = {section.teacher_network!r} has no batch norm, whose statistics {method} "
        "matches; take convnet_bn, resnet18_bn or resnet50_bn, of clips r3d_18_bn"
    )


@contextlib.contextmanager
def _own_keys(config: Config) -> Iterator[None]:
    """What `scoring/pretrained.py` says of score.weights is said of the teacher's."""
    key = f"distill.{config.distill.method}.teacher"
    try:
        yield
    except UserError as error:
        text = str(error).replace("score.weights", f"{key}_weights")
        text = text.replace("score.network, width, depth", f"{key}_network, distill.width, distill.depth")
        raise UserError(text.replace("score.network", f"{key}_network")) from None


def check_weights(config: Config, shape: tuple[int, ...], class_names: list[str], source: list[str]) -> None:
    """Load the method's ready-made teacher once, if it has one; raises UserError where it does not fit the data."""
    section, made = getattr(config.distill, config.distill.method, None), config.distill
    if isinstance(section, TeacherSection) and section.teacher_weights is not None:
        spec = NetworkSpec(section.teacher_network, shape, len(class_names), made.width, made.depth)
        with _own_keys(config):
            pretrained.load(section.teacher_weights, spec, class_names, source)


def _facts(section: TeacherSection, context: MethodContext) -> TeacherFacts:
    made, spec = context.config.distill, context.spec
    channels = spec.shape[-3]
    plain = (1.0,) * channels, (0.0,) * channels
    return TeacherFacts(section.teacher_network, spec.shape, spec.classes, made.width, made.depth, *plain)


def _ready_made(section: TeacherSection, context: MethodContext, real: ClassSampler) -> Teacher:
    names, facts = context.class_names, _facts(section, context)
    source = list(context.source_class_names) or names
    with _own_keys(context.config):
        given = pretrained.load(str(section.teacher_weights), facts.spec, names, source)
    columns = None if given.classes is None else tuple(given.classes)
    values = asdict(facts) | {"outputs": given.outputs, "columns": columns, "origin": f"sha256 {given.sha256}"}
    facts = TeacherFacts.from_card(values)
    if given.normalization is not None:
        own: Normalization = real.normalization
        facts = with_normalization(facts, (own.mean, own.std), given.normalization)
    return Teacher.from_state(facts, given.state, context.device)


def _trained(section: TeacherSection, context: MethodContext, real: ClassSampler) -> Teacher:
    facts = _facts(section, context)
    training = TeacherTraining(section, context, facts.spec)
    right = training.run(real)
    how = f"trained on the kept samples for {section.teacher_epochs} epochs, {right:.1%} right in the last one"
    return Teacher.from_state(
        TeacherFacts.from_card(asdict(facts) | {"origin": how}), training.network.state_dict(), context.device
    )


class TeacherTraining:
    """SGD on the kept samples of all classes, with a checkpoint after every epoch."""

    def __init__(self, section: TeacherSection, context: MethodContext, spec: NetworkSpec):
        self.section, self.context = section, context
        self.path = _partial(context.networks)
        self.network = spec.build(rng.derive(context.seed, "teacher")).to(context.device).train()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), section.teacher_lr, section.teacher_momentum, weight_decay=section.teacher_weight_decay
        )  # fmt: skip
        self.augmentation = Augmentation(section.teacher_augment)

    def run(self, real: ClassSampler) -> float:
        """Train the epochs that are left; the accuracy on the augmented samples of the last epoch."""
        pixels, labels = real.all_samples()
        start, right = self._resume()
        for epoch in range(start, self.section.teacher_epochs):
            right = self._epoch(pixels, labels, real.normalization, epoch)
            self._save(epoch + 1, right)
        return right

    def _epoch(self, pixels: Tensor, labels: Tensor, normalization: Normalization, epoch: int) -> float:
        device, draw = self.context.device, rng.generator(self.context.seed, "teacher epoch", epoch)
        rate = self.section.teacher_lr * (1 + math.cos(math.pi * epoch / self.section.teacher_epochs)) / 2
        self.optimizer.param_groups[0]["lr"] = rate
        right = 0
        for rows in merge_last_batch(torch.randperm(len(labels), generator=draw).split(self.section.teacher_batch)):
            images = normalization.apply(pixels[rows.to(pixels.device)].to(device))
            images = self.augmentation.draw(draw, per_image=len(rows)).apply(images)
            targets = labels[rows].to(device)
            right += int(_sgd_step(self.network, self.optimizer, images, targets))
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise DistillationDiverged(
                f"the teacher diverged in epoch {epoch}, at a learning rate of {rate:g}; lower "
                f"distill.{self.context.config.distill.method}.teacher_lr"
            )
        return right / len(labels)

    def _save(self, done: int, right: float) -> None:
        held = {f"weight.{key}": value for key, value in self.network.state_dict().items()}
        for i, parameter in enumerate(self.network.parameters()):
            if (buffer := self.optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None:
                held[f"momentum.{i}"] = buffer
        safetensors_io.save(self.path, held, {"epochs": str(done), "right": repr(right)})

    def _resume(self) -> tuple[int, float]:
        """Epochs that are done, and the accuracy in the last of them."""
        if not self.path.exists():
            return 0, 0.0
        saved = safetensors_io.load(self.path)
        with safe_open(self.path, "pt") as handle:
            facts = handle.metadata()
        self.network.load_state_dict(
            {k.removeprefix("weight."): v for k, v in saved.items() if k.startswith("weight.")}
        )
        for i, parameter in enumerate(self.network.parameters()):
            if f"momentum.{i}" in saved:
                self.optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{i}"].to(parameter.device)
        return int(facts["epochs"]), float(facts["right"])


def _sgd_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor) -> Tensor:
    """One step; the number of samples that the network was right about before it."""
    logits = network(images)
    optimizer.zero_grad()
    F.cross_entropy(logits, targets).backward()
    optimizer.step()
    return (logits.argmax(1) == targets).sum()


def _partial(networks: Path) -> Path:
    return networks / f"{TEACHER}.partial"

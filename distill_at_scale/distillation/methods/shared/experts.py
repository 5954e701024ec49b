"""Experts of trajectory matching: networks trained on the kept real samples, with their parameters after every epoch.

An expert's file holds one tensor `parameters` float32 [epochs + 1, parameters], flat in the order of
`network.parameters()`; row 0 is the initialisation. While it is trained its finished epochs lie in a folder beside the
file, from which a killed expert goes on (Cazenavette et al. 2022, arXiv 2203.11932, section 3.1; METHOD.md section 4).

Left out: networks with batch norm, whose running statistics are no parameters and would not be matched. Dropout is off,
here and in the student's steps, so that a step can be computed twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import MTTSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.models.spec import mixes_samples


def expert_name(number: int) -> str:
    return f"expert-{number:03d}.safetensors"


def expert_options(config: Config, section: MTTSection) -> dict[str, Any]:
    """What decides an expert's weights, under names that do not depend on the method: methods share experts."""
    own = {key: value for key, value in section.model_dump().items() if key.startswith("expert_")}
    shared = {f"distill.{key}": getattr(config.distill, key) for key in ("network", "width", "depth")}
    return shared | own


def flat(parameters: Sequence[Tensor] | nn.Module) -> Tensor:
    """Tensors of any shapes, or a network's parameters, as one vector (a copy)."""
    listed = list(parameters.parameters()) if isinstance(parameters, nn.Module) else parameters
    return torch.cat([p.detach().reshape(-1) for p in listed])


def refuse_batch_norm(name: str, network: nn.Module) -> None:
    """Raises UserError for a network whose behaviour is not in its parameters alone."""
    if mixes_samples(network):
        raise UserError(
            f"distill.network = {name!r} has batch norm, whose running statistics are no parameters, so that its "
            "training trajectory cannot be matched; take one without, for example convnet"
        )


class ExpertTraining:
    """The training of one expert on all kept samples, from its last finished epoch on.

    Batches go through the network in parts that fit the cache; without batch norm that is the same gradient.
    """

    def __init__(self, number: int, context: MethodContext, section: MTTSection, real: ClassSampler):
        self.number, self.seed, self.section = number, context.seed, section
        self.method, self.device = context.config.distill.method, context.device
        self.pixels, self.labels = real.all_samples()
        self.normalization, self.at_once = real.normalization, context.spec.microbatch(context.device)
        self.augmentation = Augmentation(section.expert_augment)
        network = context.spec.build(derive(context.seed, "expert", number))
        refuse_batch_norm(context.spec.name, network)
        self.network = network.to(context.device).eval()
        if not context.spec.clips:  # of clips only compiled code would gain
            context.spec.weights_channels_last(self.network)
        self.spec = context.spec
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            section.expert_lr,
            section.expert_momentum,
            weight_decay=section.expert_weight_decay,
        )

    def run(self, path: Path) -> None:
        """Train what is missing and publish the file in one step.

        Raises DistillationDiverged, naming expert, epoch and rate, where a parameter is not finite after an epoch.
        """
        partial, epochs = path.with_suffix(".partial"), self.section.expert_epochs
        for epoch in range(self._resume(partial), epochs):
            self._epoch(epoch)
            self._save(partial, epoch + 1)
        rows = [safetensors_io.load(_epoch_path(partial, epoch))["parameters"] for epoch in range(epochs + 1)]
        safetensors_io.save(path, {"parameters": torch.stack(rows)})
        shutil.rmtree(partial)

    def _epoch(self, epoch: int) -> None:
        chance = generator(self.seed, "expert epoch", self.number, epoch)
        for rows in torch.randperm(len(self.labels), generator=chance).split(self.section.expert_batch):
            images = self.normalization.apply(self.pixels[rows.to(self.pixels.device)].to(self.device))
            images = self.augmentation.draw(chance, per_image=len(rows)).apply(images)
            if not self.spec.clips:
                images = self.spec.channels_last(images)
            targets = self.labels[rows].to(self.device)
            self.optimizer.zero_grad()
            for part, wanted in zip(images.split(self.at_once), targets.split(self.at_once), strict=True):
                (F.cross_entropy(self.network(part), wanted, reduction="sum") / len(rows)).backward()
            self.optimizer.step()
        if not bool(torch.isfinite(flat(self.network)).all()):
            raise DistillationDiverged(
                f"expert {self.number} diverged in epoch {epoch} at learning rate {self.section.expert_lr:g}; "
                f"lower distill.{self.method}.expert_lr"
            )

    def _save(self, partial: Path, epoch: int) -> None:
        held = {"parameters": flat(self.network)}
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.network.parameters()]
        if all(buffer is not None for buffer in buffers):
            held["momentum"] = flat(buffers)
        safetensors_io.save(_epoch_path(partial, epoch), held)

    def _resume(self, partial: Path) -> int:
        """How many epochs are finished; the network is as it was after them."""
        if not _epoch_path(partial, 0).exists():
            self._save(partial, 0)
            return 0
        done = 0
        while _epoch_path(partial, done + 1).exists():
            done += 1
        held = safetensors_io.load(_epoch_path(partial, done))
        parameters = list(self.network.parameters())
        with torch.no_grad():
            for parameter, value in zip(parameters, _split(held["parameters"], parameters), strict=True):
                parameter.copy_(value)
        if "momentum" in held:
            for parameter, value in zip(parameters, _split(held["momentum"], parameters), strict=True):
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(value)
        return done


def _epoch_path(partial: Path, epoch: int) -> Path:
    return partial / f"epoch-{epoch:03d}.safetensors"


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([p.numel() for p in like])
    return [part.view(p.shape) for part, p in zip(parts, like, strict=True)]


class ExpertFiles:
    """The finished experts of a folder; of each step only the rows that it needs are read."""

    def __init__(self, folder: Path, count: int, epochs: int, parameters: int, device: torch.device):
        self.folder, self.count, self.device = folder, count, device
        self.shape = [epochs + 1, parameters]

    def parameters(self, number: int, *epochs: int) -> list[Tensor]:
        """An expert's flat parameters after these epochs, float32 [parameters] each.

        Raises UserError for a file that is damaged or of another network.
        """
        path = self.folder / expert_name(number)
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_slice("parameters")
                if list(rows.get_shape()) == self.shape:
                    return [rows[epoch].to(self.device) for epoch in epochs]
        except (SafetensorError, OSError) as error:
            raise UserError(f"the expert {path} cannot be read ({error}); delete it to have it trained again") from None
        raise UserError(
            f"the expert {path} does not hold {self.shape[0]} x {self.shape[1]} parameters; delete it to have it trained again"
        )

"""Experts of trajectory matching: networks trained on the kept real samples (Cazenavette et al. 2022, arXiv 2203.11932).

An expert's file holds one tensor `parameters` float32 [epochs + 1, parameters], flat in the order of
`network.parameters()`; row 0 is the initialisation. During training, a folder next to the file holds a checkpoint per
finished epoch. Dropout is off, here and in the student's steps, so that a step can be computed twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill_at_scale.config.methods import MTTSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import set_aside
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.contract import MethodContext
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import mixes_samples
from distill_at_scale.pruning.infobatch import InfoBatch


def expert_name(number: int) -> str:
    return f"expert-{number:03d}.safetensors"


def flat(parameters: Sequence[Tensor] | nn.Module) -> Tensor:
    """Tensors of any shapes, or a network's parameters, as one vector (a copy)."""
    tensors = list(parameters.parameters()) if isinstance(parameters, nn.Module) else parameters
    return torch.cat([p.detach().reshape(-1) for p in tensors])


def refuse_batch_norm(name: str, network: nn.Module) -> None:
    """Raises UserError for a network whose state is not in its parameters alone."""
    if mixes_samples(network):
        raise UserError(
            f"distill.network = {name!r} has batch norm, whose running statistics are no parameters, so its training "
            "trajectory cannot be matched; choose a network without batch norm, such as convnet"
        )


class ExpertTraining:
    """The training of one expert on all kept samples."""

    def __init__(self, number: int, context: MethodContext, section: MTTSection, real: ClassSampler):
        self.number, self.context, self.section = number, context, section
        self.pixels, self.labels = real.all_samples()
        self.normalization, self.augmentation = real.normalization, Augmentation(section.expert_augment)
        seed = derive(context.seed, "expert rule", number)
        self.rule = InfoBatch(section.expert_infobatch, len(self.labels), section.expert_epochs, seed, context.device)
        network = context.spec.build(derive(context.seed, "expert", number))
        refuse_batch_norm(context.spec.name, network)
        self.network = network.to(context.device).eval()
        self.layout = context.spec.memory_format("train", context.device, compiled=False)
        self.layout.network(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), section.expert_lr, section.expert_momentum,
            weight_decay=section.expert_weight_decay, fused=True,
        )  # fmt: skip

    def run(self, path: Path) -> None:
        """Train the epochs that are missing and publish the file.

        Raises DistillationDiverged if a parameter is not finite after an epoch.
        """
        folder, epochs = path.with_suffix(".partial"), self.section.expert_epochs
        for epoch in range(self._resume(folder), epochs):
            self._epoch(epoch)
            self._save(folder, epoch + 1)
        files = (_epoch_path(folder, epoch) for epoch in range(epochs + 1))
        rows = [safetensors_io.load(file, again=True)["parameters"] for file in files]
        safetensors_io.save(path, {"parameters": torch.stack(rows)})
        shutil.rmtree(folder)

    def _epoch(self, epoch: int) -> None:
        device, at_once = self.context.device, self.context.spec.microbatch(self.context.device)
        rng, seen = generator(self.context.seed, "expert epoch", self.number, epoch), epoch * len(self.labels)
        order = torch.randperm(len(self.labels), generator=rng)
        for rows in order[self.rule.start(epoch)[order]].split(self.section.expert_batch):
            images = self.normalization.apply(self.pixels[rows.to(self.pixels.device)].to(device))
            images = self.layout.images(self.augmentation.draw(rng, per_image=len(rows)).apply(images))
            targets = self.labels[rows].to(device)
            self.optimizer.zero_grad()
            for part, part_targets, own in zip(*(t.split(at_once) for t in (images, targets, rows)), strict=True):
                with autocast(self.context.config.distill.precision, device):
                    logits = self.network(part)
                (self.rule.cross_entropy(logits.float(), part_targets, own, "sum") / len(rows)).backward()
            self.optimizer.step()
            seen += len(rows)
            self.context.progressed(seen)
        if not bool(torch.isfinite(flat(self.network)).all()):
            raise DistillationDiverged(
                f"expert {self.number} diverged in epoch {epoch} at learning rate {self.section.expert_lr:g}; "
                f"lower distill.{self.context.config.distill.method}.expert_lr"
            )

    def _save(self, folder: Path, epoch: int) -> None:
        tensors = {"parameters": flat(self.network)}
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.network.parameters()]
        if all(buffer is not None for buffer in buffers):
            tensors["momentum"] = flat(buffers)
        if self.rule.drop:
            tensors["losses"] = self.rule.losses
        safetensors_io.save(_epoch_path(folder, epoch), tensors)

    def _resume(self, folder: Path) -> int:
        """Load the last checkpoint, or write the first one; returns the number of finished epochs."""
        if not _epoch_path(folder, 0).exists():
            self._save(folder, 0)
            return 0
        finished = 0
        while _epoch_path(folder, finished + 1).exists():
            finished += 1
        saved = safetensors_io.load(_epoch_path(folder, finished), again=True)
        parameters = list(self.network.parameters())
        sizes = [p.numel() for p in parameters]
        with torch.no_grad():
            for parameter, values in zip(parameters, saved["parameters"].split(sizes), strict=True):
                parameter.copy_(values.view(parameter.shape))
        if "momentum" in saved:
            for parameter, values in zip(parameters, saved["momentum"].split(sizes), strict=True):
                buffer = torch.empty_like(parameter).copy_(values.view(parameter.shape))
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.rule.losses = saved.get("losses", self.rule.losses).to(self.rule.losses.device)
        return finished


def _epoch_path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:03d}.safetensors"


class ExpertFiles:
    """The finished experts in a folder; only the rows that a step needs are read."""

    def __init__(self, folder: Path, epochs: int, parameters: int, device: torch.device):
        self.folder, self.device = folder, device
        self.shape = [epochs + 1, parameters]

    def parameters(self, number: int, *epochs: int) -> list[Tensor]:
        """An expert's flat parameters after each of these epochs, float32 [parameters].

        Raises UserError if the file is damaged or belongs to another network.
        """
        path = self.folder / expert_name(number)
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_slice("parameters")
                if list(rows.get_shape()) == self.shape:
                    return [rows[epoch].to(self.device) for epoch in epochs]
        except (SafetensorError, OSError) as error:
            raise UserError(f"the expert {path} cannot be read ({error}); {set_aside(path)}") from None
        raise UserError(
            f"the expert {path} does not hold {self.shape[0]} x {self.shape[1]} parameters; {set_aside(path)}"
        )

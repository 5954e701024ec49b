"""Batches of a synthetic set for a training script of your own; `SyntheticSet.train_loader` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation.soft_labels import merge_last_batch
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet, epoch_batches, view_batches


class TrainLoader:
    """Iterates over batches (images float32 [b, *shape], targets int64 [b] or float32 [b, classes]).

    Each iteration is the next epoch, `epoch`; set it to continue an earlier training. A last batch of one image is merged into
    the one before, as batch norm needs. `SyntheticSet.train_loader` has the arguments and errors.
    """

    def __init__(
        self, data: TrainingSet, protocol: TrainingProtocol, classes: int,
        batch_size: int | None, shuffle: bool, seed: int, augment: bool,
    ):  # fmt: skip
        if not augment:
            hard = {"labels": "hard"} if protocol.labels == "views" else {}
            protocol = replace(protocol, augment="none", cutmix=0.0, crop=None, **hard)  # type: ignore[arg-type]
        if protocol.labels == "views" and (batch_size not in (None, protocol.batch) or not shuffle):
            raise UserError(
                f"the set has soft labels for views in shuffled batches of {protocol.batch}; leave batch_size and shuffle "
                "out, or set augment=False for the plain images with hard labels"
            )
        self.data, self.classes, self.shuffle, self.seed = data, classes, shuffle, seed
        self.protocol = replace(protocol, batch=batch_size or protocol.batch)
        self.epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(list(merge_last_batch(torch.arange(len(self.data.labels)).split(self.protocol.batch))))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if self.protocol.labels == "views":
            for images, [(_, log_probabilities, _)] in view_batches(self.data, self.protocol, epoch):
                yield images, log_probabilities.exp()
            return
        draw = rng.generator(self.seed, "train loader", epoch)
        for images, weighted in epoch_batches(self.data, self.protocol, draw, merge=True, shuffle=self.shuffle):
            if self.protocol.labels == "soft" or self.protocol.cutmix:
                mixed = [share * self._probabilities(targets) for share, targets, _ in weighted]
                yield images, torch.stack(mixed).sum(0)
            else:
                yield images, weighted[0][1]

    def _probabilities(self, targets: Tensor) -> Tensor:
        return targets if targets.is_floating_point() else F.one_hot(targets, self.classes).float()

"""RDED: realistic, diverse, efficient (Sun, Shi, Yu & Lin 2024, arXiv 2312.03526; METHOD.md section 4).

Nothing is optimised. Crops of real images were ranked by a teacher's loss of their class in a pass through the scorer's
actors (scoring/patches.py); of every image the crop that the teacher finds most realistic counts, and of a class the ipc *
factor^2 most realistic ones of these. Every factor^2 of them, reduced, are tiled into one image, which is labelled view by
view by the teacher (soft_labels.py). Where a class has fewer images than patches are needed, further crops of the same
images follow, and the card says so.

Steps do no more than divide the building: step i of n makes the classes whose label is i modulo n. Clips work too: a patch
is cut out of all frames of a clip alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import RDEDSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.base import Cost, FinalOutputs, MethodContext
from distill_at_scale.distillation.methods.shared.patch_ranking import (
    crop_boxes,
    images_per_class,
    read_table,
    table_path,
)
from distill_at_scale.distillation.methods.shared.teacher import TeacherMethod
from distill_at_scale.distillation.multi_formation import assembled
from distill_at_scale.distillation.soft_labels import shown

Ranked = dict[str, np.ndarray[Any, Any]]  # of one class: sample_id [m], row [m] and loss [m, crops]


class RDED(TeacherMethod):
    default_steps: ClassVar[int] = 1
    no_runtime: ClassVar[str] = "rded ranks all its real images once, so there is no real batch to prune"
    ranks_patches: ClassVar[bool] = True  # the pipeline has them ranked before the first step

    @classmethod
    def section(cls, config: Config) -> RDEDSection:
        return config.distill.rded

    @staticmethod
    def init_of(config: Config) -> str:
        return "noise"  # any number of kept samples will do

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        """Of the ranking at most: a class has no more than `candidates`."""
        section = cls.section(config)
        return [*super().costs(config), Cost("rank patches", section.teacher_network, "kept", section.crops, False)]

    def __init__(self, context: MethodContext) -> None:
        self.context, self.options = context, self.section(context.config)
        self.ipc = context.config.distill.ipc
        self.wanted = self.ipc * self.options.factor**2  # patches of a class
        self.path = table_path(context.networks, context.config)

    def prepare(self, real: ClassSampler) -> None:
        self.real = real
        shape = self.context.spec.shape
        if min(shape[-2:]) < self.options.factor:
            raise UserError(
                f"distill.rded.factor = {self.options.factor} makes patches of images of {shape[-1]} pixels that have none; "
                "lower it"
            )
        self.images = torch.zeros(len(self.context.labels), self.ipc, *shape)

    def step(self, i: int) -> dict[str, float]:
        labels, losses = self.context.labels, [0.0]
        for k, label in enumerate(labels):
            if label % self.context.steps == i:
                self.images[k], loss = self._build(label)
                losses.append(loss)
        return {"loss": sum(losses) / max(1, len(losses) - 1), "classes": float(len(losses) - 1)}

    def _build(self, label: int) -> tuple[Tensor, float]:
        """The images of a class [ipc, *shape], and the mean loss of their patches."""
        ranked = self._ranked(label)
        images, crops = best_crops(ranked["loss"], self.wanted)
        each = zip(ranked["sample_id"][images].tolist(), crops.tolist(), strict=True)
        boxes = torch.stack([crop_boxes(self.context.seed, name, self.options)[crop] for name, crop in each])
        pixels = self.real.holding.take(label, torch.from_numpy(ranked["row"][images].astype(np.int64)))
        patches = shown(self.real.normalization.apply(pixels).cpu(), boxes)
        return assembled(patches, self.options.factor), float(ranked["loss"][images, crops].mean())

    def _ranked(self, label: int) -> Ranked:
        table = read_table(self.path, filters=[("label", "==", label)])
        first = table.take(np.arange(0, table.num_rows, self.options.crops))
        losses = table["loss"].to_numpy().reshape(-1, self.options.crops)
        return {"sample_id": np.array(first["sample_id"].to_pylist()), "row": first["row"].to_numpy(), "loss": losses}

    def snapshot(self) -> tuple[Tensor, Tensor]:
        return self.images.flatten(0, 1).clone(), torch.tensor(self.context.labels).repeat_interleave(self.ipc)

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        more = super().finalize(images, labels)
        return replace(more, card={**more.card, "patches_of_reused_images": self._reused()})

    def _reused(self) -> dict[str, int]:
        """By class, how many patches come of images that gave one already; classes where none does are left out."""
        held = images_per_class(self.path, self.options.crops)
        return {
            name: self.wanted - n for name, n in zip(self.context.class_names, held, strict=True) if n < self.wanted
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {f"images/{label}": self.images[k] for k, label in enumerate(self.context.labels)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images = torch.stack([state[f"images/{label}"] for label in self.context.labels])


def best_crops(losses: np.ndarray[Any, Any], wanted: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The images [wanted] and their crops [wanted] to be taken, of losses [images, crops].

    First every image's best crop, by its loss, then every image's second best, and so on; in the end from the start again.
    """
    order = np.argsort(losses, axis=1, kind="stable")  # images x crops, best first
    sorted_losses = np.take_along_axis(losses, order, 1)
    images = np.concatenate([np.argsort(column, kind="stable") for column in sorted_losses.T])
    crops = order[images, np.repeat(np.arange(losses.shape[1]), len(losses))]
    places = np.arange(wanted) % len(images)
    return images[places], crops[places]

"""RDED: realistic, diverse and efficient patches (Sun, Shi, Yu & Lin 2024, arXiv 2312.03526).

`patch_ranking.py` has ranked crops of real images; here the best ones are tiled (`distillation/README.md`). A patch of a clip
is cut out of all its frames.
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
from distill_at_scale.distillation.methods.contract import Cost, FinalOutputs, MethodContext
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.distillation.methods.shared.real_images import RealImagesMethod
from distill_at_scale.distillation.methods.shared.teacher import TeacherMethod
from distill_at_scale.distillation.multi_formation import assemble_parts
from distill_at_scale.distillation.soft_labels import crop_and_flip

Array = np.ndarray[Any, Any]


class RDED(RealImagesMethod, TeacherMethod):
    no_runtime: ClassVar[str] = "rded ranks all its real images once, so there is no real batch to prune"
    ranks_patches: ClassVar[bool] = True
    section_name: ClassVar[str] = "rded"
    options: RDEDSection

    @classmethod
    def costs(cls, config: Config) -> list[Cost]:
        """The passes of the ranking are an upper bound: a class has at most `candidates` of its samples ranked."""
        section = cls.section(config)
        return [*super().costs(config), Cost("rank patches", section.teacher_network, "kept", section.crops, False)]

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.options = self.section(context.config)
        self.patches = self.ipc * self.options.factor**2  # of a class
        self.path = patch_ranking.table_path(context.networks, context.config)

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        shape = self.context.spec.shape
        if min(shape[-2:]) < self.options.factor:
            raise UserError(
                f"distill.rded.factor = {self.options.factor} leaves no pixel for a patch of an image of {shape[-1]} pixels; "
                "lower it"
            )

    def build(self, label: int) -> tuple[Tensor, dict[str, float]]:
        """The images of a class [ipc, *shape], and the mean loss of their patches."""
        table = patch_ranking.read_table(self.path, filters=[("label", "==", label)])  # sorted by row, then crop
        first = table.take(np.arange(0, table.num_rows, self.options.crops))  # one row per real image
        losses = table["loss"].to_numpy().reshape(-1, self.options.crops)
        images, crops = best_crops(losses, self.patches)
        ids = np.array(first["sample_id"].to_pylist())[images].tolist()
        rows = torch.from_numpy(first["row"].to_numpy()[images].astype(np.int64))
        chosen = zip(ids, crops.tolist(), strict=True)
        boxes = [patch_ranking.crop_boxes(self.context.seed, name, self.options)[crop] for name, crop in chosen]
        pixels = self.real.placement.take(label, rows)
        patches = crop_and_flip(self.real.normalization.apply(pixels).cpu(), torch.stack(boxes))
        return assemble_parts(patches, self.options.factor), {"loss": float(losses[images, crops].mean())}

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        outputs = super().finalize(images, labels)
        counts = patch_ranking.images_per_class(self.path, self.options.crops)
        ranked = zip(self.context.class_names, counts, strict=True)
        reused = {name: self.patches - n for name, n in ranked if n < self.patches}
        return replace(outputs, card={**outputs.card, "patches_of_reused_images": reused})


def best_crops(losses: Array, count: int) -> tuple[Array, Array]:
    """The images [count] and their crops [count] with the smallest of the losses [images, crops].

    The best crop of each image comes first, by loss, then the second best of each, and so on; after the last it starts over.
    """
    order = np.argsort(losses, axis=1, kind="stable")  # images x crops, best first
    images = np.concatenate([np.argsort(c, kind="stable") for c in np.take_along_axis(losses, order, 1).T])
    crops = order[images, np.repeat(np.arange(losses.shape[1]), len(losses))]
    indices = np.arange(count) % len(images)
    return images[indices], crops[indices]

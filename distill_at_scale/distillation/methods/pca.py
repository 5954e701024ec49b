"""PCA: prune, combine, augment (Xiao, Liu, He & Wang, arXiv 2502.06434): tiles of the first kept samples, with hard labels.

Prune: the candidates of a class are its first kept samples, in the order of the manifest's rank. Combine: each is reduced to
1 / factor of its sides, and factor x factor of them are tiled to one image. Augment: evaluation networks see random crops of
about one tile (`TrainingProtocol.crop`). The frames of a clip are tiled alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest.sample_types import sample_shape
from distill_at_scale.distillation.methods.coreset import Coreset
from distill_at_scale.distillation.multi_formation import assemble_parts
from distill_at_scale.distillation.student import TrainingProtocol


class PCA(Coreset):
    no_runtime: ClassVar[str] = "pca tiles its real images as they are, so there is no real batch to prune"
    section_name: ClassVar[str] = "pca"

    @classmethod
    def protocol(cls, config: Config) -> TrainingProtocol:
        """Raises UserError if a tile would have no pixel, or if the data are whitened."""
        section, side = cls.section(config), min(sample_shape(config.data)[-2:])
        if config.data.whiten != "none":
            raise UserError("distill.pca works on pixels, not on whitened data; set data.whiten=none")
        if side < section.factor:
            raise UserError(
                f"distill.pca.factor = {section.factor} leaves no pixel for a tile of an image of {side} pixels; lower it"
            )
        tile, spread = 1 / section.factor**2, section.crop_spread
        return replace(
            super().protocol(config),
            epochs=1000,
            cutmix=section.student_cutmix,
            crop=(tile / spread, min(1.0, tile * spread)),
        )

    @classmethod
    def first_kept(cls, config: Config) -> int:
        return config.distill.ipc * cls.section(config).factor ** 2

    def build(self, label: int) -> tuple[Tensor, dict[str, float]]:
        candidates, _ = super().build(label)
        return assemble_parts(candidates, self.section(self.context.config).factor), {}

"""DSA: gradient matching under differentiable siamese augmentation (Zhao & Bilen 2021, arXiv 2102.08259).

The augmentation is shared by the real and synthetic images of a class and applies to the inner training too; images
start from real ones. All else is DC.
"""

from __future__ import annotations

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DCSection
from distill_at_scale.distillation.methods.dc import DC


class DSA(DC):
    @staticmethod
    def section(config: Config) -> DCSection:
        return config.distill.dsa

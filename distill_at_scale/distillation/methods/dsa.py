"""DSA, differentiable siamese augmentation (Zhao & Bilen 2021, arXiv 2102.08259).

It is DC with one augmentation for the real and the synthetic images of a class, also in the inner training; images start
from real ones.
"""

from __future__ import annotations

from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DCSection
from distill_at_scale.distillation.methods.dc import DC


class DSA(DC):
    @staticmethod
    def section(config: Config) -> DCSection:
        return config.distill.dsa

"""DSA, differentiable siamese augmentation (Zhao & Bilen 2021, arXiv 2102.08259).

It is DC with one augmentation for the real and the synthetic images of a class, also in the inner training; images start
from real ones.
"""

from __future__ import annotations

from typing import ClassVar

from distill_at_scale.distillation.methods.dc import DC


class DSA(DC):
    section_name: ClassVar[str] = "dsa"

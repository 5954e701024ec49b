"""Distillation methods: one small file each, and this table of them."""

from distill_at_scale.distillation.methods.dc import GradientMatching
from distill_at_scale.distillation.methods.dm import DistributionMatching
from distill_at_scale.distillation.methods.dsa import SiameseMatching
from distill_at_scale.distillation.methods.idc import FormationMatching
from distill_at_scale.distillation.methods.mtt import TrajectoryMatching
from distill_at_scale.distillation.methods.rded import Patches
from distill_at_scale.distillation.methods.sre2l import Recovery
from distill_at_scale.distillation.methods.tesla import ConstantMemoryMatching

METHODS = {
    "dc": GradientMatching,
    "dsa": SiameseMatching,
    "dm": DistributionMatching,
    "idc": FormationMatching,
    "mtt": TrajectoryMatching,
    "tesla": ConstantMemoryMatching,
    "sre2l": Recovery,
    "rded": Patches,
}

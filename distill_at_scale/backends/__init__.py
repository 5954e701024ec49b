"""Distillation methods: one small file each, and this table of them."""

from distill_at_scale.backends.dc import GradientMatching
from distill_at_scale.backends.dm import DistributionMatching
from distill_at_scale.backends.dsa import SiameseMatching
from distill_at_scale.backends.idc import FormationMatching
from distill_at_scale.backends.mtt import TrajectoryMatching
from distill_at_scale.backends.rded import Patches
from distill_at_scale.backends.sre2l import Recovery
from distill_at_scale.backends.tesla import ConstantMemoryMatching

BACKENDS = {
    "dc": GradientMatching,
    "dsa": SiameseMatching,
    "dm": DistributionMatching,
    "idc": FormationMatching,
    "mtt": TrajectoryMatching,
    "tesla": ConstantMemoryMatching,
    "sre2l": Recovery,
    "rded": Patches,
}

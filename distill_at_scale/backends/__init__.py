"""Distillation methods: one small file each, and this table of them."""

from distill_at_scale.backends.dc import GradientMatching
from distill_at_scale.backends.dm import DistributionMatching
from distill_at_scale.backends.dsa import SiameseMatching
from distill_at_scale.backends.mtt import TrajectoryMatching
from distill_at_scale.backends.tesla import ConstantMemoryMatching

BACKENDS = {
    "dc": GradientMatching,
    "dsa": SiameseMatching,
    "dm": DistributionMatching,
    "mtt": TrajectoryMatching,
    "tesla": ConstantMemoryMatching,
}

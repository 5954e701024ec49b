"""The distillation methods by name (`distill.method`), one file each; `contract.py` is their contract."""

from distill_at_scale.distillation.methods.coreset import Coreset
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.distillation.methods.dm import DM
from distill_at_scale.distillation.methods.dsa import DSA
from distill_at_scale.distillation.methods.idc import IDC
from distill_at_scale.distillation.methods.mtt import MTT
from distill_at_scale.distillation.methods.pca import PCA
from distill_at_scale.distillation.methods.rded import RDED
from distill_at_scale.distillation.methods.sre2l import SRe2L
from distill_at_scale.distillation.methods.tesla import TESLA

METHODS = {
    "dc": DC, "dsa": DSA, "dm": DM, "idc": IDC, "mtt": MTT, "tesla": TESLA, "sre2l": SRe2L, "rded": RDED, "pca": PCA,
    "coreset": Coreset,
}  # fmt: skip

"""Questions about pruning on a data set: one module per study, and the table of all studies.

A study is a function from a StudyContext to a Finding.
"""

from collections.abc import Callable

from distill_at_scale.experiments.studies import across_datasets as across
from distill_at_scale.experiments.studies import critical_ratio, drop, interaction, stability, stratified
from distill_at_scale.experiments.studies.base import Finding, StudyContext

MODULES = {"critical_ratio": critical_ratio, "stratified": stratified, "drop": drop, "interaction": interaction,
           "stability": stability, "across": across}  # fmt: skip
STUDIES: dict[str, Callable[[StudyContext], Finding]] = {name: module.study for name, module in MODULES.items()}
# errors that can be detected before anything runs
CHECKS: dict[str, Callable[[StudyContext], None]] = {
    name: module.check for name, module in MODULES.items() if hasattr(module, "check")
}

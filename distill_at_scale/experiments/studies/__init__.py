"""What users want to know about pruning on their data: one file per study, and this table of them.

A study is a function from a Context to a Finding.
"""

from collections.abc import Callable

from distill_at_scale.experiments.studies import (
    across_datasets,
    critical_ratio,
    drop,
    interaction,
    stability,
    stratified,
)
from distill_at_scale.experiments.studies.base import Finding, StudyContext

STUDIES: dict[str, Callable[[StudyContext], Finding]] = {
    "critical_ratio": critical_ratio.study,
    "stratified": stratified.study,
    "drop": drop.study,
    "interaction": interaction.study,
    "stability": stability.study,
    "across": across_datasets.study,
}
CHECKS: dict[str, Callable[[StudyContext], None]] = {  # what can be known to be wrong before anything is made
    "critical_ratio": critical_ratio.check,
    "interaction": interaction.check,
    "stability": stability.check,
    "across": across_datasets.check,
}

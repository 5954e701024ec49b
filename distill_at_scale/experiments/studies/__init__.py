"""Questions about pruning on a data set: one module per study, and the table of all studies.

A study is a function from a StudyContext to a Finding.
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
# errors that can be detected before anything runs
CHECKS: dict[str, Callable[[StudyContext], None]] = {
    "critical_ratio": critical_ratio.check,
    "interaction": interaction.check,
    "stability": stability.check,
    "across": across_datasets.check,
}

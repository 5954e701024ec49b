"""What users want to know about pruning on their data: one file per study, and this table of them.

A study is a function from a Context to a Finding.
"""

import importlib
import importlib.util
from collections.abc import Callable

from distill_at_scale.studies import critical_ratio, drop, interaction, stratified
from distill_at_scale.studies.base import Context, Finding

STUDIES: dict[str, Callable[[Context], Finding]] = {
    "critical_ratio": critical_ratio.study,
    "stratified": stratified.study,
    "drop": drop.study,
    "interaction": interaction.study,
}
for _name in ("stability", "across"):  # being written
    if importlib.util.find_spec(f"distill_at_scale.studies.{_name}") is not None:
        STUDIES[_name] = importlib.import_module(f"distill_at_scale.studies.{_name}").study

"""Which criteria of a configuration are computed from checkpoints, and which checkpoints they need.

A name in `score.criterion` is one of the table, a criterion of the user's own, or the name of scores that come from elsewhere
(drawn, imported, or measured on subsets), which are passed over here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria import CRITERIA
from distill_at_scale.pruning.criteria.base import ClassCriterion, Criterion
from distill_at_scale.pruning.selection.ranking import RANDOM

CRITERION_CONTRACT = ("useful", "observe", "aggregate")
CLASS_CONTRACT = ("useful", "by_trial", "observe_class", "aggregate")
MONTE_CARLO = "monte_carlo"

Criteria = Mapping[str, Criterion | ClassCriterion]


def build_criteria(section: ScoreSection) -> dict[str, Any]:
    """The criteria that are computed from checkpoints, by the names in the configuration and in their order.

    Raises UserError for one that is unknown, does not keep its contract, or does not fit the section.
    """
    elsewhere = {RANDOM, MONTE_CARLO, *section.imported}
    return {name: _made(name, section) for name in section.criteria if name not in elsewhere}


def _made(name: str, section: ScoreSection) -> Any:
    key = "score.criterion"
    found = resolve(key, name, CRITERIA)
    method = "observe_class" if hasattr(found, "observe_class") else "observe"
    resolve(key, name, CRITERIA, CLASS_CONTRACT if method == "observe_class" else CRITERION_CONTRACT)
    made = _instance(name, found, section)
    _check_promises(name, made, section.checkpoint_counts[1])
    try:
        inspect.signature(getattr(made, method)).bind(None)
    except TypeError:
        what = "features" if method == "observe_class" else "seen"
        raise UserError(
            f"{key} = {name!r} does not keep the contract: it must be {method}(self, {what}), where `seen` has logits, "
            "labels, features and gradient_norms"
        ) from None
    return made


def _instance(name: str, found: Any, section: ScoreSection) -> Any:
    if hasattr(found, "of"):
        return found.of(section)
    try:
        return found()
    except TypeError as error:
        raise UserError(
            f"score.criterion = {name!r} does not keep the contract: it must be a class that is made without arguments, or "
            f"has a classmethod of(section) ({error})"
        ) from None


def _check_promises(name: str, made: Any, count: int) -> None:
    """What a criterion says of itself before it sees a sample."""
    if made.useful not in ("low", "high"):
        raise UserError(
            f"score.criterion = {name!r} does not keep the contract: useful is {made.useful!r}, it must be 'low' or 'high'"
        )
    epochs = epochs_of(made, count)
    if not epochs or epochs != sorted(set(epochs) & set(range(count))):
        raise UserError(
            f"score.criterion = {name!r} does not keep the contract: of {count} epochs it asks for {epochs}; epochs(count) "
            f"must name some of 0 to {count - 1}, ascending"
        )


def is_class_criterion(criterion: Any) -> bool:
    return hasattr(criterion, "observe_class")


def needs_features(criterion: Any) -> bool:
    return is_class_criterion(criterion) or getattr(criterion, "sees_features", False)


def epochs_of(criterion: Any, count: int) -> list[int]:
    """The epochs, ascending and from 0, that a criterion needs of `count`."""
    if is_class_criterion(criterion):
        return [count - 1]
    return list(criterion.epochs(count)) if hasattr(criterion, "epochs") else list(range(count))


def value_shape(criterion: Any, checkpoints: tuple[int, int]) -> tuple[int, int]:
    """Trials and epochs of its values; (1, 1) where it has one for all trials together."""
    trials, count = checkpoints
    if is_class_criterion(criterion) and not criterion.by_trial:
        return 1, 1
    return trials, len(epochs_of(criterion, count))


def needed_epochs(criteria: Iterable[Any], count: int) -> list[int]:
    """The epochs, ascending, whose checkpoints some criterion looks at."""
    return sorted({epoch for criterion in criteria for epoch in epochs_of(criterion, count)})


def column_of(name: str) -> str:
    """The column of a criterion in the score table; a plug-in's module path is left out."""
    return name.rpartition(":")[2]

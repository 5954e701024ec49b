"""Builds the criteria of a configuration that are computed from checkpoints, and says which checkpoints they need.

A name in `score.criterion` is a key of CRITERIA, a plug-in, or scores from elsewhere (the random control, imported scores,
Monte Carlo), which are skipped here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria import CRITERIA
from distill_at_scale.pruning.selection.ranking import RANDOM

CRITERION_CONTRACT = ("useful", "observe", "aggregate")
CLASS_CONTRACT = ("useful", "by_trial", "observe_class", "aggregate")
MONTE_CARLO = "monte_carlo"


def build_criteria(section: ScoreSection) -> dict[str, Any]:
    """The criteria that are computed from checkpoints, by their names in the configuration and in that order.

    Raises UserError for one that is unknown, breaks its contract, or does not fit the section.
    """
    elsewhere = {RANDOM, MONTE_CARLO, *section.imported}
    return {name: _build(name, section) for name in section.criteria if name not in elsewhere}


def _build(name: str, section: ScoreSection) -> Any:
    key, prefix = "score.criterion", f"score.criterion = {name!r} does not keep the contract:"
    factory = resolve(key, name, CRITERIA)
    by_class = is_class_criterion(factory)
    resolve(key, name, CRITERIA, CLASS_CONTRACT if by_class else CRITERION_CONTRACT)
    try:
        criterion = factory.of(section) if hasattr(factory, "of") else factory()
    except TypeError as error:
        if hasattr(factory, "of"):
            raise
        raise UserError(
            f"{prefix} it must be a class that is made without arguments, or has a classmethod of(section) ({error})"
        ) from None
    if criterion.useful not in ("low", "high"):
        raise UserError(f"{prefix} useful is {criterion.useful!r}, it must be 'low' or 'high'")
    count = section.checkpoint_counts[1]
    epochs = epochs_of(criterion, count)
    if not epochs or epochs != sorted(set(epochs) & set(range(count))):
        raise UserError(
            f"{prefix} of {count} checkpoints it asks for {epochs}; list some of 0 to {count - 1}, ascending"
        )
    method, argument = ("observe_class", "features") if by_class else ("observe", "outputs")
    try:
        inspect.signature(getattr(criterion, method)).bind(None)
    except TypeError:
        raise UserError(
            f"{prefix} it must be {method}(self, {argument}), where `outputs` has logits, labels, features and gradient_norms"
        ) from None
    return criterion


def check_classes(section: ScoreSection, classes: int) -> None:
    """Raises UserError for a criterion that cannot tell samples of so few classes apart."""
    least = {name: getattr(criterion, "least_classes", 1) for name, criterion in build_criteria(section).items()}
    for name in section.criteria:
        if classes < (needed := 2 if name == MONTE_CARLO else least.get(name, 1)):
            raise UserError(
                f"score.criterion = {name!r} needs {needed} classes or more, and the data have {classes}; set "
                "score.criterion=random, or one that compares features: density, herding or k_center"
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
    """Trials and epochs of its values; (1, 1) if it has one value for all trials together."""
    trials, count = checkpoints
    if is_class_criterion(criterion) and not criterion.by_trial:
        return 1, 1
    return trials, len(epochs_of(criterion, count))


def needed_epochs(criteria: Iterable[Any], count: int) -> list[int]:
    """The epochs, ascending, whose checkpoints some criterion needs."""
    return sorted({epoch for criterion in criteria for epoch in epochs_of(criterion, count)})


def column_of(name: str) -> str:
    """The column of a criterion in the score table, which drops the module path of a plug-in."""
    return name.rpartition(":")[2]

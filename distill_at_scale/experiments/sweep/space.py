"""What a sweep tries: the space of keys and values -> trials, with the unpruned and random controls of METHOD.md section 7.

Grid is the product of all lists; random and asha draw `sweep.samples` configurations, in a fixed order from run.seed.
Where a key has no effect (which scores, when everything is kept; a drop rate without a rule) it takes one fixed value, so
that equal distillations are equal points and are tried once. Left out: what the data say to a trial (`experiments/sweep/validate.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_at_scale.config.experiments import Control
from distill_at_scale.config.fields import is_execution_key
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.studies.base import RANDOM, UNPRUNED

RANGES = ("uniform", "loguniform", "randint")
REFUSED = {  # keys that the sweep itself decides
    "run.dir": "a trial's folder is chosen by the sweep",
    "sweep": "a sweep cannot sweep over itself",
    "studies": "studies are a command of their own",
    "evaluate.control": "the controls of a sweep are named in sweep.controls",
}
EVERYTHING = {"select.criterion": None, "select.order": "useful", "select.stratum_start": 0.0, "select.scope": "class",
              "select.per_class": None}  # fmt: skip
OF_RULE = ("runtime.drop", "runtime.tail", "runtime.probes", "runtime.decay", "runtime.refresh")
ORIGIN = "sweep.space"


@dataclass(frozen=True)
class SweepTrial:
    """A point to try, and how the table shows it."""

    point: Point
    keys: Mapping[str, Any] = field(default_factory=dict)  # by swept key; None where it makes no difference
    control: Control | None = None


def dimensions(config: Config) -> dict[str, Any]:
    """The space by dotted key: lists of values, or a range.

    Raises UserError for what is empty, unknown, not allowed, or cannot be swept.
    """
    found = dict(_dimensions(config.sweep.space))
    if not found:
        raise UserError(
            "sweep.space is empty; give at least one key, for example sweep.space={select.keep: [0.1, 0.3]}"
        )
    for key, values in found.items():
        _check_key(key)
        for value in _examples(config, key, values):
            with_overrides(config, {key: value}, ORIGIN)
    return found


def trials(config: Config) -> list[SweepTrial]:
    """All trials, controls first; points that are equal are the same object.

    Raises UserError where a combination of values is not allowed.
    """
    space = dimensions(config)
    combinations = list(_grid(space)) if config.sweep.search == "grid" else _draws(config, space)
    first = _first_scores(combinations)
    found = [*_unpruned(config, combinations, first), *_random(config, combinations, first)]
    found += [SweepTrial(Point(_without_idle(config, keys)), keys) for keys in combinations]
    repeated = [
        SweepTrial(Point(t.point.overrides, seed), t.keys, t.control)
        for t in found
        for seed in range(config.sweep.seeds)
    ]
    return _merged(config, repeated)


def _dimensions(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys may be dotted, as in a file, or nested, as an override on the command line makes them."""
    for key, values in space.items():
        if isinstance(values, dict) and not (len(values) == 1 and set(values) <= set(RANGES)):
            yield from _dimensions(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _check_key(key: str) -> None:
    for name, why in REFUSED.items():
        if f"{key}.".startswith(f"{name}."):
            raise UserError(f"{key} (in {ORIGIN}) cannot be swept: {why}; take it out")
    if is_execution_key(Config, key):
        raise UserError(f"{key} (in {ORIGIN}) cannot be swept: results do not depend on it; take it out")
    if "." not in key:
        raise UserError(f"{key} (in {ORIGIN}) is a section; write section.key, for example select.keep")


def _examples(config: Config, key: str, values: Any) -> Sequence[Any]:
    """Values to look at: all of a list, the ends of a range."""
    if isinstance(values, list):
        if not values:
            raise UserError(f"{key} (in {ORIGIN}) has no values; list at least one")
        return values
    if not isinstance(values, dict):
        raise UserError(f"{key} = {values!r} (in {ORIGIN}) is not a list; write [{values!r}], or a range {_RANGE}")
    (kind, ends) = next(iter(values.items()))
    if config.sweep.search == "grid":
        raise UserError(f"{key} (in {ORIGIN}) is a range, and sweep.search = grid needs lists; list values, or set "
                        "sweep.search=random")  # fmt: skip
    kinds = int if kind == "randint" else int | float
    if not (
        isinstance(ends, list) and len(ends) == 2 and all(isinstance(e, kinds) for e in ends) and ends[0] < ends[1]
    ):
        raise UserError(f"{key}: {kind} = {ends!r} (in {ORIGIN}) is no range; write {_RANGE}, the lower end first")
    if kind == "loguniform" and ends[0] <= 0:
        raise UserError(f"{key}: loguniform = {ends!r} (in {ORIGIN}) must begin above 0")
    return ends


_RANGE = "{uniform: [low, high]}, {loguniform: [low, high]} or {randint: [low, high]} (whole numbers)"


def _grid(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _draws(config: Config, space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The n-th draw depends on run.seed and n alone, so more samples go on where fewer ended."""
    return [
        {key: _draw(config.run.seed, number, key, values) for key, values in space.items()}
        for number in range(config.sweep.samples)
    ]


def _draw(seed: int, number: int, key: str, values: Any) -> Any:
    generator = rng.numpy_generator(seed, "sweep", number, key)
    if isinstance(values, list):
        return values[int(generator.integers(len(values)))]
    kind, (low, high) = next(iter(values.items()))
    if kind == "randint":
        return int(generator.integers(low, high + 1))
    if kind == "loguniform":
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.6g}")
    return float(f"{generator.uniform(low, high):.6g}")


def _first_scores(combinations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Controls use no scores, but stand on some: those of the first trial."""
    return {key: value for key, value in combinations[0].items() if key.startswith("score.")}


def _unpruned(
    config: Config, combinations: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> Iterator[SweepTrial]:
    """Once per combination of what matters without pruning; it also trains networks on random real images."""
    if "unpruned" not in config.sweep.controls:
        return
    for keys in combinations:
        kept = {k: v for k, v in keys.items() if not k.startswith(("select.", "runtime.", "score."))}
        overrides = _without_idle(config, {**kept, **scores, **EVERYTHING, **UNPRUNED})
        shown = {k: {**UNPRUNED, **kept}.get(k) for k in keys}
        yield SweepTrial(Point({**overrides, "evaluate.control": "random_real"}), shown, "unpruned")


def _random(
    config: Config, combinations: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> Iterator[SweepTrial]:
    """As many random samples as every trial that prunes keeps."""
    if "random" not in config.sweep.controls:
        return
    idle = ("select.order", "select.stratum_start", "select.scope")
    for keys in combinations:
        overrides = {**keys, **scores, **EVERYTHING, **RANDOM}
        overrides["select.per_class"] = _value(config, keys, "select.per_class")
        if _prunes(config, overrides):
            shown = {k: None if k in idle or k.startswith("score.") else v for k, v in {**keys, **RANDOM}.items()}
            yield SweepTrial(Point(_without_idle(config, overrides)), {k: shown[k] for k in keys}, "random")


def _without_idle(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which keys without effect have one fixed value."""
    found = dict(overrides)
    if not _prunes(config, overrides):
        found |= EVERYTHING
    if _value(config, overrides, "runtime.rule") == "none":
        found = {key: value for key, value in found.items() if key not in OF_RULE}
    return found


def _prunes(config: Config, overrides: Mapping[str, Any]) -> bool:
    return bool(_value(config, overrides, "select.per_class")) or _value(config, overrides, "select.keep") != 1


def _value(config: Config, overrides: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return overrides.get(key, getattr(getattr(config, section), name))


def _merged(config: Config, found: Sequence[SweepTrial]) -> list[SweepTrial]:
    """Each trial once; where two distil the same, they share the point, of the unpruned control if it is among them."""
    points: dict[str, Point] = {}
    unique: dict[str, SweepTrial] = {}
    for trial in found:
        overrides = {key: value for key, value in trial.point.overrides.items() if key != "evaluate.control"}
        whole = with_overrides(config, overrides, f"{ORIGIN}: {trial_name(trial)}").model_dump(
            exclude={"sweep", "studies"}
        )
        point = points.setdefault(digest([whole, trial.point.seed]), trial.point)
        merged = SweepTrial(point, trial.keys, trial.control)
        unique.setdefault(digest([dict(trial.keys), trial.control, trial.point.seed]), merged)
    return list(unique.values())


def trial_name(trial: SweepTrial) -> str:
    """A trial in words: its control, its keys and the number of its repetition."""
    parts: list[str] = [] if trial.control is None else [trial.control]
    parts += [f"{key}={value}" for key, value in trial.keys.items() if value is not None]
    return " ".join([*parts, *([f"seed={trial.point.seed}"] if trial.point.seed else [])])

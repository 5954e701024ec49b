"""The trials of a sweep: the space of keys and values -> points, with an unpruned and a random control.

grid is the product of all lists; random and asha draw `sweep.samples` configurations, in an order that run.seed fixes. A key
without effect (the criterion when everything is kept, a drop rate without a rule) takes one fixed value, so that
equal distillations are equal points and run once. Not covered: checks against the data (`validate.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distill_at_scale.config.experiments import Control
from distill_at_scale.config.fields import is_execution_key
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.config.sections import ORDER_KEYS
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
    "evaluate.controls": "the controls of a sweep are named in sweep.controls",
}
# the values that the keys of a selection take when everything is kept
EVERYTHING = {"select.criterion": None, "select.order": "useful", "select.stratum_start": 0.0, "select.scope": "class",
              "select.per_class": None}  # fmt: skip
OF_ORDER = {f"select.{key}" for keys in ORDER_KEYS.values() for key in keys} - {"select.stratum_start"}
OF_RULE = ("runtime.drop", "runtime.tail", "runtime.probes", "runtime.decay", "runtime.refresh")
ORIGIN = "sweep.space"
RANGE_FORMS = "{uniform: [low, high]}, {loguniform: [low, high]} or {randint: [low, high]} (whole numbers)"


@dataclass(frozen=True)
class SweepTrial:
    """A point to run, and its keys in the table."""

    point: Point
    keys: Mapping[str, Any] = field(default_factory=dict)  # by swept key; None where the key has no effect
    control: Control | None = None


def dimensions(config: Config) -> dict[str, Any]:
    """The space by dotted key: lists of values, or a range.

    Raises UserError for a key that is empty, unknown, not allowed, or cannot be swept.
    """
    space = dict(_flatten(config.sweep.space))
    if not space:
        raise UserError("sweep.space is empty; give at least one key, such as sweep.space={select.keep: [0.1, 0.3]}")
    for key, values in space.items():
        for name, why in REFUSED.items():
            if f"{key}.".startswith(f"{name}."):
                raise UserError(f"{key} (in {ORIGIN}) cannot be swept: {why}; take it out")
        if is_execution_key(Config, key):
            raise UserError(f"{key} (in {ORIGIN}) cannot be swept: results do not depend on it; take it out")
        if "." not in key:
            raise UserError(f"{key} (in {ORIGIN}) is a section; write section.key, for example select.keep")
        for value in _examples(config, key, values):
            with_overrides(config, {key: value}, ORIGIN)
    return space


def trials(config: Config) -> list[SweepTrial]:
    """All trials, controls first. A distillation is tried and listed once: keeping everything is the unpruned control.

    Raises UserError where a combination of values is not allowed.
    """
    space = dimensions(config)
    if config.sweep.search == "grid":
        combinations = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    else:
        # draw n depends on run.seed and n alone, so that more samples extend fewer
        combinations = [
            {key: _draw(config.run.seed, number, key, values) for key, values in space.items()}
            for number in range(config.sweep.samples)
        ]
    pruned = [_selected(config, keys) for keys in combinations]
    points, result = dict[str, Point](), dict[str, SweepTrial]()
    for trial in (*_controls(config, combinations), *pruned):
        for seed in range(config.sweep.seeds):
            repeated = SweepTrial(Point(trial.point.overrides, seed), trial.keys, trial.control)
            overrides = {key: value for key, value in trial.point.overrides.items() if key != "evaluate.control"}
            complete = with_overrides(config, overrides, f"{ORIGIN}: {trial_name(repeated)}")
            distillation = digest([complete.model_dump(exclude={"sweep", "studies"}), seed])
            if trial.control is None and distillation in points:
                continue  # it is in the table already: keeping everything is the unpruned control
            point = points.setdefault(distillation, repeated.point)
            result.setdefault(digest([dict(trial.keys), trial.control, seed]), replace(repeated, point=point))
    return list(result.values())


def trial_name(trial: SweepTrial) -> str:
    """A trial in messages: its control, its keys and the number of its repetition."""
    parts: list[str] = [] if trial.control is None else [trial.control]
    parts += [f"{key}={value}" for key, value in trial.keys.items() if value is not None]
    return " ".join([*parts, *([f"seed={trial.point.seed}"] if trial.point.seed else [])])


def _flatten(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys may be dotted, as in a file, or nested, as an override on the command line makes them."""
    for key, values in space.items():
        if isinstance(values, dict) and not (len(values) == 1 and set(values) <= set(RANGES)):
            yield from _flatten(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _examples(config: Config, key: str, values: Any) -> Sequence[Any]:
    """Values to validate: all of a list, the ends of a range."""
    if isinstance(values, list):
        if not values:
            raise UserError(f"{key} (in {ORIGIN}) has no values; list at least one")
        return values
    if not isinstance(values, dict):
        raise UserError(f"{key} = {values!r} (in {ORIGIN}) is not a list; write [{values!r}], or a range {RANGE_FORMS}")
    (kind, ends) = next(iter(values.items()))
    if config.sweep.search == "grid":
        raise UserError(f"{key} (in {ORIGIN}) is a range, and sweep.search = grid needs lists; list values, or set "
                        "sweep.search=random")  # fmt: skip
    types = int if kind == "randint" else int | float
    numbers = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, types) for end in ends)
    if not (numbers and ends[0] < ends[1]):
        raise UserError(f"{key}: {kind} = {ends!r} (in {ORIGIN}) is no range; write {RANGE_FORMS}, the lower end first")
    if kind == "loguniform" and ends[0] <= 0:
        raise UserError(f"{key}: loguniform = {ends!r} (in {ORIGIN}) must begin above 0")
    return ends


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


def _controls(config: Config, combinations: Sequence[Mapping[str, Any]]) -> Iterator[SweepTrial]:
    """The controls of each combination: unpruned, which also evaluates random real images, and random.

    An unpruned one keeps the keys that affect an unpruned run; a random one draws as many samples as the trial that prunes.
    """
    # controls use no scores, but need some to start from: those of the first trial
    scores = {key: value for key, value in combinations[0].items() if key.startswith("score.")}
    for keys in combinations if "unpruned" in config.sweep.controls else ():
        kept = {k: v for k, v in keys.items() if not k.startswith(("select.", "runtime.", "score."))}
        overrides = _without_idle(config, {**kept, **scores, **EVERYTHING, **UNPRUNED})
        shown = {k: {**UNPRUNED, **kept}.get(k) for k in keys}
        yield SweepTrial(Point({**overrides, "evaluate.control": "random_real"}), shown, "unpruned")
    idle = ("select.order", "select.stratum_start", "select.scope", *OF_ORDER)
    for keys in combinations if "random" in config.sweep.controls else ():
        overrides = {**keys, **scores, **EVERYTHING, **RANDOM}
        overrides["select.per_class"] = _value(config, keys, "select.per_class")
        if _prunes(config, overrides):
            shown = {k: None if k in idle or k.startswith("score.") else v for k, v in {**keys, **RANDOM}.items()}
            yield SweepTrial(Point(_without_idle(config, overrides)), {k: shown[k] for k in keys}, "random")


def _selected(config: Config, keys: Mapping[str, Any]) -> SweepTrial:
    """The trial of a combination of values; keys without effect are None in the table."""
    overrides = _without_idle(config, keys)
    used = {k: v if k in overrides and overrides[k] == v else None for k, v in keys.items()}
    return SweepTrial(Point(overrides), used)


def _without_idle(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which each key without effect has one fixed value."""
    result = {**overrides, **({} if _prunes(config, overrides) else EVERYTHING)}
    if _value(config, overrides, "runtime.rule") == "none":
        result = {key: value for key, value in result.items() if key not in OF_RULE}
    read = {f"select.{key}" for key in ORDER_KEYS.get(_value(config, result, "select.order"), ())}
    return {key: value for key, value in result.items() if key not in OF_ORDER - read}


def _prunes(config: Config, overrides: Mapping[str, Any]) -> bool:
    return bool(_value(config, overrides, "select.per_class")) or _value(config, overrides, "select.keep") != 1


def _value(config: Config, overrides: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return overrides.get(key, getattr(getattr(config, section), name))

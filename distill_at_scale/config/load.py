"""One strict schema for a whole run: defaults <- YAML file <- dotted overrides.

Every key has a type and a range; an unknown key or a wrong value stops the run before anything is computed and says
what is allowed. The keys are in `config/sections.py` and `config/methods.py`. Names of interchangeable parts (a source, a
criterion, a backend, a network) are plain strings here and are resolved in `config/registry.py`, so that this module depends on
nothing else in the package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from distill_at_scale.config.experiments import StudiesSection, SweepSection
from distill_at_scale.config.fields import Section, execution_key
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.config.sections import (
    ClusterSection,
    DataSection,
    EvaluateSection,
    RunSection,
    RuntimeSection,
    ScoreSection,
    SelectSection,
    TrackSection,
)
from distill_at_scale.core.errors import UserError

LARGEST_FILE = 2**20  # characters of a configuration
MOST_VALUES = 20_000  # that it holds, with whatever its aliases repeat written out
TRIED_TYPE = re.compile(r"\[|^constrained-|^str$")  # in the place of a problem: a type of several that a key may have


class Config(Section):
    """All sections of a run, and the checks that span several of them."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    score: ScoreSection = ScoreSection()
    select: SelectSection = SelectSection()
    distill: DistillSection = DistillSection()
    runtime: RuntimeSection = RuntimeSection()
    evaluate: EvaluateSection = EvaluateSection()
    cluster: ClusterSection = execution_key(ClusterSection())
    track: TrackSection = execution_key(TrackSection())
    sweep: SweepSection = execution_key(SweepSection())
    studies: StudiesSection = execution_key(StudiesSection())

    @model_validator(mode="after")
    def _stratum_fits(self) -> Config:
        if (
            self.select.order == "stratum"
            and not self.select.per_class
            and self.select.keep != "auto"
            and self.select.stratum_start + self.select.keep > 1 + 1e-9
        ):
            raise ValueError(
                f"select.stratum_start + select.keep is {self.select.stratum_start + self.select.keep:g}; "
                "a stratum must end at or before 1"
            )
        return self

    @model_validator(mode="after")
    def _auto_fits(self) -> Config:
        if self.select.keep == "auto" and self.select.per_class:
            raise ValueError(
                "select.keep: auto looks for a rate, which select.per_class would replace; give one of them"
            )
        if self.select.keep == "auto" and self.select.order == "stratum":
            raise ValueError("select.keep: auto looks for the smallest rate of an order that starts at one end; with "
                             "select.order: stratum give a rate")  # fmt: skip
        return self

    @property
    def criterion(self) -> str | dict[str, float]:
        """The criterion that decides the selection, or several with the weights of their ranks."""
        return self.select.criterion or self.score.criteria[0]

    @property
    def select_seed(self) -> int:
        return self.run.seed if self.select.seed is None else self.select.seed

    @property
    def distill_seed(self) -> int:
        return self.run.seed if self.distill.seed is None else self.distill.seed

    @property
    def min_per_class(self) -> int:
        return max(1, self.distill.ipc) if self.select.min_per_class is None else self.select.min_per_class


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, and a repeated key or aliases that repeat too much are errors."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _written_out(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _written_out(node: Any, known: dict[int, int]) -> int:
    """The values below a node once every alias is replaced by what it stands for.

    Raises YAMLError for more than MOST_VALUES, and for an alias of what it lies in.
    """
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is known: an alias within itself never ends
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in flat)
    if known[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values once its aliases are written out")
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate.

    Raises UserError that names the key, its origin and what is allowed.
    """
    values = _read_yaml(Path(path))
    origin = {}
    for text in overrides:
        key, value = _parse_override(text)
        _set(values, key.split("."), value, text)
        origin[key] = "the command line"
    return validate(values, origin, str(path))


def validate(values: dict[str, Any], origin: dict[str, str] | None = None, file: str = "the configuration") -> Config:
    """Build a Config from nested plain values; every problem is reported at once, in one UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, origin or {}, file) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def with_overrides(config: Config, overrides: Mapping[str, Any], origin: str = "the overrides") -> Config:
    """The configuration with some dotted keys set to plain values, validated again.

    Raises UserError that names an unknown key or a value that is not allowed, and `origin`.
    """
    values = config.model_dump()
    for key, value in overrides.items():
        _set(values, key.split("."), value, f"{key}={value}")
    return validate(values, dict.fromkeys(overrides, origin), origin)


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, else the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}. Is the path right?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a configuration is a YAML file in UTF-8") from None
    if len(text) > LARGEST_FILE:
        raise UserError(
            f"{path} has more than {LARGEST_FILE:,} characters, so it is no configuration; give another file"
        )
    try:
        values = yaml.load(text, Loader=_Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a date or a number that cannot be, lists in lists in lists
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold sections (run, data, score, ...), not a {type(values).__name__}")
    return {key: {} if value is None else value for key, value in (values or {}).items()}


def _parse_override(text: str) -> tuple[str, Any]:
    key, sep, value = text.partition("=")
    if not sep or not key or "." not in key:
        raise UserError(f"cannot read the override {text!r}; write section.key=value, for example select.keep=0.1")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"cannot read the value in the override {text!r}") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"the override {text!r} goes below {key}, which is not a section")
    values[keys[-1]] = value


def _explain(problem: Any, origin: dict[str, str], file: str) -> str:
    key, known = _key_of(problem["loc"]), _known_keys(Config)
    given = [
        place for name, place in origin.items() if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")
    ]
    where = given[0] if given and key else file
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key} (in {where}); {suggest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not key:
        return f"{where}: {message}"
    if key in ("score.criterion", "score.weights", "data.classes") and "valid" in message:
        message = "it should be a name or a list of names"
    return f"{key} = {problem['input']!r} (in {where}) is not allowed: {message}"


def _key_of(place: tuple[str | int, ...]) -> str:
    """The dotted key of a problem's place; pydantic adds the names of tried types, which are left out."""
    return ".".join(str(part) for part in place if not TRIED_TYPE.search(str(part)))


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys

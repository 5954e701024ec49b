"""One strict schema for a whole run: defaults <- YAML file <- dotted overrides.

Every key has a type and a range. An unknown key or a wrong value stops the run before anything is computed, and the error
says what is allowed. Names of interchangeable parts (source, criterion, method, network) are plain strings here;
`registry.py` resolves them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from distill_at_scale.config import sections
from distill_at_scale.config.experiments import StudiesSection, SweepSection
from distill_at_scale.config.fields import Section, execution_key
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.core.errors import UserError

MAX_CHARACTERS = 2**20  # of a configuration file
MAX_VALUES = 20_000  # of a configuration file, with its aliases expanded
UNION_MEMBER = re.compile(r"\[|^constrained-|^str$")  # in a pydantic location: the member of a union that was tried


class Config(Section):
    """All sections of a run, and the checks that span several of them."""

    run: sections.RunSection = sections.RunSection()
    data: sections.DataSection = sections.DataSection()
    score: sections.ScoreSection = sections.ScoreSection()
    select: sections.SelectSection = sections.SelectSection()
    distill: DistillSection = DistillSection()
    runtime: sections.RuntimeSection = sections.RuntimeSection()
    evaluate: sections.EvaluateSection = sections.EvaluateSection()
    cluster: sections.ClusterSection = execution_key(sections.ClusterSection())
    track: sections.TrackSection = execution_key(sections.TrackSection())
    sweep: SweepSection = execution_key(SweepSection())
    studies: StudiesSection = execution_key(StudiesSection())

    @model_validator(mode="after")
    def _select_fits(self) -> Config:
        select = self.select
        if select.keep == "auto":
            if select.per_class:
                raise ValueError(
                    "select.keep: auto searches for a rate, which select.per_class would replace; give one of them"
                )
            if select.order == "stratum":
                raise ValueError(
                    "select.keep: auto searches for the smallest rate of an order that starts at one end; "
                    "with select.order: stratum give a rate"
                )
        elif select.order == "stratum" and not select.per_class and select.stratum_start + select.keep > 1 + 1e-9:
            raise ValueError(
                f"select.stratum_start + select.keep is {select.stratum_start + select.keep:g}; "
                "a stratum must end at or before 1"
            )
        return self

    @property
    def criterion(self) -> str | dict[str, float]:
        """The criterion of the selection, or several with the weights of their ranks."""
        return self.score.criteria[0] if self.select.criterion is None else self.select.criterion

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
    """Safe YAML that reads 1e-3 as a number and refuses repeated keys and aliases that expand to too many values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """The number of values below a node with all aliases expanded.

    Raises YAMLError for more than MAX_VALUES, and for an alias inside the node that it names.
    """
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES + 1  # while counting: an alias inside itself never ends
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in flat)
    if counts[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"it holds more than {MAX_VALUES:,} values with its aliases expanded")
    return counts[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate.

    Raises:
        UserError: names the key, where it was set, and what is allowed.
    """
    values, origin = _read_yaml(Path(path)), {}
    for text in overrides:
        key, sep, value = text.partition("=")
        key = key.strip()
        if not sep or "." not in key:
            raise UserError(f"cannot read the override {text!r}; write section.key=value, for example select.keep=0.1")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"cannot read the value in the override {text!r}") from None
        _set(values, key.split("."), parsed, text)
        origin[key] = "the command line"
    return validate(values, origin, str(path))


def validate(values: dict[str, Any], origin: dict[str, str] | None = None, file: str = "the configuration") -> Config:
    """Build a Config from nested plain values. Raises one UserError for all problems."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, origin or {}, file) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def with_overrides(config: Config, overrides: Mapping[str, Any], origin: str = "the overrides") -> Config:
    """A configuration with some dotted keys set to plain values, validated again.

    Raises UserError for an unknown key or a value that is not allowed; the message names `origin`.
    """
    values = config.model_dump()
    for key, value in overrides.items():
        _set(values, key.split("."), value, f"{key}={value}")
    return validate(values, dict.fromkeys(overrides, origin), origin)


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the closest known name, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}. Is the path right?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a configuration is a YAML file in UTF-8") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{path} has more than {MAX_CHARACTERS:,} characters and is not a configuration; check the path"
        )
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date or number
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold sections (run, data, score, ...), not a {type(values).__name__}")
    return {key: {} if value is None else value for key, value in (values or {}).items()}


def _set(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"the override {text!r} goes below {key}, which is not a section")
    values[keys[-1]] = value


def _explain(problem: Any, origin: dict[str, str], file: str) -> str:
    """One line for a problem that pydantic reports."""
    key = ".".join(str(part) for part in problem["loc"] if not UNION_MEMBER.search(str(part)))
    related = (name for name in origin if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."))
    where = origin.get(next(related, ""), file) if key else file
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key} (in {where}); {suggest(key, _known_keys(Config))}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not key:
        return f"{where}: {message}"
    if key in ("score.criterion", "score.weights", "data.classes") and "valid" in message:
        message = "it should be a name or a list of names"
    return f"{key} = {problem['input']!r} (in {where}) is not allowed: {message}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys

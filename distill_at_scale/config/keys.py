"""The keys of the schema by dotted name, what they may hold, and their types in words.

Overrides, configuration files, error messages, the reference and the command `keys` all read the schema here.
"""

from __future__ import annotations

import functools
import json
import operator
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_at_scale.config.fields import changes_results
from distill_at_scale.config.sections import MAX_LR

NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", Any: "any", type(None): "null"}
ARTICLES = {int: "an ", float: "a "}
PLURALS = {"an integer": "integers", "a number": "numbers", "a list": "lists", "a mapping": "mappings"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "with at least"}


@dataclass(frozen=True)
class Key:
    """A key that holds a value, not a section."""

    name: str  # dotted
    field: FieldInfo
    execution: bool  # whether it never changes results

    @property
    def annotation(self) -> Any:
        """The type with its limits."""
        return with_limits(self.field)

    @property
    def default(self) -> str:
        """The default as it is written in a configuration."""
        return json.dumps(self.field.get_default(), ensure_ascii=False).strip('"')


@dataclass(frozen=True)
class SectionKeys:
    """A section, and the keys that it holds directly; inner sections follow it in `sections`."""

    name: str  # dotted
    purpose: str
    keys: list[Key]


def with_limits(field: FieldInfo) -> Any:
    """The annotation of a field, with its limits."""
    return typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def members(annotation: Any) -> list[Any]:
    """The types that a value may have: the parts of a union, without limits."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return members(parts[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in parts for member in members(part)]
    return [annotation]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a value of this type is, for example `track.mlflow`; None for other types."""
    models = [part for part in members(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return models[0] if models else None


def sections(model: type[BaseModel], name: str = "", execution: bool = False) -> Iterator[SectionKeys]:
    """All sections below a model in the order of the schema; `execution`: none of their keys changes results."""
    keys, inner = [], []
    for key, field in model.model_fields.items():
        dotted, never = f"{name}.{key}".removeprefix("."), execution or changes_results(field) == "never"
        section = section_of(field.annotation)
        if field.annotation is not section:  # also for a section that may be null
            keys.append(Key(dotted, field, never))
        if section:
            inner.append((section, dotted, never))
    if name:
        yield SectionKeys(name, (model.__doc__ or "").strip(), keys)
    for section, dotted, never in inner:
        yield from sections(section, dotted, never)


def annotation_of(model: type[BaseModel], name: str) -> Any:
    """The type of a dotted key or section, also below a key that holds a mapping; None for an unknown key."""
    annotation: Any = model
    for part in name.split("."):
        if (section := section_of(annotation)) is not None:
            annotation = with_limits(section.model_fields[part]) if part in section.model_fields else None
        else:
            annotation = value_of_mapping(annotation)
        if annotation is None:
            return None
    return annotation


def value_of_mapping(annotation: Any) -> Any:
    """The type of a mapping's values; None if the type holds no mapping."""
    return next((typing.get_args(part)[1] for part in members(annotation) if typing.get_origin(part) is dict), None)


def entry_of_list(annotation: Any) -> Any:
    """The type of a list's entries; None if the type holds no list."""
    entries = [typing.get_args(part)[0] for part in members(annotation) if typing.get_origin(part) is list]
    return functools.reduce(operator.or_, entries) if entries else None


def choices(annotation: Any) -> list[str]:
    """The words that a value, or an entry of a list, may be."""
    entry = entry_of_list(annotation)
    parts = [*members(annotation), *(members(entry) if entry is not None else [])]
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    return [value for part in literals for value in typing.get_args(part) if isinstance(value, str)]


def is_text(annotation: Any) -> bool:
    """Whether a single value of this type, or a single entry of its list, is text, whatever it looks like in YAML."""
    entry = entry_of_list(annotation)
    scalars = [
        part for part in [*members(annotation), *(members(entry) if entry is not None else [])]
        if typing.get_origin(part) not in (list, dict) and part is not type(None) and section_of(part) is None
    ]  # fmt: skip
    return bool(scalars) and all(
        part is str or (typing.get_origin(part) is Literal and all(isinstance(v, str) for v in typing.get_args(part)))
        for part in scalars
    )


def words(annotation: Any, limits: Sequence[Any] = (), *, sentence: bool = False) -> str:
    """A type and its range in words; limits of a union belong to its first part.

    Args:
        sentence: for an error message ("a number between 0 (excluded) and 1, or auto") instead of a table of the
            reference ("number > 0 and ≤ 1, or `auto`").
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        nested = [limit for part in parts[1:] for limit in getattr(part, "metadata", [part])]
        return words(parts[0], [*nested, *limits], sentence=sentence)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(words(part, limits if part is parts[0] else (), sentence=sentence) for part in parts)
    if origin is Literal:
        names = [str(value) if sentence else f"`{value}`" for value in parts]
        return " or ".join([", ".join(names[:-1]), names[-1]] if sentence and len(names) > 1 else [", ".join(names)])
    if origin is list:
        entry = words(parts[0], sentence=sentence)
        entry = functools.reduce(lambda text, article: text.replace(article, PLURALS[article]), PLURALS, entry)
        return f"{'a ' * sentence}list of {entry}" + _range(limits, sentence)
    if origin is dict:
        return f"{'a ' * sentence}mapping of " + " to ".join(words(part, sentence=sentence) for part in parts)
    if section_of(annotation):
        return f"{'a ' * sentence}section"
    return ARTICLES.get(annotation, "") * sentence + NAMES[annotation] + _range(limits, sentence)


def _range(limits: Sequence[Any], sentence: bool) -> str:
    values = {name: getattr(limit, name) for limit in limits for name in BOUNDS if hasattr(limit, name)}
    comma = "," if sentence else " "
    bounds = {name: f"{value:,}".replace(",", comma) for name, value in values.items() if value != MAX_LR}
    if not sentence or "min_length" in bounds:
        text = " and ".join(f"{BOUNDS[name]} {value}" for name, value in bounds.items())
        return text and f" {text}"
    low = bounds.get("ge", f"{bounds['gt']} (excluded)" if "gt" in bounds else "")
    high = bounds.get("le", f"{bounds['lt']} (excluded)" if "lt" in bounds else "")
    if low and high:
        return f" between {low} and {high}"
    if low:
        return f" of at least {low}" if "ge" in bounds else f" above {bounds['gt']}"
    return high and (f" of at most {high}" if "le" in bounds else f" below {bounds['lt']}")

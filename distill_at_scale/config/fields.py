"""The base class of all sections, and which keys change the results of a run.

A key changes results unless its field says otherwise:

- `execution_key`: how or where the work runs, or which runs are made. It never changes what one run computes.
- `location_key`: where an input lies. The content of the input is hashed instead.
- `later_key`: added after runs existed. It counts only when it differs from what they used, so those runs stay valid.
- `shorthand_key`: sets other keys, which count in its place.
"""

from __future__ import annotations

from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

ChangesResults = Literal["always", "never", "by content", "unless default", "by others"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _single_value_as_list(cls, values: Any) -> Any:
        """A key that takes a list takes a single value, too."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {k: [v] if k in lists and isinstance(v, str | int | float) else v for k, v in values.items()}


def execution_key(default: Any, **field: Any) -> Any:
    """A `Field` that never changes results."""
    return Field(default, json_schema_extra={"changes_results": "never"}, **field)


def location_key(default: Any, **field: Any) -> Any:
    """A `Field` that names an input whose content decides results."""
    return Field(default, json_schema_extra={"changes_results": "by content"}, **field)


def later_key(default: Any, earlier: Any = None, in_ids: bool = True, **field: Any) -> Any:
    """A `Field` that changes results only when it differs from its default, and from `earlier`, which older runs used.

    `in_ids=False`: it is newer than the ids of existing points of sweeps and studies, which lack it unless it is changed.
    """
    extra = {"changes_results": "unless default", "earlier": earlier, "in_ids": in_ids}
    return Field(default, json_schema_extra=extra, **field)


def shorthand_key(default: Any, **field: Any) -> Any:
    """A `Field` that changes results through the other keys that it sets."""
    return Field(default, json_schema_extra={"changes_results": "by others"}, **field)


def changes_results(field: FieldInfo) -> ChangesResults:
    """Whether a field of a section changes the results of a run."""
    extra = field.json_schema_extra
    return extra["changes_results"] if isinstance(extra, dict) else "always"  # type: ignore[return-value]


def is_execution_key(model: type[BaseModel], key: str) -> bool:
    """Whether a dotted key, or a section that holds it, never changes results; False for an unknown key."""
    name, _, below = key.partition(".")
    field = model.model_fields.get(name)
    if field is None or changes_results(field) == "never":
        return field is not None
    inner = field.annotation
    return bool(below) and isinstance(inner, type) and issubclass(inner, BaseModel) and is_execution_key(inner, below)


def result_values(
    section: BaseModel, prefix: str = "", *, locations: bool = False, unused: bool = False, neutral: bool = False
) -> dict[str, Any]:
    """Dotted keys and plain values of a section, or of a whole Config, that decide results.

    Args:
        prefix: put before every key, for example "score.".
        locations: keep location keys too.
        unused: keep later keys that have their default.
        neutral: keep the keys that do not decide results too, with their defaults.
            Both leave out keys that are newer than the ids (`in_ids=False`) and have their default.
    """
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, kind, extra = getattr(section, name), changes_results(field), field.json_schema_extra
        in_ids = not isinstance(extra, dict) or extra.get("in_ids", True)
        if kind in ("never", "by others") or (kind == "by content" and not locations):
            if not neutral:
                continue
            value = field.get_default(call_default_factory=True)
        elif kind == "unless default" and not (in_ids and (unused or neutral)) and value in _neutral_values(field):
            continue
        if isinstance(value, BaseModel):
            values |= result_values(value, f"{prefix}{name}.", locations=locations, unused=unused, neutral=neutral)
        else:
            values |= flatten({name: value}, prefix)
    return values


def _neutral_values(field: FieldInfo) -> tuple[Any, ...]:
    extra = field.json_schema_extra
    earlier = extra["earlier"] if isinstance(extra, dict) else None
    return (field.default,) if earlier is None else (field.default, earlier)


def explicit_keys(section: BaseModel, prefix: str = "") -> list[str]:
    """The dotted keys that were set, in a file, on the command line or in Python; not those with their default."""
    keys = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in section.model_fields_set:
            keys += explicit_keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [f"{prefix}{name}"]
    return keys


def flatten(section: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a (nested) section."""
    items = section.model_dump() if isinstance(section, BaseModel) else section
    flat: dict[str, Any] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + ".") if isinstance(value, dict) and value else {name: value})
    return flat

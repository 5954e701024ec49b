"""The reference of all keys in configs/README.md, generated from the schema.

`python -m distill_at_scale.config.reference` prints it; with a path it rewrites the part of that file below the marker.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from distill_at_scale.config.fields import changes_results
from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import MAX_LR

MARKER = "<!-- everything below is generated: python -m distill_at_scale.config.reference configs/README.md -->"
INTRODUCTION = """
## Keys

A key is `section.key` in the YAML file and on the command line. An unknown key or a value out of range is an error.
Keys marked ° never change results: they say how and where the work runs, or which runs are made.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", Any: "any", type(None): "null"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "with at least"}


def reference() -> str:
    """A heading, a sentence and a table of keys for every section, as Markdown."""
    return "\n".join([INTRODUCTION, *_section(Config, "", execution=False)]) + "\n"


def update(page: str) -> str:
    """The page with the generated part below the marker replaced."""
    head, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"the page lacks the marker {MARKER}")
    return f"{head}{MARKER}\n{reference()}"


def _section(model: type[BaseModel], name: str, execution: bool) -> list[str]:
    """The table of one section, then its inner sections; `execution`: none of its keys change results."""
    rows, inner = [], []
    for key, field in model.model_fields.items():
        never = execution or changes_results(field) == "never"
        dotted = f"{name}.{key}".removeprefix(".")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner += _section(field.annotation, dotted, never)
            continue
        default = json.dumps(field.get_default(), ensure_ascii=False).strip('"')
        kind = _type(field.annotation, field.metadata)
        cells = (f"`{key}`{'°' * never}", kind, f"`{default}`", field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for part in typing.get_args(field.annotation):  # sections that a key may hold, for example `track.mlflow`
            if isinstance(part, type) and issubclass(part, BaseModel):
                inner += _section(part, dotted, never)
    if not name:
        return inner
    lines = [f"### `{name}`", "", (model.__doc__ or "").strip(), ""]
    return lines + (["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []) + inner


def _type(annotation: Any, limits: typing.Sequence[Any] = ()) -> str:
    """A type and its range in words; limits of a union belong to its first part."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        nested = [limit for part in parts[1:] for limit in getattr(part, "metadata", [part])]
        return _type(parts[0], [*nested, *limits])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join([_type(parts[0], limits), *map(_type, parts[1:])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is list:
        return f"list of {_type(parts[0])}" + _range(limits)
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES[annotation] + _range(limits)


def _range(limits: typing.Sequence[Any]) -> str:
    values = [(sign, getattr(limit, name)) for limit in limits for name, sign in BOUNDS.items() if hasattr(limit, name)]
    bounds = [f"{sign} {value:,}".replace(",", " ") for sign, value in values if value != MAX_LR]
    return f" {' and '.join(bounds)}" if bounds else ""


def main(arguments: list[str]) -> None:
    if arguments:
        path = Path(arguments[0])
        path.write_text(update(path.read_text()))
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])

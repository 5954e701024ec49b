"""The reference of all keys in configs/README.md and configs/schema.json, generated from the schema.

`python -m distill_at_scale.config.reference configs/README.md` rewrites the part of that file below the marker, and
schema.json in the same folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.table import Table

from distill_at_scale.config import explain, shipped
from distill_at_scale.config.keys import SectionKeys, annotation_of, section_of, sections, words
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError

MARKER = "<!-- everything below is generated: python -m distill_at_scale.config.reference configs/README.md -->"
INTRODUCTION = """
## Shipped configurations

`distill-at-scale configs` prints this table, and `distill-at-scale configs cp digits` copies a file of it.
The name of a shipped configuration works like its file: `distill-at-scale run digits`.

| name | purpose | data | cost |
|---|---|---|---|
"""
KEYS = """
## Keys

A key is `section.key` in the YAML file and on the command line. An unknown key or a value out of range is an error.
Keys marked ° never change results: they say how and where the work runs, or which runs are made.
"""
NOISE = ("title", "changes_results", "earlier", "in_ids")  # of pydantic's schema


def reference() -> str:
    """The shipped configurations, then a heading, a sentence and a table of keys for every section, as Markdown."""
    heads = [(name, shipped.head(name)) for name in shipped.names()]
    rows = [(f"[`{name}`]({name}.yaml)", head.purpose, head.data, head.cost) for name, head in heads]
    lines = [INTRODUCTION.rstrip("\n"), *map(_row, rows), KEYS]
    for section in sections(Config):
        lines += [f"### `{section.name}`", "", section.purpose, ""]
        rows = [
            (f"`{key.name.rpartition('.')[2]}`{'°' * key.execution}", words(key.annotation), f"`{key.default}`",
             key.field.description or "")
            for key in section.keys
        ]  # fmt: skip
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *map(_row, rows), ""] if rows else []
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(name: str | None = None) -> list[Table]:
    """The keys of all sections, of one section with the sections inside it, or one key.

    Args:
        name: a dotted section or key; or the last name of keys, such as keep.

    Raises:
        UserError: the section or key is unknown; the message names the nearest ones.
    """
    groups = list(sections(Config))
    if name is not None:
        inside = [group for group in groups if f"{group.name}.".startswith(f"{name}.")]
        named = {name, *explain.keys_named(Config, name)}
        only = [SectionKeys(g.name, g.purpose, [k for k in g.keys if k.name in named]) for g in groups]
        groups = inside or [group for group in only if group.keys]
    if name is not None and not groups:
        what, advice = explain.unknown_key(Config, name)
        raise UserError(f"{what}; {advice}")
    result = []
    for group in groups:
        table = Table(title=f"{group.name}: {group.purpose}", title_justify="left", box=box.SIMPLE_HEAD, expand=True)
        table.add_column("key", no_wrap=True)
        for column, ratio in (("type and range", 3), ("default", 2), ("meaning", 5)):
            table.add_column(column, ratio=ratio, overflow="fold", min_width=8)
        for key in group.keys:
            type_words = words(key.annotation).replace("`", "")
            table.add_row(key.name, type_words, key.default, key.field.description)
        result += [table] if group.keys else []
    return result


def json_schema(name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a configuration file, or of one section or key. Raises UserError for an unknown name."""
    if name is not None and annotation_of(Config, name) is None and len(same := explain.keys_named(Config, name)) == 1:
        name = same[0]
    annotation = Config if name is None else annotation_of(Config, name)
    if annotation is None:
        what, advice = explain.unknown_key(Config, str(name))
        raise UserError(f"{what}; {advice}")
    schema = TypeAdapter(section_of(annotation) or annotation).json_schema()
    parent, _, last = (name or "").rpartition(".")
    if (outer := section_of(annotation_of(Config, parent))) and not section_of(annotation):
        schema = outer.model_json_schema()["properties"][last]  # with description and default
    schema = _plain(schema)
    if name is None:
        schema["properties"]["select"] = {"anyOf": [schema["properties"]["select"], {"const": "auto"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def json_text(name: str | None = None) -> str:
    """`json_schema` as text."""
    return json.dumps(json_schema(name), indent=1)


def _plain(schema: Any) -> Any:
    """A schema without pydantic's titles and marks and the defaults of whole sections; a list may be a single value."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: {name: _plain(part) for name, part in value.items()} if key in ("properties", "$defs") else _plain(value)
        for key, value in schema.items()
        if key not in NOISE and not (key == "default" and "$ref" in schema)
    }
    if kept.get("type") == "array" and "items" in kept:
        outer = {key: kept.pop(key) for key in ("description", "default") if key in kept}
        return {**outer, "anyOf": [kept, kept["items"]]}
    return kept


def update(page: str) -> str:
    """The page with the generated part below the marker replaced."""
    head, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"the page lacks the marker {MARKER}")
    return f"{head}{MARKER}\n{reference()}"


def main(arguments: list[str]) -> None:
    if arguments:
        path = Path(arguments[0])
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
        path.with_name("schema.json").write_text(json_text() + "\n", encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])

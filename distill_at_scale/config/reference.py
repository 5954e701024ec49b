"""The reference of all keys in configs/README.md and configs/schema.json, generated from the schema.

`python -m distill_at_scale.config.reference configs/README.md` rewrites the part of that file below the marker, and
schema.json in the same folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distill_at_scale.config.keys import sections, words
from distill_at_scale.config.load import Config

MARKER = "<!-- everything below is generated: python -m distill_at_scale.config.reference configs/README.md -->"
INTRODUCTION = """
## Keys

A key is `section.key` in the YAML file and on the command line. An unknown key or a value out of range is an error.
Keys marked ° never change results: they say how and where the work runs, or which runs are made.
"""


def reference() -> str:
    """A heading, a sentence and a table of keys for every section, as Markdown."""
    lines = [INTRODUCTION]
    for section in sections(Config):
        lines += [f"### `{section.name}`", "", section.purpose, ""]
        rows = []
        for key in section.keys:
            name = f"`{key.name.rpartition('.')[2]}`{'°' * key.execution}"
            cells = (name, words(key.annotation), f"`{key.default}`", key.field.description or "")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return "\n".join(lines) + "\n"


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
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])

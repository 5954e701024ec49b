"""The shipped configurations: the files of `configs/`, which the package holds too, so that an installed one has them.

Each file starts with the line of its schema, then the same four comments: Purpose, Data, Cost and Run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from distill_at_scale.config.explain import nearest, suggest
from distill_at_scale.core.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "configs"
SCHEMA_LINE = "# yaml-language-server: $schema="
LABELS = ("Purpose", "Data", "Cost", "Run")


@dataclass(frozen=True)
class Head:
    """The comments at the top of a shipped configuration: what it is for, what it needs, and the command that runs it."""

    purpose: str
    data: str
    cost: str
    run: str


def names() -> list[str]:
    """The names of all shipped configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a shipped configuration. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"the shipped configuration {name!r} does not exist; {suggest(name, names())}")
    return FOLDER / f"{name}.yaml"


def file_of(config: str | Path) -> Path:
    """The file that the argument CONFIG means: a path, or else the name of a shipped configuration.

    Raises UserError if there is neither; the message says so if a shipped configuration has the name of the file.
    """
    given = Path(config)
    if given.is_file() or (given / "run.json").is_file() or str(config) not in names():
        return given
    return path(str(config))


def advice(missing: Path) -> str:
    """What to do about a configuration file that does not exist."""
    if missing.stem in names():
        copying = f"copy it with `distill-at-scale configs cp {missing.stem}`"
        return f"{missing.stem} is a shipped configuration: give `{missing.stem}` as CONFIG, or {copying}"
    close = nearest(missing.stem, names())
    meant = f"Did you mean the shipped configuration {' or '.join(close)}? " if close else "Is the path right? "
    return f"{meant}`distill-at-scale configs` lists the shipped ones"


def head(name: str) -> Head:
    """The head of a shipped configuration. Raises ValueError if the file lacks a line of it."""
    text = path(name).read_text(encoding="utf-8").removeprefix(f"{SCHEMA_LINE}schema.json\n")
    parts = []
    for label in LABELS:
        match = re.search(rf"^# {label}: (.*(?:\n#   .*)*)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"{name}.yaml lacks the line '# {label}: ...' at its top")
        parts.append(re.sub(r"\n#\s+", " ", match[1]))
    return Head(*parts)


def table() -> Table:
    """All shipped configurations with purpose, data and rough cost; first those that need no data."""
    result = Table(box=box.SIMPLE_HEAD, expand=True)
    result.add_column("name", no_wrap=True)
    result.add_column("purpose; data; cost", overflow="fold", ratio=1)
    heads = {name: head(name) for name in names()}
    for name, of in sorted(heads.items(), key=lambda pair: (not pair[1].data.startswith("none"), pair[0])):
        result.add_row(name, f"{of.purpose}; data: {of.data}; {of.cost}")
    return result


def copy(name: str, target: Path | None = None) -> Path:
    """Copy a shipped configuration to a file or into a folder; the default is NAME.yaml in the current folder.

    The first line of the copy leads an editor to the schema of the installed package, and its command names the copy.

    Returns:
        The path of the copy.

    Raises:
        UserError: the name is unknown, the file exists, or its folder does not.
    """
    source, target = path(name), Path(f"{name}.yaml") if target is None else target
    target = target / f"{name}.yaml" if target.is_dir() else target
    text = source.read_text(encoding="utf-8")
    text = text.replace(f"{SCHEMA_LINE}schema.json", f"{SCHEMA_LINE}{FOLDER / 'schema.json'}", 1)
    text = text.replace(f"configs/{name}.yaml", str(target))
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{target} exists and is not overwritten; name another file") from None
    except FileNotFoundError:
        raise UserError(f"the folder {target.parent} does not exist; create it, or name another file") from None
    return target


def next_command(name: str, target: Path) -> str:
    """The command that runs a copy of a shipped configuration."""
    return head(name).run.partition("   (")[0].replace(f"configs/{name}.yaml", str(target))

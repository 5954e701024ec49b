"""The command that the user gave, so that messages can name the next one exactly."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

NAME = "distill-at-scale"
MANY = ("run", "sweep", "study")  # commands that run several stages


@dataclass(frozen=True)
class _Command:
    name: str = ""  # unknown: the Python API
    config: str = "CONFIG"
    overrides: tuple[str, ...] = ()


_given = _Command()


@contextmanager
def remembered(name: str = "") -> Iterator[None]:
    """Within the block `next_command` returns variants of this sub-command."""
    global _given
    before, _given = _given, _Command(name)
    try:
        yield
    finally:
        _given = before


def configured_by(config: str, overrides: Sequence[str]) -> None:
    """Set the configuration and the overrides of the remembered command."""
    global _given
    _given = replace(_given, config=config, overrides=tuple(overrides))


def runs_points() -> bool:
    """Whether the given command makes run folders below run.dir."""
    return _given.name in ("sweep", "study")


def compares() -> bool:
    """Whether the given command is `compare`."""
    return _given.name == "compare"


def next_command(stage: str | None = None, **run: str) -> str:
    """The given command line for a shell, with other keys of the section `run`. It may hold credentials of URIs.

    Args:
        stage: what to run next; run, sweep and study stay, because they run it, too.
    """
    name = _given.name if stage is None or _given.name in MANY else stage
    kept = [text for text in _given.overrides if text.partition("=")[0].strip().removeprefix("run.") not in run]
    changed = [f"run.{key}={value}" for key, value in run.items()]
    return shlex.join([NAME, name or "run", _given.config, *kept, *changed])

"""Removes credentials from values before they are shown or stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_at_scale.core import command_line
from distill_at_scale.storage.filesystem import redact_uri


def public(value: Any) -> Any:
    """A plain value (mapping, list, text, number) without credentials in URIs."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    return redact_uri(value) if isinstance(value, str) and "://" in value else value


def next_command(stage: str | None = None, **run: str) -> str:
    """`core.command_line.next_command` without credentials in URIs."""
    return " ".join(public(command_line.next_command(stage, **run).split(" ")))

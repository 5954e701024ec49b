"""A stage record: the inputs of the stage, their fingerprint, and its outputs.

A record may come from another person's run, so its form and the names in it are checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from distill_at_scale.core.hashing import digest

# The run that holds a shared stage output, relative to the folder of a sweep or study; ".." is that folder's own run.
LINKED, LINKS = "linked_to", re.compile(r"\.\.|shared/(data|scores)-[0-9a-f]{16}")


@dataclass(frozen=True)
class StageInputs:
    """Everything that decides a stage's output: flat configuration values and content hashes of what it reads."""

    config: Mapping[str, Any]
    content: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return digest({"config": dict(self.config), "content": dict(self.content)})

    def difference(self, recorded: Mapping[str, Any]) -> list[str]:
        """Lines 'key: recorded -> wanted' for all differences from a stage record."""
        lines = []
        for part, now in (("config", self.config), ("content", self.content)):
            before = recorded[part]
            for key in sorted(set(before) | set(now)):
                values = before.get(key, "absent"), json.loads(json.dumps(now.get(key, "absent")))
                if values[0] != values[1] and part == "content" and key in before and key in now:
                    change = f"other content ({values[0][:8]} -> {values[1][:8]})"
                    if key == "source":
                        change = "other files, sizes, labels or order of classes than when the data were ingested"
                    lines.append(f"{key}: {change}")
                elif values[0] != values[1]:
                    old, new = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(json.dumps, values))
                    lines.append(f"{key}: {old} -> {new}")
        return lines


def checked(record: Any) -> dict[str, Any]:
    """Return the record if it has the form that `RunDir.complete` writes; raises ValueError otherwise."""
    kinds = {"fingerprint": str, "config": dict, "content": dict, "outputs": dict, "output": str}
    for key, kind in (kinds | {"seconds": int | float}).items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise ValueError(f"{key} is missing or has another type")
    if LINKED in record and not LINKS.fullmatch(str(record[LINKED])):
        raise ValueError(f"{LINKED} = {record[LINKED]!r} leads elsewhere")
    if not all(isinstance(entry, dict) and isinstance(entry.get("bytes"), int) for entry in record["outputs"].values()):
        raise ValueError("an output has no size")
    return record


def is_artefact(name: str) -> bool:
    """Whether another run may provide this file: inside its folder, not a stage record, not hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return bool(path.parts) and not path.is_absolute() and not hidden and path.parts[0] != "stages" and "\0" not in name

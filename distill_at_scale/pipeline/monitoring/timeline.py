"""`timeline.jsonl` in the run folder: what happened when and where, over all commands that worked in it.

Each line is an event with the number of the command (`attempt`) that wrote it. Lines are appended one by one, so a killed
command loses its last one at most; reading skips incomplete lines. Not covered: single steps of a distillation, which are in
`metrics.jsonl`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from distill_at_scale.core.events import Event

NAME = "timeline.jsonl"
SKIPPED = ("log", "result")  # kinds of event


@dataclass(frozen=True)
class TimelineEntry:
    attempt: int
    event: Event


class Timeline:
    """Writes the file, which is opened at the first event."""

    name = "the timeline"

    def __init__(self, run: Path):
        self.path = run / NAME
        self._file: IO[str] | None = None

    def __call__(self, event: Event) -> None:
        if event.what in SKIPPED:
            return
        if self._file is None:
            self.attempt = 1 + max((entry.attempt for entry in read(self.path)), default=0)
            complete = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write("" if complete else "\n")
        values = {key: round(value, 3) if isinstance(value, float) else value for key, value in event.values.items()}
        rounded = {"began": round(event.began, 3), "ended": round(event.ended, 3), "values": values}
        self._file.write(json.dumps({"attempt": self.attempt, **asdict(event), **rounded}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> list[TimelineEntry]:
    """All entries in the order in which they were written."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            entries.append(TimelineEntry(values.pop("attempt"), Event(**values)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut short when a command was killed
    return entries

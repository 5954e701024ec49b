"""`timeline.jsonl` in the run folder: what happened when and where, over all commands that worked in it.

Every line is an event with the number of the command (`attempt`) that wrote it. Lines are appended one by one, so that a
killed command leaves all but perhaps its last; what is not a whole line is skipped when it is read. Left out: single steps
of a distillation, which are in `metrics.jsonl`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from distill_at_scale.core.events import Event

NAME = "timeline.jsonl"
LEFT_OUT = ("log", "result")


@dataclass(frozen=True)
class TimelineEntry:
    """A line of the file."""

    attempt: int
    event: Event


class Timeline:
    """Writes it; opens the file at the first event."""

    name = "the timeline"

    def __init__(self, run: Path):
        self.path, self._file = run / NAME, None

    _file: IO[str] | None

    def __call__(self, event: Event) -> None:
        if event.what in LEFT_OUT:
            return
        if self._file is None:
            self.attempt = 1 + max((entry.attempt for entry in read(self.path)), default=0)
            whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write("" if whole else "\n")
        self._file.write(json.dumps({"attempt": self.attempt, **_rounded(event)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> list[TimelineEntry]:
    """All entries in the order in which they were written."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            found.append(TimelineEntry(values.pop("attempt"), Event(**values)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut short when a command was killed
    return found


def _rounded(event: Event) -> dict[str, Any]:
    """Milliseconds suffice."""
    values = {key: round(value, 3) if isinstance(value, float) else value for key, value in event.values.items()}
    return asdict(event) | {"began": round(event.began, 3), "ended": round(event.ended, 3), "values": values}

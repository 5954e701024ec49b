"""What happens in a run, as plain records: which work was done where and when, and what it took.

Workers measure into these and send them home with their results; the driver hands each to every observer. Nothing here
decides anything, so results do not depend on it. Left out: what observers make of events (the other files here, and
`cluster/prometheus.py`).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

EventKind = Literal["stage", "work", "wait", "lost", "log", "result"]


@dataclass(frozen=True)
class Event:
    """Something that took from `began` to `ended` (Unix seconds) in one process.

    stage: `name` is started, finished, skipped or failed. work: a piece of work and its counts (samples, rejected, *_seconds).
    wait: what was waited for. lost: workers that were lost. log: a line of the distillation's log. result: an evaluation row.
    """

    what: EventKind
    name: str
    began: float
    ended: float
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    values: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Event:
        """Raises ValueError or TypeError for what `to_json` has not written."""
        return cls(**json.loads(text))

    @property
    def seconds(self) -> float:
        return self.ended - self.began


Emit = Callable[[Event], None]


def discard(event: Event) -> None:
    """For those who do not want to know."""


def instant(what: EventKind, name: str, values: Mapping[str, Any] | None = None, stage: str = "") -> Event:
    """An event of this moment, here."""
    now = time.time()
    return Event(what, name, now, now, values=values or {}, stage=stage)


class TimeSpent:
    """Seconds that one worker spent, by purpose; two threads may add to it if each has purposes of its own."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._told: dict[str, float] = {}

    @contextmanager
    def on(self, purpose: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[f"{purpose}_seconds"] += time.perf_counter() - began

    def delta(self) -> dict[str, float]:
        """What was added since this was last asked."""
        now = dict(self._seconds)
        found = {purpose: seconds - self._told.get(purpose, 0) for purpose, seconds in now.items()}
        self._told = now
        return found


@contextmanager
def measured(
    name: str, emit: Emit, spent: TimeSpent | None = None, what: EventKind = "work"
) -> Iterator[dict[str, Any]]:
    """Note the block as one event, with the counts that the block puts into the dict, once it has come to its end."""
    counts: dict[str, Any] = {}
    began = time.time()
    yield counts
    emit(Event(what, name, began, time.time(), values=counts | (spent.delta() if spent else {})))

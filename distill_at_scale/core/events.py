"""Events of a run: which work was done, where, when, and how long it took.

Workers return events with their results; the driver emits each to all observers. Events never influence results.
"""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal["stage", "work", "wait", "lost", "log", "result"]


@dataclass(frozen=True)
class Event:
    """Something that took from `began` to `ended` (Unix seconds) in one process. Kinds: stage: `name` is started,
    finished, skipped or failed. work: a unit of work and its counts (samples, rejected, *_seconds). wait: what was
    waited for. lost: workers were lost. log: a line of the distillation log. result: an evaluation row.
    """

    what: EventKind
    name: str
    began: float
    ended: float
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    values: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


Emit = Callable[[Event], None]


def discard(event: Event) -> None:
    """An Emit that drops the event."""


def instant(what: EventKind, name: str, values: Mapping[str, Any] | None = None, stage: str = "") -> Event:
    """An event of this process that takes no time."""
    now = time.time()
    return Event(what, name, now, now, values=values or {}, stage=stage)


class TimeSpent:
    """Seconds that one worker spent, by purpose; two threads may add to it if their purposes differ."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._reported: dict[str, float] = {}

    @contextmanager
    def on(self, purpose: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[f"{purpose}_seconds"] += time.perf_counter() - began

    def delta(self) -> dict[str, float]:
        """Seconds by purpose since the last call."""
        now = dict(self._seconds)
        added = {purpose: seconds - self._reported.get(purpose, 0) for purpose, seconds in now.items()}
        self._reported = now
        return added


@contextmanager
def measured(
    name: str, emit: Emit, spent: TimeSpent | None = None, what: EventKind = "work"
) -> Iterator[dict[str, Any]]:
    """Emit the block as one event, with the counts that it puts into the yielded dict; nothing if it raises."""
    counts: dict[str, Any] = {}
    began = time.time()
    yield counts
    emit(Event(what, name, began, time.time(), values=counts | (spent.delta() if spent else {})))

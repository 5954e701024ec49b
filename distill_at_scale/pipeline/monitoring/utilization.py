"""Where the time went, from the timeline: when commands ran, when workers were busy, and when none was.

Seconds run over all commands, without the pauses between them. `pipeline/report/timeline_chart.py` draws it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.monitoring.timeline import TimelineEntry

JOIN = 0.002  # share of the total time; a shorter pause in a worker's work counts as work


@dataclass(frozen=True)
class WorkSpan:
    """Busy with a stage from `began` to `ended`, in seconds from the start of the first command."""

    stage: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class WorkerUtilization:
    """A process and its spans, in order."""

    host: str
    pid: int
    spans: list[WorkSpan]


@dataclass(frozen=True)
class Utilization:
    starts: list[float]  # of each command
    seconds: float
    stages: list[WorkSpan]  # in the driver
    waits: list[WorkSpan]  # for Ray to start
    workers: list[WorkerUtilization]  # by host, then by their first work
    losses: list[float]
    busy: float  # seconds in which at least one worker was busy

    @property
    def waited(self) -> float:
        return sum(span.seconds for span in self.waits)


def account(entries: Sequence[TimelineEntry]) -> Utilization | None:
    """None if no command did anything."""
    events, stages = list[Event](), list[WorkSpan]()  # in seconds from the start of the first command
    starts, end = [], 0.0
    for attempt in sorted({entry.attempt for entry in entries}):
        own = [entry.event for entry in entries if entry.attempt == attempt]
        if all(event.what == "stage" and event.name == "skipped" for event in own):
            continue
        first, last = min(event.began for event in own), max(event.ended for event in own)
        shift = end - first
        moved = [Event(e.what, e.name, e.began + shift, e.ended + shift, e.host, e.pid, {}, e.stage) for e in own]
        starts.append(end)
        end += last - first
        events += moved
        stages += _stages(moved, end)
    if not starts or not end:
        return None
    work = sorted((event for event in events if event.what == "work"), key=lambda event: event.began)
    of_worker: dict[tuple[str, int], list[Event]] = {}
    for event in work:
        of_worker.setdefault((event.host, event.pid), []).append(event)
    workers = [WorkerUtilization(host, pid, _joined(own, JOIN * end)) for (host, pid), own in of_worker.items()]
    busy, until = 0.0, 0.0
    for event in work:
        busy += max(0.0, event.ended - max(event.began, until))
        until = max(until, event.ended)
    return Utilization(
        starts,
        end,
        stages,
        _joined((event for event in events if event.what == "wait"), 0),
        sorted(workers, key=lambda worker: worker.host),
        sorted(event.began for event in events if event.what == "lost"),
        busy,
    )


def _stages(events: Sequence[Event], end: float) -> list[WorkSpan]:
    """The stages of one command; one that was killed lasts to the command's end."""
    spans, running = [], dict[str, float]()
    for event in (event for event in events if event.what == "stage"):
        if event.name == "started":
            running[event.stage] = event.began
        elif event.name in ("finished", "failed") and event.stage in running:
            spans.append(WorkSpan(event.stage, running.pop(event.stage), event.ended))
    return spans + [WorkSpan(stage, began, end) for stage, began in running.items()]


def _joined(events: Iterable[Event], pause: float) -> list[WorkSpan]:
    """Consecutive events of one stage become one span, if no longer pause is between them."""
    spans: list[WorkSpan] = []
    for event in events:
        last = spans[-1] if spans else None
        if last and last.stage == event.stage and event.began - last.ended <= pause:
            spans[-1] = WorkSpan(last.stage, last.began, max(last.ended, event.ended))
        else:
            spans.append(WorkSpan(event.stage, event.began, event.ended))
    return spans

"""What the timeline says about where the time went: when commands ran, who worked when, and what nobody worked in.

Seconds here run over all commands without the pauses between them. Left out: how it is drawn (`pipeline/report/timeline_chart.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.monitoring.timeline import TimelineEntry

JOIN = 0.002  # of the whole time, between two pieces of one worker's work, counts as no pause


@dataclass(frozen=True)
class WorkSpan:
    """Somebody was busy with a stage from `began` to `ended`, in seconds of the account."""

    stage: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Worker:
    """A process and its bars, in order."""

    host: str
    pid: int
    bars: list[WorkSpan]


@dataclass(frozen=True)
class Utilization:
    """Everything that the chart and the sentence are made of."""

    starts: list[float]  # of every command
    seconds: float
    stages: list[WorkSpan]  # in the driver
    waits: list[WorkSpan]  # for Ray to start
    workers: list[Worker]  # by host, then by their first work
    losses: list[float]
    busy: float  # seconds in which anyone worked

    @property
    def waited(self) -> float:
        return sum(bar.seconds for bar in self.waits)


def account(entries: Sequence[TimelineEntry]) -> Utilization | None:
    """None where no command did anything."""
    events, stages = list[Event](), list[WorkSpan]()  # in seconds of the account
    starts, end = [], 0.0
    for attempt in sorted({entry.attempt for entry in entries}):
        mine = [entry.event for entry in entries if entry.attempt == attempt]
        if all(event.what == "stage" and event.name == "skipped" for event in mine):
            continue
        first, last = min(event.began for event in mine), max(event.ended for event in mine)
        moved = [_moved(event, end - first) for event in mine]
        starts.append(end)
        end += last - first
        events += moved
        stages += _stages(moved, end)
    if not starts or not end:
        return None
    work = [event for event in events if event.what == "work"]
    return Utilization(
        starts,
        end,
        stages,
        _bars((event for event in events if event.what == "wait"), 0),
        _workers(work, JOIN * end),
        sorted(event.began for event in events if event.what == "lost"),
        sum(last - first for first, last in _union(work)),
    )


def _moved(event: Event, by: float) -> Event:
    return Event(event.what, event.name, event.began + by, event.ended + by, event.host, event.pid, {}, event.stage)


def _stages(events: Sequence[Event], end: float) -> list[WorkSpan]:
    """Those of one command, from started to finished or failed; a stage that was killed lasts to the command's end."""
    found, open_ = [], dict[str, float]()
    for event in (event for event in events if event.what == "stage"):
        if event.name == "started":
            open_[event.stage] = event.began
        elif event.name in ("finished", "failed") and event.stage in open_:
            found.append(WorkSpan(event.stage, open_.pop(event.stage), event.ended))
    return found + [WorkSpan(stage, began, end) for stage, began in open_.items()]


def _workers(work: Sequence[Event], pause: float) -> list[Worker]:
    of: dict[tuple[str, int], list[Event]] = {}
    for event in sorted(work, key=lambda event: event.began):
        of.setdefault((event.host, event.pid), []).append(event)
    made = [Worker(host, pid, _bars(events, pause)) for (host, pid), events in of.items()]
    return sorted(made, key=lambda worker: worker.host)  # and so by their first work


def _bars(events: Iterable[Event], pause: float) -> list[WorkSpan]:
    """Pieces of one stage that follow each other, with no longer pause, become one bar."""
    found: list[WorkSpan] = []
    for event in events:
        last = found[-1] if found else None
        if last and last.stage == event.stage and event.began - last.ended <= pause:
            found[-1] = WorkSpan(last.stage, last.began, max(last.ended, event.ended))
        else:
            found.append(WorkSpan(event.stage, event.began, event.ended))
    return found


def _union(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The spans in which at least one event went on."""
    found: list[tuple[float, float]] = []
    for began, ended in sorted((event.began, event.ended) for event in events):
        if found and began <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((began, ended))
    return found

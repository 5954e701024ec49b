"""Events, observers that fail, and what a distillation's log tells of its workers."""

from __future__ import annotations

import pytest

from distill_at_scale.core.events import Event, TimeSpent, instant, measured
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.monitoring import distillation_log
from distill_at_scale.pipeline.monitoring.distillation_log import DistillationLog
from distill_at_scale.pipeline.monitoring.observers import Observers


def test_a_measured_block_is_noted_with_its_counts_once_it_ended():
    events, spent = list[Event](), TimeSpent()
    with measured("decode", events.append, spent) as counts:
        with spent.on("read"):
            counts["samples"] = 5
        assert events == []
    (event,) = events
    assert set(event.values) == {"samples", "read_seconds"}
    assert event.seconds >= 0


def test_a_block_that_raises_is_not_noted():
    events = list[Event]()
    with pytest.raises(ZeroDivisionError), measured("decode", events.append):
        _ = 1 / 0
    assert events == []


def test_seconds_are_reported_once():
    spent = TimeSpent()
    with spent.on("read"):
        pass
    first = spent.delta()["read_seconds"]
    assert first > 0
    assert spent.delta()["read_seconds"] == 0


class Broken:
    name = "the broken one"

    def __call__(self, event: Event) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError("it was left out before")


class Kept:
    name = "the one that works"

    def __init__(self) -> None:
        self.events, self.closed = list[Event](), False

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_a_failing_observer_is_switched_off_and_the_others_continue():
    lines, kept = list[str](), Kept()
    observers = Observers(lines.append, [Broken(), kept])
    observers.stage = "score"
    observers.emit(instant("work", "score"))
    observers.emit(instant("stage", "skipped", stage="select"))
    observers.close()
    assert [event.stage for event in kept.events] == ["score", "select"]
    assert kept.closed
    assert lines == ["  the broken one is switched off: [Errno 28] No space left on device"]


def test_an_observer_that_fails_tells_no_credentials():
    class Unreachable(Broken):
        def __call__(self, event: Event) -> None:
            raise OSError("API request to http://someone:do-not-tell@host:5000/api failed")

    lines = list[str]()
    Observers(lines.append, [Unreachable()]).emit(instant("stage", "started"))
    assert lines == ["  the broken one is switched off: API request to http://host:5000/api failed"]


@pytest.fixture
def log(monkeypatch):
    """What the driver makes of lines; time stands at 100 s and is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(distillation_log.time, "time", lambda: now[0])
    events, lines = list[Event](), list[str]()
    with Display.silent().meter("distill", 100, "steps") as meter:
        log = DistillationLog(events.append, meter, lines.append)
        log.events, log.lines, log.now = events, lines, now  # type: ignore[attr-defined]
        yield log


def hold(step: int, at: float, *workers: tuple[str, int]) -> dict:
    return {"held": "samples lie here", "step": step, "of": 100, "at": at, "workers": [list(w) for w in workers]}


def step(number: int) -> dict:
    return {"step": number, "of": 100, "loss": 1.0, "step_seconds": 0.1}


def pieces(log) -> list[tuple[str, int, int]]:
    return [(event.host, event.pid, event.values["steps"]) for event in log.events if event.what == "work"]


def test_how_the_steps_are_computed_is_said_once(log):
    for at in (100.0, 90.0):  # the second is the line of an earlier group
        log({**hold(0, at, ("a", 1)), "mode": "bf16, compiled (saves about 40 s of 90 s)"})
    assert log.lines == ["  samples lie here", "  steps: bf16, compiled (saves about 40 s of 90 s)"]


def test_work_is_recorded_for_every_worker_and_unit(log):
    log(hold(0, 100.0, ("a", 1), ("b", 2)))
    for number in (1, 2, 5, 6, 10):
        log.now[0] += 1
        log(step(number))
    assert pieces(log) == [("a", 1, 5), ("b", 2, 5)] * 2
    assert [event.began for event in log.events if event.what == "work"] == [100, 100, 103, 103]
    assert log.meter.done_here == 10


def test_a_loss_is_recorded_and_the_log_can_be_replayed(log):
    log(hold(0, 100.0, ("a", 1)))
    log(step(20))
    log.now[0] = 130.0
    for line in (hold(0, 100.0, ("a", 1)), step(10), hold(10, 125.0, ("b", 2)), step(15)):
        log(line)
    assert pieces(log) == [("a", 1, 20), ("b", 2, 5)]
    assert [event.values for event in log.events if event.what == "lost"] == [{"step": 20}]
    assert (log.meter.done, log.meter.done_here) == (15, 25)
    assert log.lines == ["  samples lie here"] * 2


def test_lines_of_an_earlier_command_are_not_work_of_this_one(log):
    for line in (hold(0, 50.0, ("a", 1)), step(10), step(20)):
        log(line)
    assert pieces(log) == []
    log(hold(20, 101.0, ("b", 2)))
    log(step(30))
    assert pieces(log) == [("b", 2, 10)]
    assert (log.meter.done, log.meter.done_here) == (30, 10)
    assert sum(event.what == "log" for event in log.events) == 5

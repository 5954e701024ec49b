"""Rates and remaining times count only the units of this command."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from rich.table import Table

from distill_at_scale.core import progress
from distill_at_scale.core.progress import NOTE_INTERVAL, Display, ProgressNote, format_seconds, noted


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def shown(display: Display) -> str:
    return display.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def display() -> Display:
    return Display(Console(file=io.StringIO(), width=200))


def test_units_of_earlier_commands_are_not_work_of_this_command(clock, display):
    with display.meter("decode", 1000, "samples", before=600) as meter:
        meter.advance(600)
        assert meter.rate == 0
        assert meter.seconds_left is None
        clock.now += 10
        meter.advance(100)
        assert meter.rate == pytest.approx(10)
        assert meter.seconds_left == pytest.approx(30)
    assert shown(display).splitlines() == [
        "  decode: 700 of 1,000 samples, 600 of them before, 10.0 samples/s, 30 s left",
        "  decode: 700 of 1,000 samples, 600 of them before, 10.0 samples/s, 10.0 s",
    ]


def test_units_that_were_there_may_come_in_parts_and_with_new_ones(clock, display):
    with display.meter("score", 100, "samples", before=50) as meter:
        clock.now += 5
        for count in (20, 20, 20):
            meter.advance(count)
        assert (meter.done, meter.done_here) == (60, 10)


def test_the_time_left_does_not_contain_what_came_before_the_first_report(clock, display):
    with display.meter("proxies", 1000, "samples") as meter:
        clock.now += 60  # compiling
        meter.advance(10)
        assert meter.seconds_left is None, "one per cent says too little"
        for _ in range(11):
            clock.now += 1
            meter.advance(10)
        assert meter.seconds_left == pytest.approx(88)
    assert shown(display).splitlines()[0] == "  proxies: 10 of 1,000 samples, 0.2 samples/s"


def test_steps_that_are_done_again_are_work_but_no_progress(clock, display):
    with display.meter("distill", 100, "steps") as meter:
        clock.now += 4
        meter.advance(40)
        meter.resume(20)
        clock.now += 4
        meter.advance(40)
        assert meter.done == 60
        assert meter.rate == pytest.approx(10)
        assert meter.seconds_left == pytest.approx(4)
    assert "60 of 100 steps, 20 done again, 10.0 steps/s" in shown(display)


def test_waiting_for_workers_to_start_is_not_work(clock, display):
    with display.meter("distill", 100, "steps") as meter:
        clock.now += 40
        meter.resume(10)
        clock.now += 3
        meter.advance(30)
        assert meter.rate == pytest.approx(10)
    assert shown(display).splitlines()[-1].endswith("10.0 steps/s, 43.0 s")


def test_a_finished_task_has_nothing_left_and_a_task_without_work_no_rate(clock, display):
    with display.meter("score", 10, "samples", before=10) as meter:
        clock.now += 1
        meter.advance(10)
    assert shown(display) == "  score: 10 of 10 samples, 10 of them before, 1.0 s\n"


def test_a_terminal_shows_what_is_left(clock):
    display = Display(Console(file=io.StringIO(), width=120, force_terminal=True))
    with display.meter("evaluate", 10, "networks", before=5) as meter:
        meter.advance(5)
        clock.now += 60
        meter.advance(1)
        assert display.bars is not None
        assert display.bars.tasks[0].fields["left"] == "4 min 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (59.9, "1 min 0 s")]
)
def test_durations_are_formatted_for_readers(seconds, text):
    assert format_seconds(seconds) == text


def test_a_narrow_terminal_cuts_no_cell_of_a_table():
    display, table = Display(Console(width=20, file=io.StringIO())), Table("stage", "state", "time", "when", "remark")
    table.add_row("evaluate", "finished", "2 h 5 min", "2026-01-01 10:00", "4 samples")
    display.console.print(table)
    assert "evaluate │ finished │ 2 h 5 min" in shown(display)


def test_a_status_in_a_log_says_what_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "STATUS_AFTER", 0.05)
    lines = io.StringIO()
    with Display(Console(file=lines)).status("looking") as show:
        show("measuring")  # too soon for a line
        time.sleep(0.2)
    assert lines.getvalue() == "  measuring …\n"
    with Display(Console(file=lines)).status("looking"):
        pass
    time.sleep(0.1)
    assert lines.getvalue() == "  measuring …\n"


def test_a_worker_notes_its_progress_now_and_then(clock, tmp_path):
    path, told = tmp_path / "folder" / "note", []
    note = ProgressNote(path, lambda: told.append(noted(path)))
    note(1)
    assert noted(path) == 0
    clock.now += NOTE_INTERVAL
    note(2)
    note(3)
    assert told == [2]
    assert noted(path) == 2
    path.write_bytes(b"")
    assert noted(path) == 0
    note.remove()
    note.remove()
    assert not path.exists()

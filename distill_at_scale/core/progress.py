"""Progress of a run: bars on a terminal, plain lines in a log.

Rates and remaining times count only the units of this command. Units that an earlier command finished are part of the
total, not of the speed.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.terminal import replace_unknown_characters

MIN_WIDTH = 60  # of tables: in fewer columns their cells would be cut to nothing; the terminal wraps them
LOG_INTERVAL = 5.0  # seconds between two lines of a log
STATUS_AFTER = 2.0  # seconds between two lines of a status in a log
NOTE_INTERVAL = 1.0  # seconds between two notes of a worker's progress
EARLY, REPORTS = 0.02, 10  # the share, and the reports after the first one, before which little is known of the speed
Progressed = Callable[
    [int], None
]  # takes what is done so far of a long unit of work (samples, ...), as often as convenient
# control characters except tab and newline, directional overrides, and surrogates (bytes that are not UTF-8)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters escaped: names of files and classes may hold anything."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class ProgressNote:
    """Tells the driver, in whichever process, how much of a long unit of work is done: a file that is written at most once
    per NOTE_INTERVAL. A `Progressed`.
    """

    def __init__(self, path: Path, then: Callable[[], object] = lambda: None):
        """`then` is called after each note."""
        self.path, self.then, self.written = path, then, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.written >= NOTE_INTERVAL:
            with publish(self.path) as temporary:
                temporary.write_text(str(done), encoding="utf-8")
            self.written = time.monotonic()
            self.then()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def noted(path: Path) -> int:
    """What a ProgressNote says; 0 if there is none."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


class Meter:
    """Counts the finished units of one task; the first `before` of them were finished by an earlier command."""

    def __init__(self, display: Display, name: str, total: int, unit: str, before: int = 0):
        self.display, self.name, self.total, self.unit = display, name, total, unit
        self.done, self.before, self.began, self.shown = 0, before, time.monotonic(), 0.0
        self.work_began = self.began
        self.done_here = 0  # units that this command finished, including those repeated after a loss
        self.reports, self.first = 0, (self.began, 0)  # the time of the first report, and the units done then
        self.note = ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        earlier = min(count, self.before)
        self.before -= earlier
        self.done_here += count - earlier
        self.done += count
        if self.done_here and count > earlier:
            self.first = self.first if self.reports else (time.monotonic(), self.done_here)
            self.reports += 1
        self.note = self.note if note is None else note
        self.display.refresh(self)

    def resume(self, done: int) -> None:
        """Start, or restart after a loss, behind the first `done` units."""
        self.done = done
        if not self.done_here:
            self.work_began = time.monotonic()
        self.display.refresh(self)

    @property
    def rate(self) -> float:
        """Units per second of this command."""
        return self.done_here / max(time.monotonic() - self.work_began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the total; None as long as too little is done to tell.

        After REPORTS reports, from the time since the first one, which may have taken longer: it waited for compiling.
        """
        began, units = self.first
        if self.reports > REPORTS and self.done_here > units:
            return (self.total - self.done) * (time.monotonic() - began) / (self.done_here - units)
        return (self.total - self.done) / self.rate if self.done_here > EARLY * self.total else None

    def line(self, ended: bool = False) -> str:
        parts = [f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"]
        if earlier := self.done - self.done_here:
            parts += [f"{earlier:,} of them before"] if earlier > 0 else [f"{-earlier:,} done again"]
        if self.done_here:
            slow = self.rate < 0.1
            parts.append(f"{1 / self.rate:,.0f} s each" if slow else f"{self.rate:,.1f} {self.unit}/s")
        parts += [f"{format_seconds(self.seconds_left)} left"] if self.seconds_left and not ended else []
        return ", ".join([*parts, *([self.note] if self.note else [])])


class Display:
    """Prints messages and progress to one console."""

    def __init__(self, console: Console | None = None):
        replace_unknown_characters()
        self.console = console or Console(highlight=False)
        self.console.width = max(self.console.width, MIN_WIDTH)
        self.bars: Progress | None = None
        self.task: Any = None

    @classmethod
    def silent(cls) -> Display:
        """For work whose progress is shown elsewhere."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, soft_wrap=True)

    @contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what a short task does: one changing line on a terminal; in a log a line, if it takes over STATUS_AFTER.

        Yields a function that replaces the text.
        """
        if self.console.is_terminal:
            with self.console.status(f"{text} …") as spinner:
                yield lambda now: spinner.update(f"{printable(now)} …")
            return
        shown, current = time.monotonic(), text

        def show(now: str) -> None:
            nonlocal shown, current
            current = now
            if time.monotonic() - shown >= STATUS_AFTER:
                shown = time.monotonic()
                self.say(f"  {now} …")

        first = threading.Timer(STATUS_AFTER, lambda: show(current))
        first.daemon = True
        first.start()
        try:
            yield show
        finally:
            first.cancel()

    @contextmanager
    def meter(self, name: str, total: int, unit: str, before: int = 0) -> Iterator[Meter]:
        """A progress bar on a terminal or in a notebook, or lines of a log, for one task."""
        meter = Meter(self, name, total, unit, before)
        widgets = self.console.is_jupyter and importlib.util.find_spec("ipywidgets")  # else bars cannot move there
        if self.console.is_terminal or widgets:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                       TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"))  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as self.bars:
                self.task = self.bars.add_task(name, total=total, note="", left="")
                try:
                    yield meter
                finally:
                    self.bars = None
        else:
            yield meter
        self.say(f"  {meter.line(ended=True)}, {time.monotonic() - meter.began:.1f} s")

    def refresh(self, meter: Meter) -> None:
        if self.bars is not None:
            left = f"{format_seconds(meter.seconds_left)} left" if meter.seconds_left else ""
            self.bars.update(self.task, completed=meter.done, note=meter.note, left=left)
        elif time.monotonic() - max(meter.shown, meter.began) >= LOG_INTERVAL and meter.done < meter.total:
            meter.shown = time.monotonic()
            self.say(f"  {meter.line()}")


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

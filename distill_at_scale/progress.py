"""What a run shows while it works: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 5.0  # seconds between two lines of a log


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tabs and ends of lines


def printable(text: str) -> str:
    """A text without what steers a terminal: names of files and classes are whatever somebody wrote."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Meter:
    """Counts finished units of one task."""

    def __init__(self, display: Display, name: str, total: int, unit: str):
        self.display, self.name, self.total, self.unit = display, name, total, unit
        self.done, self.began, self.shown = 0, time.monotonic(), 0.0
        self.note = ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        self.display.refresh(self)

    def line(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = f"{self.done / seconds:,.1f} {self.unit}/s"
        return f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {rate}" + (
            f", {self.note}" if self.note else ""
        )


class Display:
    """One console; knows whether anybody looks."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.bars: Progress | None = None
        self.task: Any = None

    @classmethod
    def silent(cls) -> Display:
        """For work beside other work, whose progress is shown elsewhere."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, soft_wrap=True)

    @contextmanager
    def meter(self, name: str, total: int, unit: str) -> Iterator[Meter]:
        """A progress bar (terminal) or lines at most every few seconds (log) for one task."""
        meter = Meter(self, name, total, unit)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                       TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                       TextColumn("{task.fields[note]}"))  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as self.bars:
                self.task = self.bars.add_task(name, total=total, note="")
                try:
                    yield meter
                finally:
                    self.bars = None
        else:
            yield meter
        self.say(f"  {meter.line()}, {time.monotonic() - meter.began:.1f} s")

    def refresh(self, meter: Meter) -> None:
        if self.bars is not None:
            self.bars.update(self.task, completed=meter.done, note=meter.note)
        elif time.monotonic() - max(meter.shown, meter.began) >= LINE_EVERY and meter.done < meter.total:
            meter.shown = time.monotonic()
            self.say(f"  {meter.line()}")

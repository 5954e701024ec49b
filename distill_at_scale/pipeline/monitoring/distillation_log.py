"""From the lines of a distillation's log to progress and to events: which workers were busy when, and which were lost.

The log may be reported again from its beginning, after workers went on from a checkpoint and dropped its last lines. Lines
from before this command count for curves but not as its work.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_at_scale.core.events import Emit, Event, instant
from distill_at_scale.core.progress import Meter

MAX_EVENTS = 20  # work events per worker, if none is lost


class DistillationLog:
    """Takes each line in the driver, as it is written."""

    def __init__(self, emit: Emit, meter: Meter, say: Callable[[str], None]):
        self.emit, self.meter, self.say = emit, meter, say
        self.opened = time.time()
        self.workers: list[tuple[str, int]] = []  # host and process of the current group
        self.since = 0.0  # when the group began, Unix seconds
        self.start_seconds = 0.0  # until the first group began: processes started, samples loaded
        self.until, self.step = 0.0, 0  # where the next work event begins

    def __call__(self, line: Mapping[str, Any]) -> None:
        self.emit(instant("log", "line", line))
        if "held" in line:  # a group of workers starts, the first one or another after a loss
            if line["at"] < self.opened or line["at"] <= self.since:
                return
            if self.workers:
                self.emit(instant("lost", "workers of the distillation", {"step": self.meter.done}))
            else:
                self.start_seconds = round(line["at"] - self.opened, 3)
            self.say(f"  {line['held']}")
            if "mode" in line:
                self.say(f"  steps: {line['mode']}")
            self.workers = [(host, pid) for host, pid in line["workers"]]
            self.since = self.until = line["at"]
            self.step = line["step"]
            self.meter.resume(line["step"])
        elif self.workers and line["step"] > self.meter.done:
            self.meter.advance(line["step"] - self.meter.done, describe(line))
            if line["step"] >= self.step + line["of"] / MAX_EVENTS or line["step"] == line["of"]:
                now, values = max(time.time(), self.until), {"steps": line["step"] - self.step}
                for host, pid in self.workers:
                    self.emit(Event("work", "steps", self.until, now, host, pid, values))
                self.until, self.step = now, line["step"]
        elif self.workers and "top1" in line:
            self.meter.advance(0, describe(line))


def describe(line: Mapping[str, Any]) -> str | None:
    """The values of a line besides its step, for the progress bar."""
    if "loss" not in line:
        return f"top-1 {line['top1']:.3f}" if "top1" in line else None
    parts = [f"loss {line['loss']:.4g}"]
    parts += [f"{line['step_seconds']:.3g} s/step"] if "step_seconds" in line else []
    parts += [f"{line['real_share']:.0%} of the real batch"] if "real_share" in line else []
    return ", ".join(parts)


class LogTail:
    """Reports the lines that rank 0 appends to the log, in the driver of a cluster."""

    def __init__(self, path: Path, report: Callable[[dict[str, Any]], None]):
        self.path, self.report = path, report
        self.step = 0  # the last one that was reported
        before = path.read_bytes() if path.exists() else b""
        self.position, self.last = len(before), before[before.rfind(b"\n", 0, -1) + 1 :]

    def read(self) -> bool:
        """Report new lines; returns whether there were any. Starts over where rank 0 dropped lines to repeat their steps."""
        if not self.path.exists():
            return False
        new = False
        with open(self.path, "rb") as log:
            log.seek(self.position - len(self.last))
            if log.read(len(self.last)) != self.last:
                self.position = 0
                log.seek(0)
            for text in log:
                if not text.endswith(b"\n"):
                    break
                self.position, self.last = self.position + len(text), text
                with contextlib.suppress(ValueError):  # a line may be cut where the log was replaced meanwhile
                    line = json.loads(text)
                    self.step, new = max(self.step, line["step"]), True
                    self.report(line)
        return new

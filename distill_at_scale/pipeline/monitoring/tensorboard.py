"""TensorBoard's event files in `<run.dir>/tensorboard/`: curves of the distillation, results, and seconds per stage.

They are written at once and by the caller (tensorboardX's own writer has a thread, which a full disk turns into a hang).
Where steps or results are done again, a mark in the new file takes the old ones out of the curves, as TensorBoard defines
it for a restarted job (SessionLog.START). Left out: images, which the report shows.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary

from distill_at_scale.core.events import Event

FOLDER = "tensorboard"
NO_CURVE = ("step", "of", "seconds")  # of a line of the log
FLUSH_EVERY = 2.0  # seconds


class TensorBoard:
    """Three runs in TensorBoard's sense, since each counts its steps in another way: distill, evaluate and stages."""

    name = "TensorBoard"

    def __init__(self, run: Path):
        self.folder = run / FOLDER
        self.writers: dict[str, EventsWriter] = {}
        self.flushed = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.what == "log":
            self._line(event)
        elif event.what == "result":
            row = event.values
            for key in ("top1", "top5"):
                self._write("evaluate", f"{row['set']}/{row['network']}/{key}", row[key], row["seed"])
        elif event.what == "stage" and event.name == "started" and event.stage == "evaluate":
            self._again("evaluate", 0)  # all results are told again
        elif event.what == "stage" and event.name == "finished":
            self._write("stages", f"seconds/{event.stage}", event.seconds, 0)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _line(self, event: Event) -> None:
        line = event.values
        if "held" in line:  # a distillation begins, or goes on from here
            self._again("distill", line["step"] + 1)
            return
        for key, value in line.items():
            if key not in NO_CURVE and isinstance(value, int | float) and math.isfinite(value):
                self._write("distill", key, value, line["step"])

    def _write(self, part: str, tag: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._add(part, event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _again(self, part: str, step: int) -> None:
        """What was written from this step on no longer counts."""
        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(part, event_pb2.Event(wall_time=time.time(), step=step, session_log=mark))

    def _add(self, part: str, made: event_pb2.Event) -> None:
        if part not in self.writers:
            (self.folder / part).mkdir(parents=True, exist_ok=True)
            unique = f".{time.time_ns()}"  # two commands within a second must not share a file
            self.writers[part] = EventsWriter(str(self.folder / part / "events"), unique)
        self.writers[part].write_event(made)
        if time.monotonic() - self.flushed >= FLUSH_EVERY:
            self.flushed = time.monotonic()
            for writer in self.writers.values():
                writer.flush()

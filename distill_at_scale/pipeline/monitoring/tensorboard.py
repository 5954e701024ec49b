"""TensorBoard's event files in `<run.dir>/tensorboard/`: curves of the distillation, results, and seconds per stage.

The caller writes them at once; tensorboardX's own writer has a thread, which hangs on a full disk. Where steps or results
are repeated, a SessionLog.START mark in the new file removes the old ones from the curves, as TensorBoard defines it for a
restarted job. Not covered: images, which the report shows.
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
    """Writes three TensorBoard runs, as each counts its steps in another way: distill, evaluate and stages."""

    name = "TensorBoard"

    def __init__(self, run: Path):
        self.folder = run / FOLDER
        self.writers: dict[str, EventsWriter] = {}
        self.flushed = time.monotonic()

    def __call__(self, event: Event) -> None:
        values = event.values
        if event.what == "log" and "held" in values:  # a distillation begins or resumes here
            self._restart("distill", values["step"] + 1)
        elif event.what == "log":
            for key, value in values.items():
                if key not in NO_CURVE and isinstance(value, int | float) and math.isfinite(value):
                    self._scalar("distill", key, value, values["step"])
        elif event.what == "result":
            for key in ("top1", "top5"):
                self._scalar("evaluate", f"{values['set']}/{values['network']}/{key}", values[key], values["seed"])
        elif event.what == "stage" and event.name == "started" and event.stage == "evaluate":
            self._restart("evaluate", 0)  # all results are reported again
        elif event.what == "stage" and event.name == "finished":
            self._scalar("stages", f"seconds/{event.stage}", event.seconds, 0)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _scalar(self, run: str, tag: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(run, event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _restart(self, run: str, step: int) -> None:
        """Remove what was written from this step on."""
        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(run, event_pb2.Event(wall_time=time.time(), step=step, session_log=mark))

    def _write(self, run: str, event: event_pb2.Event) -> None:
        if run not in self.writers:
            (self.folder / run).mkdir(parents=True, exist_ok=True)
            unique = f".{time.time_ns()}"  # two commands within a second must not share a file
            self.writers[run] = EventsWriter(str(self.folder / run / "events"), unique)
        self.writers[run].write_event(event)
        if time.monotonic() - self.flushed >= FLUSH_EVERY:
            self.flushed = time.monotonic()
            for writer in self.writers.values():
                writer.flush()

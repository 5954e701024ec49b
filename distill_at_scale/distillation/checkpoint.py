"""The checkpoint of a distillation: one file, replaced atomically, from which all workers resume; and when it is due."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish

MAX_INTERVAL = 60.0  # seconds of steps after which a checkpoint is due
MAX_SHARE = 0.05  # of the time that may go to saving


class DistillCheckpoint(NamedTuple):
    """Tensors by name, the number of finished steps, and the seconds that they took."""

    state: dict[str, Tensor]
    step: int
    seconds: float


class Timer:
    """Whether a checkpoint is late; only the worker that writes the file knows."""

    def __init__(self) -> None:
        self.last, self.took = time.monotonic(), 0.0

    def saved(self, began: float) -> None:
        """A checkpoint was saved now; saving began at `began` of the monotonic clock."""
        self.last = time.monotonic()
        self.took = self.last - began

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.last > max(MAX_INTERVAL, self.took / MAX_SHARE)


def save(path: Path, checkpoint: DistillCheckpoint) -> None:
    safetensors_io.save(path, checkpoint.state, {"step": str(checkpoint.step), "seconds": f"{checkpoint.seconds:.3f}"})


def read(path: Path) -> DistillCheckpoint | None:
    """The checkpoint; None without one."""
    if not path.exists():
        return None
    metadata = safetensors_io.metadata(path)
    return DistillCheckpoint(safetensors_io.load(path, again=True), int(metadata["step"]), float(metadata["seconds"]))


def checkpoint_step(path: Path) -> int:
    """The number of finished steps in a checkpoint; 0 without one."""
    return int(safetensors_io.metadata(path)["step"]) if path.exists() else 0


def trim_log(path: Path, step: int) -> None:
    """Drop the distillation's log lines after a step, which will be repeated, and incomplete lines."""
    if not path.exists():
        return
    kept = ""
    for text in path.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text) if text.endswith("}") else {"stage": "distill", "step": math.inf}
        if line.get("stage") != "distill" or line.get("step", 0) <= step:
            kept += text + "\n"
    with publish(path) as temporary:
        temporary.write_text(kept, encoding="utf-8")

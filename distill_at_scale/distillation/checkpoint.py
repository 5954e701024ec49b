"""The checkpoint of a distillation: one file, replaced in one step, from which all its workers go on; and when it is due.

It is due every `distill.checkpoint_every` steps, and where they take long with the first step that ends a minute after the last
one, as a loss repeats what was done since; but not where saving would take more than a twentieth of the time. Of a run folder
on object storage the upload, which goes on beside the steps, is not counted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish

LATEST = 60.0  # seconds of steps after which one is due, however few they were,
SHARE = 0.05  # unless more than this share of the time would go to saving


class Saved(NamedTuple):
    """What a checkpoint holds: tensors by name, the steps that were done, and the seconds that they took."""

    state: dict[str, Tensor]
    step: int
    seconds: float


class Timer:
    """Whether one is due for the time alone; kept by who writes the file."""

    def __init__(self) -> None:
        self.last, self.took = time.monotonic(), 0.0

    def saved(self, began: float) -> None:
        """One was saved just now, which began at this time of the monotonic clock."""
        self.last = time.monotonic()
        self.took = self.last - began

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.last > max(LATEST, self.took / SHARE)


def save(path: Path, saved: Saved) -> None:
    safetensors_io.save(path, saved.state, {"step": str(saved.step), "seconds": f"{saved.seconds:.3f}"})


def read(path: Path) -> Saved | None:
    """The checkpoint, None without one."""
    if not path.exists():
        return None
    facts = _facts(path)
    return Saved(safetensors_io.load(path), int(facts["step"]), float(facts["seconds"]))


def saved_step(path: Path) -> int:
    """The number of steps that a checkpoint holds, 0 without one."""
    return int(_facts(path)["step"]) if path.exists() else 0


def _facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as handle:
        return handle.metadata()


def trim_log(path: Path, step: int) -> None:
    """Drop the distillation's lines after a step: what follows is about to be done (again)."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and not _is_later(json.loads(line), step)]
        with publish(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))


def _is_later(line: dict[str, Any], step: int) -> bool:
    return line.get("stage") == "distill" and line.get("step", 0) > step

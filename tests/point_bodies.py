"""Functions that the tests of the actor runner run on its actors; they write their results to the point's folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from distill_at_scale.core.errors import DistillationDiverged, UserError


def process(config, executor, watch):
    """The process that runs it."""
    Path(f"{config.run.dir}.pid").write_text(str(os.getpid()), encoding="utf-8")


def threads(config, executor, watch):
    Path(f"{config.run.dir}.threads").write_text(str(torch.get_num_threads()), encoding="utf-8")


def dies_once(config, executor, watch):
    """The first call for point 1 ends its process."""
    marker = Path(config.run.dir).parent / "died"
    if config.run.dir.endswith("1") and not marker.exists():
        marker.touch()
        os._exit(1)
    process(config, executor, watch)


def dies(config, executor, watch):
    os._exit(1)


def user_error(config, executor, watch):
    raise UserError("bad key")


def diverged(config, executor, watch):
    raise DistillationDiverged("not finite", 3)

"""What the tests of the warm pool let its actors do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distill_at_scale.core.errors import DistillationDiverged, UserError


def process(value: int) -> tuple[int, int]:
    """The value, doubled, and the process that did it."""
    return 2 * value, os.getpid()


def threads() -> int:
    import torch

    return torch.get_num_threads()


def dies_once(marker: str, value: int) -> int:
    if value == 1 and not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return value


def dies() -> None:
    os._exit(1)


def raises(kind: str) -> Any:
    raise {"user": UserError("bad key"), "diverged": DistillationDiverged("not finite", 3)}[kind]

"""Random generators, each derived from (seed, purpose, index) and nothing else.

So a draw does not depend on the number of workers, on earlier draws, or on whether the run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # imported where it is used: processes that only decode images need no torch


def derive(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed for one purpose and index."""
    return int.from_bytes(hashlib.sha256(repr((seed, purpose, *index)).encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A new CPU generator; callers draw on the CPU and move the result, so that GPUs get the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def numpy_generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, purpose, *index))


@contextlib.contextmanager
def default_generator(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator inside the block and restore it afterwards (for module constructors)."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

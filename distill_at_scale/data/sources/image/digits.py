"""scikit-learn's 1,797 handwritten digits by 43 writers, 8 x 8 pixels in 16 grey levels; shipped inside that package.

Rows keep scikit-learn's order, so ids are stable.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources.base import listing


def load_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images uint8 [1797, 8, 8] and labels int32 [1797]."""
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin or "" if package else "").parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():  # importing scikit-learn, which reads it, takes seconds in each process
        rows = np.loadtxt(file, delimiter=",")
        images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    else:
        from sklearn import datasets

        images, labels = datasets.load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    return np.round(images * (255 / 16)).astype(np.uint8), labels.astype(np.int32)


class Digits:
    def __init__(self, config: DataSection) -> None:
        self.images, self.labels = load_digits()
        self.class_names = [str(digit) for digit in range(10)]

    def splits(self) -> list[str]:
        return ["train"]

    def listing(self, split: str) -> pa.Table:
        rows = range(len(self.labels))
        return listing([f"digits/{row:04d}" for row in rows], self.labels.tolist(), ["digits"] * len(rows), rows)

    def digest(self, split: str) -> str:
        return digest([self.images.tobytes().hex(), self.labels.tolist()])

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        return [self.images[row] for row in rows["row"].to_pylist()]

"""The embedded data set: scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels, shipped inside that package.

They are written by 43 people and normalised to 16 grey levels. The order is the original's, so ids are stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources.base import listing


class Digits:
    def __init__(self, config: DataSection) -> None:
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        self.images = np.round(data.images * (255 / 16)).astype(np.uint8)  # N x 8 x 8
        self.labels = data.target.astype(np.int32)
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

"""A synthetic data set of ImageNet-1K's size as a source (`made_up:ImageNetSized`).

1,281,167 training samples in 1000 classes of ImageNet's sizes: 895 classes of 1300, and 105 between 732 and 1299. The images
are 16 x 16 noise around a pattern of their class, so that a network can learn, in an order that mixes all classes, which is
the harder case for the merge. `data.path` is the fraction of the set (1: all of it; 0.1: a tenth of every class).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources.base import listing

SAMPLES, CLASSES, LARGEST, SMALLEST, FULL = 1_281_167, 1000, 1300, 732, 895
SIDE, TEST_EACH = 16, 2
POOL = 1 << 20  # random bytes that all noise is cut from


def class_sizes() -> np.ndarray[Any, Any]:
    """ImageNet-1K's class sizes in some order: the total, the number of full classes and the smallest one are exact."""
    small = np.linspace(SMALLEST, LARGEST - 1, CLASSES - FULL)
    missing = SAMPLES - FULL * LARGEST
    bend = 0.0
    while (SMALLEST + (small - SMALLEST) ** (1 - bend) * (LARGEST - 1 - SMALLEST) ** bend).sum() < missing:
        bend += 0.001
    sizes = np.floor(SMALLEST + (small - SMALLEST) ** (1 - bend) * (LARGEST - 1 - SMALLEST) ** bend).astype(int)
    step = 1 if sizes.sum() < missing else -1
    for i in range(abs(missing - sizes.sum())):
        sizes[1 + i % (len(sizes) - 2)] += step
    whole = np.concatenate([np.full(FULL, LARGEST), sizes])
    return np.random.default_rng(0).permutation(whole)


class ImageNetSized:
    def __init__(self, config: DataSection) -> None:
        share = float(Path(config.path or "1").name)  # a path, which workers are given in full
        self.sizes = np.maximum(1, np.round(class_sizes() * share)).astype(int)
        self.class_names = [f"n{label:08d}" for label in range(CLASSES)]
        draw = np.random.default_rng(1)
        self.patterns = draw.integers(40, 216, (CLASSES, 4, 4, 3)).repeat(4, 1).repeat(4, 2)  # [1000, 16, 16, 3]
        self.noise = draw.integers(-60, 60, POOL)

    def splits(self) -> list[str]:
        return ["train", "test"]

    def listing(self, split: str) -> pa.Table:
        labels, places = (
            self._order() if split == "train" else (np.arange(CLASSES).repeat(TEST_EACH), np.arange(2 * CLASSES))
        )
        wnids = pa.array(self.class_names).take(pa.array(labels))
        ids = pc.binary_join_element_wise(
            split, wnids, pc.binary_join_element_wise(wnids, pa.array(places).cast("string"), "_"), "/"
        )
        offset = 0 if split == "train" else SAMPLES
        return listing(ids, labels, pa.array(["made up"]).take(pa.array(labels * 0)), np.arange(len(ids)) + offset)

    def digest(self, split: str) -> str:
        return digest([split, self.sizes.tolist()])

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        labels, numbers = rows["label"].to_numpy(), rows["row"].to_numpy()
        starts = numbers * 7919 % (POOL - SIDE * SIDE * 3)
        noise = self.noise[starts[:, None] + np.arange(SIDE * SIDE * 3)].reshape(-1, SIDE, SIDE, 3)
        return list((self.patterns[labels] + noise).clip(0, 255).astype(np.uint8))

    def _order(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        labels = np.arange(CLASSES).repeat(self.sizes)
        places = np.concatenate([np.arange(size) for size in self.sizes])
        shuffled = np.random.default_rng(2).permutation(len(labels))
        return labels[shuffled], places[shuffled]

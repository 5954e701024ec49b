"""Kinetics-400/600/700 as downloaded clips: `<split>/<label>/<id>_<start>_<end>.mp4`, or flat, and the official CSVs.

Labels come from the lists (`kinetics_csv.py`), never from folders; what does not fit is set aside with its reason
(`data/sources/video/kinetics_files.py`). Ids are the POSIX paths relative to the root, classes the sorted labels of the training list. The
evaluation split is val, else a test split whose list has labels. Files of CVDF's `replacement/` take the place of others.
Nothing is opened before it is read: an empty or broken file is the decoder's matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources.base import SET_ASIDE, data_store
from distill_at_scale.data.sources.image.folders import listing_digest
from distill_at_scale.data.sources.video.kinetics_csv import read_annotations
from distill_at_scale.data.sources.video.kinetics_files import FILES, Matched


class Kinetics:
    """Lists lists and files when it is first asked, and remembers them.

    Raises UserError where lists are missing or cannot be read, where there are no clips, and where none is listed.
    """

    clips = True

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)

    @property
    def class_names(self) -> list[str]:
        return self.matched.class_names

    def splits(self) -> list[str]:
        """The splits that have files: a list alone makes none."""
        return list(self.matched.splits)

    def listing(self, split: str) -> pa.Table:
        """The clips that are listed and there."""
        return self.matched.listings[split]

    def set_aside(self, split: str) -> pa.Table:
        """Listed clips without a file; files that no list has or that lie elsewhere than listed; second and unfinished ones."""
        return self.matched.aside.get(split, SET_ASIDE.empty_table())

    def digest(self, split: str) -> str:
        """A hash of paths, labels and sizes of the clips that can be used."""
        return listing_digest(self.listing(split))

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return self.store.read_many(rows["location"].to_pylist())

    def files(self) -> pa.Table:
        """Every file below the root (schema FILES)."""
        paths, sizes = self.store.table()
        return pa.table([paths, paths, paths, np.zeros(len(paths), np.int64), sizes], schema=FILES)

    @cached_property
    def matched(self) -> Matched:
        rows = read_annotations(self.store, self.config.annotations)
        return Matched(
            rows, self.files(), self.store.place(), "train" if self.config.train_split == "train" else "test"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without lists and files, which an actor that only reads does not need."""
        return {key: value for key, value in self.__dict__.items() if key != "matched"}

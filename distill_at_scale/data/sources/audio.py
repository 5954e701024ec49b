"""Sound files: in one folder per class, or in any folders with the class in their names.

Without `data.label_pattern` the folders are those of VideoFolder: `train/<class>/...` and a test split, or class folders in the
root. With it, the class of each sound is what the group `label` of the pattern finds in its path below the root (POSIX), for
example `(?P<label>\\d)_\\w+\\.wav$` in `recordings/7_anna_12.wav`. Sounds whose path `data.test_pattern` finds are the test
split; without it, folders that name a split hold that split.

Sounds are prepared as spectrograms (`codecs/sound.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import Array, SampleRejected
from distill_at_scale.data.codecs.sound import CHILD, SoundDecoder
from distill_at_scale.data.codecs.worker_process import IsolatedFunction, WorkerDied
from distill_at_scale.data.sources.base import FileSource, by_split, listing, set_aside_table, unused_split
from distill_at_scale.data.sources.folders import VideoFolder, are_numbers, labels_of
from distill_at_scale.data.sources.media import SOUNDS


class SoundFolders(VideoFolder):
    medium, clips = SOUNDS, False


class SoundsByName(FileSource):
    """Sounds whose paths say the class. Classes are the sorted labels of the training split, by value if all are numbers."""

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        table = pa.table(dict(zip(("path", "size"), self.store.table(), strict=True)))
        self.sounds = table.filter(SOUNDS.mask(table["path"]))
        if not self.sounds.num_rows:
            raise UserError(f"{self.store.place()} holds no {SOUNDS.noun} files ({', '.join(SOUNDS.extensions)})")
        self.others = table["path"].filter(pc.invert(SOUNDS.mask(table["path"]))).combine_chunks()
        pattern = re.compile(config.label_pattern or "")
        matches = [pattern.search(path) for path in self.sounds["path"].to_pylist()]
        self.labels = pa.array([match and match["label"] for match in matches], pa.string())
        self.split_of = self.assign_splits()
        used = self.split_of[self.labels.is_valid().to_numpy(zero_copy_only=False)]
        names = {split: self.labels.filter(pa.array(self.split_of == split)).unique() for split in ("train", "test")}
        if "train" not in used:
            example = self.sounds["path"][0].as_py()
            where = f"data.label_pattern = {config.label_pattern!r} finds no label in a training path"
            raise UserError(f"{where} of {self.store.place()} such as {example!r}; correct data.label_pattern")
        own = names["train"].drop_null().to_pylist()
        self.class_names = sorted(own, key=lambda name: (int(name), name)) if are_numbers(own) else sorted(own)
        if extra := sorted({*names["test"].drop_null().to_pylist()} - {*own}):
            problem = f"the label {extra[0]!r} occurs in the test split of {self.store.place()}, but not in training"
            raise UserError(f"{problem}; correct data.label_pattern or data.test_pattern, or remove its files")

    def assign_splits(self) -> Array:
        """The split of each sound: "train", "test" or "unused" (in the folder of another evaluation split)."""
        paths = self.sounds["path"].to_pylist()
        if self.config.test_pattern is not None:
            is_test = re.compile(self.config.test_pattern).search
            splits = np.array(["test" if is_test(path) else "train" for path in paths])
            if len({*splits}) == 1:
                which = "every" if splits[0] == "test" else "no"
                problem = f"data.test_pattern = {self.config.test_pattern!r} finds {which} sound"
                raise UserError(
                    f"{problem} of {self.store.place()}, such as {paths[0]!r}; correct or remove data.test_pattern"
                )
            return splits
        folders = [path.rpartition("/")[0] for path in paths]
        self.folders = by_split(sorted({*folders}), self.store)
        of = {folder: split for split, own in self.folders.items() for folder in own}
        return np.array([of[folder] for folder in folders])

    def notes(self) -> list[str]:
        folders = getattr(self, "folders", {})
        return [unused_split(f"{folders['test'][0]}/", folders["unused"])] if "unused" in folders else []

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.split_of]

    def listing(self, split: str) -> pa.Table:
        rows = self.sounds.append_column("label", labels_of(self.labels, self.class_names))
        rows = rows.filter(pc.and_(pa.array(self.split_of == split), pc.greater_equal(rows["label"], 0)))
        rows = rows.sort_by([("label", "ascending"), ("path", "ascending")])
        path = rows["path"]
        return listing(path, rows["label"], path, np.zeros(len(path), np.int64), rows["size"])

    def set_aside(self, split: str) -> pa.Table:
        """Sounds without a label, and (with the training split) files that look like sounds and are not read."""
        unlabelled = self.sounds["path"].filter(pc.and_(pa.array(self.split_of == split), self.labels.is_null()))
        reason = "data.label_pattern finds no label in its path; rename the file, or correct the pattern"
        table = set_aside_table(unlabelled, [-1] * len(unlabelled), [reason] * len(unlabelled))
        if split != "train":
            return table
        inside = pa.array([False] * len(self.others), pa.bool_())
        return pa.concat_tables([table, SOUNDS.unused(self.others, [-1] * len(self.others), inside)])


class AudioFolder(FileSource):
    """Spectrograms of sound files; see the module's docstring."""

    tensors = True

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        if config.test_pattern is not None and config.label_pattern is None:
            folders = "^(?P<label>[^/]+)/"
            raise UserError(f"data.test_pattern needs data.label_pattern; for class folders set it to {folders!r}")
        self.files = SoundFolders(config) if config.label_pattern is None else SoundsByName(config)
        self.class_names = self.files.class_names
        self.decoder = SoundDecoder(config.rate, config.seconds, config.bands, config.max_seconds)
        self.child = IsolatedFunction(CHILD)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.decoder.shape

    def splits(self) -> list[str]:
        return self.files.splits()

    def listing(self, split: str) -> pa.Table:
        return self.files.listing(split)

    def set_aside(self, split: str) -> pa.Table:
        return self.files.set_aside(split)

    def notes(self) -> list[str]:
        return self.files.notes()

    def read(self, rows: pa.Table) -> Sequence[Any]:
        """Spectrograms, and for each sound that cannot be used a SampleRejected."""
        return [self._spectrogram(raw) for raw in self.files.read(rows)]

    def _spectrogram(self, raw: Any) -> Array | SampleRejected:
        try:
            reply, values = self.child.call(asdict(self.decoder), raw, self.config.time_limit)
        except WorkerDied as death:
            return SampleRejected(f"the decoder {death}; replace the file")
        if "rejected" in reply:
            return SampleRejected(reply["rejected"])
        return np.frombuffer(values, np.float32).reshape(self.shape)

"""ImageNet and Tiny-ImageNet as they are unpacked. Not covered: the official test splits, which have no labels."""

from __future__ import annotations

from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import listing
from distill_at_scale.data.sources.folders import IMAGE_EXTENSIONS, FolderSource
from distill_at_scale.data.sources.image.imagenet_labels import val_labels
from distill_at_scale.data.sources.label_files import LabelFile

CLASS_ORDER, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


class Imagenet(FolderSource):
    """ImageNet: `train/<wnid>/*.JPEG`, and `val/` in class folders or flat with a list of labels (`imagenet_labels.py`).

    Classes are the sorted WordNet ids of the training folders. A `test/` without class folders is not a split.
    """

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        folder = self.folders.get("test", "")
        if folder.lower().startswith("test") and not self.store.names(folder)[0]:
            del self.folders["test"]

    def list_split(self, split: str) -> pa.Table:
        """Raises UserError if folders and classes differ, or images and labels."""
        folder = self.folders[split]
        if split == "train":
            return super().list_split(split)
        class_folders, files = self.store.names(folder)
        if class_folders:
            if stray := next((name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)), None):
                place = self.store.place(f"{folder}/{stray}")
                raise UserError(f"{place} lies beside class folders; sort it into its folder or remove it")
            return super().list_split(split)
        paths, sizes = self.samples(split)
        if not len(paths):
            raise UserError(f"{self.store.place(folder)} holds no images; unpack them there")
        labels = val_labels(self.store, self.config, paths.to_pylist(), self.class_names)
        return listing(paths, labels, paths, [0] * len(paths), sizes)


class TinyImagenet(FolderSource):
    """Tiny-ImageNet: `wnids.txt`, `train/<wnid>/images/*.JPEG`, `val/images/` with `val_annotations.txt`.

    The 200 classes are in the order of wnids.txt. A `val/` sorted into class folders works as well. `words.txt` is not needed.
    Not covered: bounding boxes.
    """

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self.folders = {"train": "train"} | ({"test": "val"} if "val" in self.store.names()[0] else {})

    def find_classes(self) -> list[str]:
        """The lines of wnids.txt; raises UserError if it is missing or repeats a class, or if there is no train/."""
        names = [row[0] for row in self._file(CLASS_ORDER).rows()]
        if not names or len(set(names)) != len(names):
            raise UserError(f"{self.store.place(CLASS_ORDER)} must name every class once; download it again")
        if "train" not in self.store.names()[0]:
            raise UserError(f"{self.store.place()} has no folder train/; unpack tiny-imagenet-200.zip there")
        return names

    def list_split(self, split: str) -> pa.Table:
        """Raises UserError if folders and wnids.txt differ, or images and annotations; names the first difference."""
        if split == "train" or "images" not in self.store.names(self.folders[split])[0]:
            return super().list_split(split)
        annotations = f"{self.folders['test']}/{ANNOTATIONS}"
        place = self.store.place(annotations)
        rows = self._file(annotations).rows()
        if short := next((number for number, row in enumerate(rows, 1) if len(row) < 2), 0):
            raise UserError(f"{place}, line {short}: no class; unpack the data set again")
        wnids = {row[0]: row[1] for row in rows}
        paths, sizes = self.samples(split)
        inside = pc.starts_with(paths, f"{self.folders[split]}/images/")
        paths, sizes = paths.filter(inside), sizes.filter(inside)
        names = [PurePosixPath(path).name for path in paths.to_pylist()]
        if len(names) != len(wnids):
            raise UserError(f"{place} has {len(wnids):,} lines for {len(names):,} images; unpack the data set again")
        labels = {wnid: label for label, wnid in enumerate(self.class_names)}
        for name in names:
            if wnids.get(name) not in labels:
                what = f"the class {wnids[name]!r}, which is not in {CLASS_ORDER}," if name in wnids else "no class"
                raise UserError(f"{place} has {what} for the image {name}; unpack the data set again")
        return listing(paths, [labels[wnids[name]] for name in names], paths, [0] * len(names), sizes)

    def _file(self, name: str) -> LabelFile:
        if self.store.size(name) is None:
            raise UserError(f"{self.store.place()} has no {name}; unpack tiny-imagenet-200.zip there as it is")
        return LabelFile(self.store.place(name), self.store.read(name))

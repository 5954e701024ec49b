"""Tiny-ImageNet as it is unpacked: `wnids.txt`, `train/<wnid>/images/*.JPEG`, `val/images/` with `val_annotations.txt`.

The 200 classes are in the order of wnids.txt. A `val/` sorted into class folders is taken as well. `words.txt` is not
needed, boxes are not read, and the official test split, which has no labels, is left out.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import listing
from distill_at_scale.data.sources.image import imagenet_labels
from distill_at_scale.data.sources.image.folders import FolderSource, class_listing, complete, images

ORDER, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


class TinyImagenet(FolderSource):
    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self.folders = {"train": "train"} | ({"test": "val"} if "val" in self.store.names()[0] else {})

    def find_classes(self) -> list[str]:
        """The lines of wnids.txt.

        Raises UserError where it is missing or holds a class twice, or where there is no train/.
        """
        names = [row[0] for row in self._file(ORDER).rows()]
        if not names or len(set(names)) != len(names):
            raise UserError(f"{self.store.place(ORDER)} must hold every class once, one a line; download it again")
        if "train" not in self.store.names()[0]:
            raise UserError(f"{self.store.place()} has no folder train/; unpack tiny-imagenet-200.zip there")
        return names

    def listing_of(self, split: str) -> pa.Table:
        """Raises UserError where folders and wnids.txt differ, or images and annotations do; names the first."""
        folder = self.folders[split]
        if split == "test" and "images" in self.store.names(folder)[0]:
            return self._annotated(f"{folder}/images")
        found = class_listing(self.store, folder, self.class_names)
        complete(self, split, found)
        return found

    def _annotated(self, folder: str) -> pa.Table:
        paths, sizes = images(self.store, folder)
        wnids = self._annotations(f"{self.folders['test']}/{ANNOTATIONS}")
        names = [PurePosixPath(path).name for path in paths.to_pylist()]
        place = self.store.place(f"{self.folders['test']}/{ANNOTATIONS}")
        if len(names) != len(wnids):
            raise UserError(f"{place} has {len(wnids):,} lines for {len(names):,} images; unpack the data set again")
        labels = {name: i for i, name in enumerate(self.class_names)}
        for name in names:
            if wnids.get(name) not in labels:
                said = f"the class {wnids[name]!r}, which is not in {ORDER}," if name in wnids else "no class"
                raise UserError(f"{place} has {said} for the image {name}; unpack the data set again")
        return listing(paths, [labels[wnids[name]] for name in names], paths, [0] * len(names), sizes)

    def _annotations(self, file: str) -> dict[str, str]:
        rows = self._file(file).rows()
        if short := next((number for number, row in enumerate(rows, 1) if len(row) < 2), 0):
            raise UserError(f"{self.store.place(file)}, line {short}: no class; unpack the data set again")
        return {row[0]: row[1] for row in rows}

    def _file(self, name: str) -> imagenet_labels.File:
        if self.store.size(name) is None:
            raise UserError(f"{self.store.place()} has no {name}; unpack tiny-imagenet-200.zip there as it is")
        return imagenet_labels.File(self.store.place(name), self.store.read(name))

"""ImageNet as it is unpacked: `train/<wnid>/*.JPEG`, and `val/` in class folders or flat with a list of labels.

Classes are the sorted WordNet ids of the training folders. `imagenet_labels.py` describes the lists. Not covered: the official
test split, which has no labels.
"""

from __future__ import annotations

import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import listing
from distill_at_scale.data.sources.folders import IMAGE_EXTENSIONS, FolderSource
from distill_at_scale.data.sources.image.imagenet_labels import val_labels


class Imagenet(FolderSource):
    """A `val/` without class folders is flat; a `test/` without class folders has no labels and is not a split."""

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

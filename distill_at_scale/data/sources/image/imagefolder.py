"""Images in one folder per class: `train/<class>/*.JPEG`, and optionally `val/` or `test/`.

Sample ids are POSIX paths relative to the root, split included. Without a `train` folder, class folders in the root are the
training split. Classes are the sorted folder names of the training split. A test split may lack a class; it may not have
an extra one. Images outside class folders are ignored.
"""

from __future__ import annotations

import pyarrow as pa

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.folders import FolderSource


class ImageFolder(FolderSource):
    def find_classes(self) -> list[str]:
        names = self.class_folders(self.folders.get("train", ""))
        self.folders = {"train": "", **self.folders}
        return names

    def list_split(self, split: str) -> pa.Table:
        """Raises UserError for an empty class folder, a test class that training lacks, and a split without images."""
        if split == "train":
            return super().list_split(split)
        folder = self.folders[split]
        if self.store.names(folder)[0]:
            self.refuse_extra_classes(split)
        elif len(self.samples(split)[0]):
            raise UserError(
                f"{self.store.place(folder)} holds images but no class folders; sort them into class folders, "
                "or set data.source to imagenet, which takes a flat val/ with a list of labels"
            )
        return self.list_by_class(split)

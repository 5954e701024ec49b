"""Images in one folder per class: `train/<class>/*.JPEG`, and `val/` or `test/` where there is one.

Ids are the POSIX paths relative to the root, split included. Without a `train` folder, class folders right below the
root are the training split. Classes are in the order of their sorted names, from the training split. A test split may
lack a class; it may not have one more. Images that lie in no class folder are left out.
"""

from __future__ import annotations

import pyarrow as pa

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.image.folders import FolderSource, class_listing, complete, images


class ImageFolder(FolderSource):
    def find_classes(self) -> list[str]:
        if "train" in self.folders:
            return super().find_classes()
        names = [name for name in self.store.names()[0] if name not in self.folders.values()]
        if not names:
            raise UserError(f"{self.store.place()} holds no class folders; the layout is train/<class>/<image>.jpg")
        self.folders = {"train": "", **self.folders}
        return names

    def listing_of(self, split: str) -> pa.Table:
        """Raises UserError for an empty class folder, a test class that training lacks, or where there is no image."""
        folder = self.folders[split]
        if split == "test" and len(images(self.store, folder)[0]) and not self.store.names(folder)[0]:
            raise UserError(
                f"{self.store.place(folder)} holds images but no class folders; sort them into class folders, "
                "or set data.source to imagenet, which takes a flat val/ with a list of labels"
            )
        others = [other for other in self.folders.values() if other] if not folder else []
        if split == "test" and (extra := [n for n in self.store.names(folder)[0] if n not in self.class_names]):
            raise UserError(
                f"{self.store.place(folder)}/{extra[0]} is a class that the training split does not have; "
                "remove the folder, or add training images of the class"
            )
        found = class_listing(self.store, folder, self.class_names, others)
        if split == "train":
            complete(self, split, found)
        return found

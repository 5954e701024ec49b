"""ImageNet as folders or as the official archives, and Tiny-ImageNet. Classes are WordNet ids.

Not covered: the official test splits, which have no labels.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.archives import tar
from distill_at_scale.data.sources.base import data_store, listing
from distill_at_scale.data.sources.folders import FolderSource
from distill_at_scale.data.sources.image.imagenet_labels import val_labels
from distill_at_scale.data.sources.label_files import LabelFile
from distill_at_scale.data.sources.media import IMAGE_EXTENSIONS

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ARCHIVES = {"train": TRAIN, "test": VAL}
TRAIN_LAYOUT = "a tar of one tar of images per class (n01440764.tar, …)"
CLASS_ORDER, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


class Imagenet(FolderSource):
    """ImageNet: `train/<wnid>/*.JPEG`, and `val/` in class folders or flat with a list of labels (`imagenet_labels.py`).

    Classes are the sorted WordNet ids of the training folders.
    """

    def list_split(self, split: str) -> pa.Table:
        folder = self.folders[split]
        if split == "train":
            return super().list_split(split)
        if self.store.names(folder)[0]:
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

    def choose_splits(self) -> dict[str, str]:
        return {"train": "train"} | ({"test": "val"} if "val" in self.store.names()[0] else {})

    def find_classes(self) -> list[str]:
        """The lines of wnids.txt; raises UserError if it is missing or repeats a class, or if there is no train/."""
        names = [row[0] for row in self._file(CLASS_ORDER).rows()]
        if not names or len(set(names)) != len(names):
            raise UserError(f"{self.store.place(CLASS_ORDER)} must name every class once; download it again")
        if "train" not in self.store.names()[0]:
            raise UserError(f"{self.store.place()} has no folder train/; unpack tiny-imagenet-200.zip there")
        return names

    def list_split(self, split: str) -> pa.Table:
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


class ImagenetTar:
    """ImageNet as it is downloaded: `ILSVRC2012_img_train.tar` (a tar of one tar per class) and `ILSVRC2012_img_val.tar`.

    Both are read in place; nothing is unpacked or cached on disk. Sample ids are the paths of the unpacked folders
    (`train/n01440764/n01440764_10026.JPEG`, `val/ILSVRC2012_val_00000001.JPEG`). In a listing, `location` is the archive and
    `row` the offset of the image in it. Without the archive of val there is only a training split. Raises UserError if there
    is no training archive.
    """

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)
        if self.store.size(TRAIN) is None:
            raise UserError(f"{self.store.place(TRAIN)} is missing; data.path must be the folder that holds {TRAIN}")
        self._listings: dict[str, pa.Table] = {}

    @property
    def class_names(self) -> list[str]:
        return sorted(self._classes)

    def splits(self) -> list[str]:
        return [split for split, archive in ARCHIVES.items() if self.store.size(archive) is not None]

    def listing(self, split: str) -> pa.Table:
        """The images in the order of their offsets; cached."""
        if split not in self._listings and split == "train":
            labels_of = {wnid: label for label, wnid in enumerate(self.class_names)}

            def list_class(wnid: str) -> pa.Table:
                _, start, size = self._classes[wnid]
                images = self._images(TRAIN, start, start + size, f": {wnid}.tar at byte {start:,}")
                ids = [f"train/{wnid}/{image.name.removeprefix('./')}" for image in images]
                return _table(TRAIN, ids, [labels_of[wnid]] * len(images), images)

            # ids cannot repeat between classes, as each begins with the class
            tables = tar.map_in_threads(list_class, self._classes, 1 if self.store.local else tar.REMOTE_THREADS)
            self._listings[split] = pa.concat_tables(tables).combine_chunks()
        elif split not in self._listings:
            images = self._images(VAL)
            names = [posixpath.basename(image.name) for image in images]
            labels = val_labels(self.store, self.config, names, self.class_names)
            self._listings[split] = _table(VAL, [f"val/{name}" for name in names], labels, images)
        return self._listings[split]

    def digest(self, split: str) -> str:
        """A hash of the archive's size and of names, labels, offsets and sizes of its images."""
        archive = ARCHIVES[split]
        return digest([archive, self.store.size(archive), tar.index_digest(self.listing(split))])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return tar.read(self.store, rows)

    @cached_property
    def _classes(self) -> dict[str, tar.Member]:
        """The archive of each class in the training archive, by WordNet id."""
        classes: dict[str, tar.Member] = {}
        with tar.open_archive(self.store, TRAIN) as window:
            for member in tar.members(window):
                wnid, extension = posixpath.splitext(posixpath.basename(member.name))
                if extension != ".tar":
                    raise UserError(f"{window.place} holds {member.name!r}; it must be {TRAIN_LAYOUT}")
                if wnid in classes:
                    raise UserError(f"{window.place} holds {member.name!r} twice. {tar.DOWNLOAD_AGAIN}.")
                classes[wnid] = member
        if not classes:
            raise UserError(f"{self.store.place(TRAIN)} is empty; it must be {TRAIN_LAYOUT}. {tar.DOWNLOAD_AGAIN}.")
        return classes

    def _images(self, archive: str, start: int = 0, end: int | None = None, where: str = "") -> list[tar.Member]:
        with tar.open_archive(self.store, archive) as window:
            members = tar.members(window, start, end)
            images = [member for member in members if member.name.lower().endswith(IMAGE_EXTENSIONS)]
        if not images:
            raise UserError(f"{self.store.place(archive)}{where} holds no images. {tar.DOWNLOAD_AGAIN}.")
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Drops the index, which an actor that only reads does not need."""
        return {k: v for k, v in self.__dict__.items() if k != "_classes"} | {"_listings": {}}


def _table(archive: str, ids: list[str], labels: Sequence[int], images: list[tar.Member]) -> pa.Table:
    offsets, sizes = [image.offset for image in images], [image.size for image in images]
    try:
        return listing(ids, labels, [archive] * len(ids), offsets, sizes)
    except UserError as error:
        raise UserError(f"{archive}: {error}. {tar.DOWNLOAD_AGAIN}.") from None

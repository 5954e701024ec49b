"""ImageNet as it is downloaded: `ILSVRC2012_img_train.tar` (a tar of one tar per class) and `ILSVRC2012_img_val.tar`.

Both are read in place; nothing is unpacked or cached. Sample ids are the paths of the unpacked folders
(`train/n01440764/n01440764_10026.JPEG`, `val/ILSVRC2012_val_00000001.JPEG`), classes the sorted WordNet ids. In a listing,
`location` is the archive and `row` the offset of the image in it. Labels of val come from the devkit's list
(`imagenet_labels.py`). Without the archive of val there is only a training split. Not covered: the test archive, which has
no labels.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.archives import tar
from distill_at_scale.data.sources.base import data_store, listing
from distill_at_scale.data.sources.image.imagenet_labels import val_labels

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ARCHIVES = {"train": TRAIN, "test": VAL}
EXTENSIONS = (".jpeg", ".jpg", ".png")
LAYOUT = "a tar of one tar of images per class (n01440764.tar, …)"


class ImagenetTar:
    """Opens no archive before the first listing; the index is cached in memory.

    Raises UserError if data.path is not a folder or has no training archive.
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
        """The images in the order of their offsets.

        Raises UserError for an archive that is cut, damaged, empty or of another layout, for a repeated name, and if the
        labels of val are missing or do not fit.
        """
        if split not in self._listings:
            self._listings[split] = self._list_train() if split == "train" else self._list_val()
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
            for member in _visible(tar.members(window)):
                wnid, extension = posixpath.splitext(posixpath.basename(member.name))
                if extension != ".tar":
                    raise UserError(f"{window.place} holds {member.name!r}; it must be {LAYOUT}")
                if wnid in classes:
                    raise UserError(f"{window.place} holds {member.name!r} twice. {tar.DOWNLOAD_AGAIN}.")
                classes[wnid] = member
        if not classes:
            raise UserError(f"{self.store.place(TRAIN)} is empty; it must be {LAYOUT}. {tar.DOWNLOAD_AGAIN}.")
        return classes

    def _list_train(self) -> pa.Table:
        labels = {wnid: label for label, wnid in enumerate(self.class_names)}

        def list_class(wnid: str) -> pa.Table:
            _, start, size = self._classes[wnid]
            images = self._images(TRAIN, start, start + size, f": {wnid}.tar at byte {start:,}")
            ids = [f"train/{wnid}/{image.name.removeprefix('./')}" for image in images]
            return _table(TRAIN, ids, [labels[wnid]] * len(images), images)

        threads = 1 if self.store.local else tar.REMOTE_THREADS
        # ids cannot repeat between classes, as each begins with the class
        return pa.concat_tables(tar.map_in_threads(list_class, self._classes, threads)).combine_chunks()

    def _list_val(self) -> pa.Table:
        images = self._images(VAL)
        names = [posixpath.basename(image.name) for image in images]
        labels = val_labels(self.store, self.config, names, self.class_names)
        return _table(VAL, [f"val/{name}" for name in names], labels, images)

    def _images(self, archive: str, start: int = 0, end: int | None = None, where: str = "") -> list[tar.Member]:
        with tar.open_archive(self.store, archive) as window:
            members = _visible(tar.members(window, start, end))
            images = [member for member in members if member.name.lower().endswith(EXTENSIONS)]
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


def _visible(members: Iterator[tar.Member]) -> Iterator[tar.Member]:
    return (member for member in members if not member.name.rpartition("/")[2].startswith("."))

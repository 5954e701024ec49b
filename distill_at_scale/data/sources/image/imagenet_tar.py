"""ImageNet as it is downloaded: `ILSVRC2012_img_train.tar` (a tar of one tar per class) and `ILSVRC2012_img_val.tar`.

Both are read in place; nothing is unpacked or cached. Ids are those of the unpacked folders
(`train/n01440764/n01440764_10026.JPEG`, `val/ILSVRC2012_val_00000001.JPEG`), classes the sorted WordNet ids. A row's
location is the archive, its row the offset of the image in it. The labels of val come from the list of the devkit, as
for the folders (`imagenet.py`). Without the archive of val there is a training split only; the test archive, which has no
labels, is left out.
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
from distill_at_scale.data.sources.base import listing
from distill_at_scale.storage.filesystem import Store

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ARCHIVES = {"train": TRAIN, "test": VAL}
EXTENSIONS = (".jpeg", ".jpg", ".png")
LAYOUT = "a tar of one tar of images per class (n01440764.tar, …)"


class ImagenetTar:
    """Opens nothing before it is asked; the index is made once and kept in memory.

    Raises UserError where data.path is no folder or has no training archive.
    """

    def __init__(self, config: DataSection) -> None:
        if config.path is None:
            raise UserError(f"data.path is not set; the source {config.source!r} needs the folder that holds {TRAIN}")
        self.config, self.store = config, Store(config.path)
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

        Raises UserError for an archive that is cut, damaged, empty or laid out otherwise, for a repeated name, and where the
        labels of val are missing or do not fit.
        """
        if split not in self._listings:
            self._listings[split] = self._train() if split == "train" else self._val()
        return self._listings[split]

    def digest(self, split: str) -> str:
        """A hash of the archive's size and of names, labels, offsets and sizes of all images in it."""
        archive = ARCHIVES[split]
        return digest([archive, self.store.size(archive), tar.index_digest(self.listing(split))])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return tar.read(self.store, rows)

    @cached_property
    def _classes(self) -> dict[str, tar.Member]:
        """The archives of the classes, by WordNet id, as they lie in the training archive."""
        found: dict[str, tar.Member] = {}
        with tar.open_archive(self.store, TRAIN) as window:
            for member in _visible(tar.members(window)):
                wnid, extension = posixpath.splitext(posixpath.basename(member.name))
                if extension != ".tar":
                    raise UserError(f"{window.place} holds {member.name!r}; it must be {LAYOUT}")
                if wnid in found:
                    raise UserError(f"{window.place} holds {member.name!r} twice. {tar.DOWNLOAD_AGAIN}.")
                found[wnid] = member
        if not found:
            raise UserError(f"{self.store.place(TRAIN)} is empty; it must be {LAYOUT}. {tar.DOWNLOAD_AGAIN}.")
        return found

    def _train(self) -> pa.Table:
        labels = {wnid: label for label, wnid in enumerate(self.class_names)}
        threads = 1 if self.store.local else tar.REMOTE_THREADS
        parts = tar.map_in_threads(lambda wnid: self._class(wnid, labels[wnid]), self._classes, threads)
        return pa.concat_tables(parts).combine_chunks()

    def _class(self, wnid: str, label: int) -> pa.Table:
        """The images of one class. Ids cannot repeat between classes, as each begins with its own."""
        _, start, size = self._classes[wnid]
        with tar.open_archive(self.store, TRAIN) as window:
            images = [m for m in _visible(tar.members(window, start, start + size)) if _is_image(m.name)]
        if not images:
            raise UserError(
                f"{self.store.place(TRAIN)}: {wnid}.tar at byte {start:,} holds no images. {tar.DOWNLOAD_AGAIN}."
            )
        ids = [f"train/{wnid}/{_relative(image.name)}" for image in images]
        return _table(TRAIN, ids, [label] * len(images), images)

    def _val(self) -> pa.Table:
        from distill_at_scale.data.sources.image.imagenet import val_labels

        with tar.open_archive(self.store, VAL) as window:
            images = [member for member in _visible(tar.members(window)) if _is_image(member.name)]
        if not images:
            raise UserError(f"{self.store.place(VAL)} holds no images. {tar.DOWNLOAD_AGAIN}.")
        names = [posixpath.basename(image.name) for image in images]
        labels = val_labels(self.store, self.config, names, self.class_names)
        return _table(VAL, [f"val/{name}" for name in names], labels, images)

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which an actor that only reads does not need."""
        return {k: v for k, v in self.__dict__.items() if k != "_classes"} | {"_listings": {}}


def _table(archive: str, ids: list[str], labels: Sequence[int], images: list[tar.Member]) -> pa.Table:
    rows, sizes = [image.offset for image in images], [image.size for image in images]
    try:
        return listing(ids, labels, [archive] * len(ids), rows, sizes)
    except UserError as error:
        raise UserError(f"{archive}: {error}. {tar.DOWNLOAD_AGAIN}.") from None


def _visible(members: Iterator[tar.Member]) -> Iterator[tar.Member]:
    return (member for member in members if not member.name.rpartition("/")[2].startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _relative(name: str) -> str:
    return name.removeprefix("./")

"""Samples in one folder per class, listed at scale: what ImageFolder, ImageNet, Tiny-ImageNet and VideoFolder share.

Paths stay Arrow columns, so that a million files cost seconds. Ids are the POSIX paths relative to the root. Nothing is
opened while listing; hidden files and files of another medium (by their name) are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import data_store, labelled, listing, split_of, split_word
from distill_at_scale.data.sources.class_subsets import class_list
from distill_at_scale.storage.filesystem import Store, joined

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class Medium:
    """What the samples of a folder are: a noun for messages, and the endings of their files (lower case, with the dot)."""

    noun: str
    extensions: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """A regular expression of the names of such files; to be used without regard to case."""
        return f"(?:{'|'.join(re.escape(extension) for extension in self.extensions)})$"

    def mask(self, paths: pa.Array) -> pa.Array:
        """Which of some paths (string) are such files by their names."""
        return pc.match_substring_regex(paths, self.pattern, ignore_case=True)


IMAGES = Medium("image", EXTENSIONS)


class FolderSource:
    """The contract of a source for `train/<class>/...` and a test split beside it; layouts refine `listing_of`."""

    medium = IMAGES

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)
        self.folders = split_folders(self.store)
        self.class_names = self.find_classes()
        self._listings: dict[str, pa.Table] = {}

    def find_classes(self) -> list[str]:
        """The sorted folders of the training split.

        Raises UserError where there are none.
        """
        if "train" not in self.folders:
            raise UserError(f"{self.store.place()} has no folder train/; the layout is train/<class>/<image>.JPEG")
        names = self.store.names(self.folders["train"])[0]
        if not names:
            place = self.store.place(self.folders["train"])
            raise UserError(f"{place} holds no class folders; the layout is train/<class>/<image>.jpg")
        return names

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.folders]

    def listing(self, split: str) -> pa.Table:
        """Every sample of a split, class by class; listed once and then remembered."""
        if split not in self._listings:
            self._listings[split] = self.listing_of(split)
        return self._listings[split]

    def listing_of(self, split: str) -> pa.Table:
        return class_listing(self.store, self.folders[split], self.class_names)

    def digest(self, split: str) -> str:
        """Hash of all paths, labels and sizes; no file is opened."""
        return listing_digest(self.listing(split))

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        return self.store.read_many(rows["location"].to_pylist())


def split_folders(store: Store) -> dict[str, str]:
    """The folder of each split, by its name.

    Raises UserError where several could be the training split.
    """
    names = store.names()[0]
    train = [name for name in names if split_of(name) == "train"]
    if len(train) > 1 and "train" not in train:
        raise UserError(
            f"{store.place()} holds several training folders ({', '.join(train)}); put them into one, train/"
        )
    test = labelled({name: split_word(name) for name in names if split_of(name) == "test"})
    found = {"train": "train" if "train" in train else train[0]} if train else {}
    return found | ({"test": test[-1]} if test else {})


def images(store: Store, folder: str) -> tuple[pa.Array, pa.Array]:
    """Paths (string) and sizes (int64) of the images below a folder, sorted by path."""
    paths, sizes = store.table(folder)
    mask = IMAGES.mask(paths)
    return paths.filter(mask), sizes.filter(mask)


def class_listing(
    store: Store, folder: str, class_names: Sequence[str], ignore: Sequence[str] = ()
) -> pa.Table:  # fmt: skip
    """The images below the class folders of `folder`, sorted by label and path; images in no class folder are left out.

    Raises UserError for a folder with images that is no class, or where there is no image.
    """
    return by_class(store, folder, class_names, images(store, folder), IMAGES, ignore)


def by_class(
    store: Store,
    folder: str,
    class_names: Sequence[str],
    files: tuple[pa.Array, pa.Array],
    medium: Medium,
    ignore: Sequence[str] = (),
) -> pa.Table:
    """The listing of some files below the class folders of `folder`, given as paths (string) and sizes (int64).

    Sorted by label and path; files in no class folder, or in one of `ignore`, are left out. Raises UserError for a folder
    that is no class, or where no file is left.
    """
    paths, sizes = files
    below = pc.utf8_slice_codeunits(paths, len(folder) + 1) if folder else paths
    owners = pc.struct_field(pc.extract_regex(below, "^(?P<owner>[^/]+)/"), "owner")
    inside = pc.is_valid(owners)
    paths, sizes, owners = paths.filter(inside), sizes.filter(inside), owners.filter(inside)
    if ignore:
        others = pc.invert(pc.is_in(owners, pa.array(ignore, pa.string())))
        paths, sizes, owners = paths.filter(others), sizes.filter(others), owners.filter(others)
    labels = pc.index_in(owners, pa.array(class_names, pa.string()))
    if labels.null_count:
        extra = owners[pc.index(pc.is_null(labels), True).as_py()].as_py()
        place = store.place(joined(folder, extra))
        raise UserError(
            f"{place} is a class that the training split does not have; remove the folder or complete train/"
        )
    if not len(paths):
        raise UserError(
            f"{store.place(folder)} holds no {medium.noun}s in class folders ({', '.join(medium.extensions)})"
        )
    order = np.argsort(labels.to_numpy(zero_copy_only=False), kind="stable")  # paths are sorted already
    paths, labels, sizes = paths.take(pa.array(order)), labels.take(pa.array(order)), sizes.take(pa.array(order))
    return listing(paths, labels, paths, np.zeros(len(paths), np.int64), sizes)


def complete(source: FolderSource, split: str, table: pa.Table) -> None:
    """Raises UserError for a class that has no sample in a listing, naming its folder; of a subset only its classes count."""
    names = source.class_names
    wanted = set(names if source.config.classes is None else class_list(source.config.classes))
    counts = np.bincount(table["label"].to_numpy(), minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0 and name in wanted]
    if empty:
        more = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
        sample = "training sample" if split == "train" else "test sample"
        raise UserError(
            f"the class {empty[0]!r} has no {sample}: {source.store.place(joined(source.folders[split], empty[0]))} "
            f"is missing or holds no {source.medium.noun}{more}; complete the split, or remove the class everywhere"
        )


def listing_digest(table: pa.Table) -> str:
    """A hash of ids, labels and sizes."""
    sha = hashlib.sha256("\n".join(table["sample_id"].to_pylist()).encode(errors="surrogateescape"))
    for column in ("label", "size"):
        sha.update(np.ascontiguousarray(table[column].to_numpy(), np.int64).tobytes())
    return sha.hexdigest()

"""What torchvision keeps on disk for CIFAR-10/100, SVHN, MNIST and FashionMNIST, read without torchvision.

data.path is the root that torchvision was given, or the set's own folder. Ids are `train/00017`, the numbers torchvision
uses; class names are its too. SVHN's extra split is left out. The sets are small: a split is read into memory whole when
it is first needed.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import safe_pickle
from distill_at_scale.data.archives.gunzip import Bomb, gunzip
from distill_at_scale.data.sources.base import data_store, listing
from distill_at_scale.storage.filesystem import Store, joined

Array = np.ndarray[Any, Any]
MOST_UNPACKED = 2**31  # bytes of one file; SVHN's extra images, the largest, have 1.6 GB
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Layout:
    """How one set lies in a folder; `load(store, folder, split)` gives images N x H x W (x C) uint8 and labels N."""

    name: str
    folders: tuple[str, ...]  # where it may lie below data.path; "" is data.path itself
    marker: str  # a file that tells that it is there; .gz may follow
    load: Callable[[Store, str, str], tuple[Array, Array]]
    class_names: Callable[[Store, str], list[str]]
    own_name: str = ""  # needed in the path where the files alone do not tell the set


class TorchvisionSet:
    def __init__(self, config: DataSection) -> None:
        self.store = data_store(config)
        self.layout, self.folder = _recognise(self.store)
        self.class_names = self.layout.class_names(self.store, self.folder)
        self._loaded: dict[str, tuple[Array, Array]] = {}

    def splits(self) -> list[str]:
        return ["train", "test"]

    def listing(self, split: str) -> pa.Table:
        """Raises UserError for a missing, cut or foreign file, a label outside the classes, or counts that differ."""
        images, labels = self._split(split)
        rows = np.arange(len(labels))
        ids = [f"{split}/{row:05d}" for row in rows]
        size = np.full(len(rows), images[0].nbytes if len(rows) else 0)
        return listing(ids, labels, [self.folder or "."] * len(rows), rows, size)

    def digest(self, split: str) -> str:
        """Hash of all pixels and labels, which are in memory; the same for packed and unpacked files."""
        images, labels = self._split(split)
        sha = hashlib.sha256(np.ascontiguousarray(labels, np.int64).tobytes())
        sha.update(np.ascontiguousarray(images).data)
        return sha.hexdigest()

    def read(self, rows: pa.Table) -> Sequence[bytes | Array]:
        """uint8 arrays H x W x 3, or H x W where the set is grey."""
        return [
            self._split(sample.partition("/")[0])[0][row]
            for sample, row in zip(rows["sample_id"].to_pylist(), rows["row"].to_pylist(), strict=True)
        ]

    def _split(self, split: str) -> tuple[Array, Array]:
        if split not in self._loaded:
            images, labels = self.layout.load(self.store, self.folder, split)
            place = f"the {split} split of {self.layout.name} in {self.store.place(self.folder)}"
            if len(images) != len(labels) or not len(labels):
                raise UserError(f"{place} has {len(images):,} images and {len(labels):,} labels; download it again")
            bad = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
            if bad.size:
                raise UserError(
                    f"{place}: the label {labels[bad[0]]} of sample {bad[0]} is outside 0..{len(self.class_names) - 1}; "
                    "download it again"
                )
            self._loaded[split] = images, labels
        return self._loaded[split]


def _recognise(store: Store) -> tuple[Layout, str]:
    found = [(layout, folder) for layout in LAYOUTS for folder in layout.folders if _is_there(store, layout, folder)]
    if not found:
        known = ", ".join(f"{layout.name}: {joined(layout.folders[0], layout.marker)}" for layout in LAYOUTS)
        raise UserError(
            f"{store.place()} holds none of the sets that torchvision stores ({known}); give their root folder"
        )
    if len(found) > 1:
        places = ", ".join(f"{layout.name} ({folder or 'here'})" for layout, folder in found)
        raise UserError(f"{store.place()} holds several sets: {places}; set data.path to the folder of one of them")
    return found[0]


def _is_there(store: Store, layout: Layout, folder: str) -> bool:
    """A folder with the right files; without an own folder the path must say which of two alike sets it is."""
    file = joined(folder, layout.marker)
    root = os.path.abspath(store.place()) if store.local else store.place()
    named = layout.own_name in f"{joined(root, folder)}/"
    return named and (store.size(file) is not None or store.size(file + ".gz") is not None)


def _content(store: Store, folder: str, name: str, packed: bool = False) -> bytes:
    """A file's bytes; with `packed`, those in name.gz where the file itself is not there."""
    file = joined(folder, name)
    if packed and store.size(file) is None and store.size(file + ".gz") is not None:
        try:
            return gunzip(store.read(file + ".gz"), MOST_UNPACKED)
        except (EOFError, zlib.error, Bomb) as error:
            raise UserError(f"{store.place(file)}.gz is damaged ({error}); download it again") from None
    try:
        return store.read(file)
    except FileNotFoundError:
        raise UserError(f"{store.place(file)} is missing; download the set again") from None


def _pickled(store: Store, folder: str, name: str) -> dict[Any, Any]:
    content, place = _content(store, folder, name), store.place(joined(folder, name))
    try:
        value = safe_pickle.load(content)
    except safe_pickle.UnsafePickle as error:
        raise UserError(f"{place} is refused, nothing of it was run: {error}; get the set from its publisher") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{place} is cut or damaged ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is none of CIFAR's files; download it again")
    return value


def _cifar(store: Store, folder: str, names: Sequence[str], key: str) -> tuple[Array, Array]:
    images, labels = [], []
    for name in names:
        batch, place = _pickled(store, folder, name), store.place(joined(folder, name))
        data, found = batch.get("data"), batch.get(key)
        if not isinstance(data, np.ndarray) or data.shape[1:] != (3072,) or data.dtype != np.uint8:
            raise UserError(f"{place} holds no images of 3 x 32 x 32 bytes; download it again")
        if not isinstance(found, list) or not all(isinstance(label, int) for label in found) or len(found) != len(data):
            raise UserError(f"{place} has {len(data):,} images but no such list of labels {key!r}; download it again")
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(found, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _cifar10(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar(store, folder, names, "labels")


def _cifar100(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    return _cifar(store, folder, [split], "fine_labels")


def _meta(name: str, key: str, count: int) -> Callable[[Store, str], list[str]]:
    def names(store: Store, folder: str) -> list[str]:
        found = _pickled(store, folder, name).get(key)
        if not isinstance(found, list) or len(found) != count:
            raise UserError(f"{store.place(joined(folder, name))} does not name {count} classes; download it again")
        return [str(word) for word in found]

    return names


def _svhn(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    from scipy.io import loadmat, whosmat

    content, place = _content(store, folder, f"{split}_32x32.mat"), store.place(joined(folder, f"{split}_32x32.mat"))
    try:
        shapes = {
            name: shape for name, shape, _ in whosmat(io.BytesIO(content))
        }  # of the headers; nothing is unpacked yet
        if math.prod(shapes["X"]) > MOST_UNPACKED or math.prod(shapes["y"]) > MOST_UNPACKED:
            raise Bomb(f"X and y unpack to more than {MOST_UNPACKED:,} values")
        held = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        images, labels = held["X"], held["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # scipy raises nearly anything for a damaged file
        raise UserError(f"{place} is cut or damaged ({error}); download it again") from None
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise UserError(f"{place} holds no images of 32 x 32 x 3 bytes; download it again")
    labels[labels == 10] = 0  # the digit 0 is written as class 10
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels


def _mnist(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    prefix = "train" if split == "train" else "t10k"
    images = _idx(store, folder, f"{prefix}-images-idx3-ubyte", 3)
    return images, _idx(store, folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)


def _idx(store: Store, folder: str, name: str, dimensions: int) -> Array:
    """An array of bytes: magic 0x000008 and the number of dimensions, then each as a big-endian uint32, then the data."""
    content, place = _content(store, folder, name, packed=True), store.place(joined(folder, name))
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise UserError(f"{place} is no idx file of bytes with {dimensions} dimensions; download it again")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) != start + math.prod(shape):
        raise UserError(
            f"{place} has {len(content):,} bytes, its header says {start + math.prod(shape):,}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _fixed(names: Sequence[str]) -> Callable[[Store, str], list[str]]:
    return lambda store, folder: list(names)


LAYOUTS = (
    Layout("CIFAR-10", ("cifar-10-batches-py", ""), "data_batch_1", _cifar10, _meta("batches.meta", "label_names", 10)),
    Layout("CIFAR-100", ("cifar-100-python", ""), "meta", _cifar100, _meta("meta", "fine_label_names", 100)),
    Layout("SVHN", ("",), "train_32x32.mat", _svhn, _fixed([str(digit) for digit in range(10)])),
    Layout("MNIST", ("MNIST/raw", "raw", ""), "train-images-idx3-ubyte", _mnist,
           _fixed([f"{digit} - {word}" for digit, word in enumerate(DIGITS)]), "/MNIST/"),
    Layout("FashionMNIST", ("FashionMNIST/raw", "raw", ""), "train-images-idx3-ubyte", _mnist, _fixed(FASHION),
           "/FashionMNIST/"),
)  # fmt: skip

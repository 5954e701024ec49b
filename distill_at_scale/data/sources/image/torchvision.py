"""CIFAR-10/100, SVHN, MNIST and FashionMNIST as torchvision stores them, read without torchvision.

data.path is the root that torchvision was given, or the set's own folder. Ids are `train/00017`, with torchvision's indices;
class names are torchvision's too. A split is read into memory on first use. Not covered: SVHN's extra split.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import safe_pickle
from distill_at_scale.data.archives.gunzip import Bomb, gunzip
from distill_at_scale.data.sources.base import data_store, listing
from distill_at_scale.storage.filesystem import Store, join_path

Array = np.ndarray[Any, Any]
MAX_UNPACKED = 2**31  # bytes of one file; the largest, SVHN's extra images, has 1.6 GB
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class PickledNames(NamedTuple):
    """`number` class names under a key of a pickle."""

    file: str
    key: str
    number: int


@dataclass(frozen=True)
class Layout:
    """How a set is stored; `load(store, folder, split)` returns images uint8 [N, H, W] or [N, H, W, C] and labels [N]."""

    name: str
    folders: tuple[str, ...]  # where it may lie below data.path; "" is data.path itself
    marker: str  # a file that shows that the set is there; .gz may follow
    load: Callable[[Store, str, str], tuple[Array, Array]]
    class_names: Sequence[str] | PickledNames
    path_part: str = ""  # part of the path that tells the set from another one with the same files


class TorchvisionSet:
    def __init__(self, config: DataSection) -> None:
        self.store = data_store(config)
        place, sets = self.store.place(), []
        root = os.path.abspath(place) if self.store.local else place
        for layout in LAYOUTS:
            for folder in (f for f in layout.folders if layout.path_part in f"{join_path(root, f)}/"):
                file = join_path(folder, layout.marker)
                if any(self.store.size(name) is not None for name in (file, f"{file}.gz")):
                    sets.append((layout, folder))
        if not sets:
            known = ", ".join(f"{layout.name}: {join_path(layout.folders[0], layout.marker)}" for layout in LAYOUTS)
            raise UserError(f"{place} holds none of the sets that torchvision stores ({known}); give their root")
        if len(sets) > 1:
            places = ", ".join(f"{layout.name} ({folder or 'here'})" for layout, folder in sets)
            raise UserError(f"{place} holds several sets: {places}; set data.path to the folder of one of them")
        self.layout, self.folder = sets[0]
        names: Any = self.layout.class_names
        if isinstance(names, PickledNames):
            file, key, number = names
            names = _read_pickle(self.store, self.folder, file).get(key)
            if not isinstance(names, list) or len(names) != number:
                place = self.store.place(join_path(self.folder, file))
                raise UserError(f"{place} does not name {number} classes; download it again")
        self.class_names = [str(name) for name in names]
        self._loaded: dict[str, tuple[Array, Array]] = {}

    def splits(self) -> list[str]:
        return ["train", "test"]

    def listing(self, split: str) -> pa.Table:
        images, labels = self._load(split)
        rows = np.arange(len(labels))
        ids = [f"{split}/{row:05d}" for row in rows]
        sizes = np.full(len(rows), images[0].nbytes if len(rows) else 0)
        return listing(ids, labels, [self.folder or "."] * len(rows), rows, sizes)

    def digest(self, split: str) -> str:
        """A hash of all pixels and labels, which are in memory; the same for packed and unpacked files."""
        images, labels = self._load(split)
        sha = hashlib.sha256(np.ascontiguousarray(labels, np.int64).tobytes())
        sha.update(np.ascontiguousarray(images).data)
        return sha.hexdigest()

    def read(self, rows: pa.Table) -> Sequence[bytes | Array]:
        """uint8 arrays [H, W, 3], or [H, W] for a grey set."""
        samples = zip(rows["sample_id"].to_pylist(), rows["row"].to_pylist(), strict=True)
        return [self._load(sample_id.partition("/")[0])[0][row] for sample_id, row in samples]

    def _load(self, split: str) -> tuple[Array, Array]:
        if split not in self._loaded:
            images, labels = self.layout.load(self.store, self.folder, split)
            place = f"the {split} split of {self.layout.name} in {self.store.place(self.folder)}"
            if len(images) != len(labels) or not len(labels):
                raise UserError(f"{place} has {len(images):,} images and {len(labels):,} labels; download it again")
            bad = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
            if bad.size:
                sample, last = bad[0], len(self.class_names) - 1
                what = f"the label {labels[sample]} of sample {sample} is outside 0..{last}"
                raise UserError(f"{place}: {what}; download it again")
            self._loaded[split] = images, labels
        return self._loaded[split]


def _read_file(store: Store, folder: str, name: str, packed: bool = False) -> bytes:
    """A file's bytes; with `packed`, those in name.gz if the file itself is not there."""
    file = join_path(folder, name)
    if packed and store.size(file) is None and store.size(file + ".gz") is not None:
        try:
            return gunzip(store.read(file + ".gz"), MAX_UNPACKED)
        except (EOFError, zlib.error, Bomb) as error:
            raise UserError(f"{store.place(file)}.gz is damaged ({error}); download it again") from None
    try:
        return store.read(file)
    except FileNotFoundError:
        raise UserError(f"{store.place(file)} is missing; download the set again") from None


def _read_pickle(store: Store, folder: str, name: str) -> dict[Any, Any]:
    content, place = _read_file(store, folder, name), store.place(join_path(folder, name))
    try:
        value = safe_pickle.load(content)
    except safe_pickle.UnsafePickle as error:
        raise UserError(f"{place} is refused, nothing of it was run: {error}; get the set from its publisher") from None
    except Exception as error:  # a damaged pickle raises many types
        raise UserError(f"{place} is cut or damaged ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is none of CIFAR's files; download it again")
    return value


def _load_cifar(store: Store, folder: str, split: str, files: dict[str, list[str]], key: str) -> tuple[Array, Array]:
    images, labels = [], []
    for name in files[split]:
        batch, place = _read_pickle(store, folder, name), store.place(join_path(folder, name))
        data: Any = batch.get("data")
        batch_labels: Any = batch.get(key)
        if not isinstance(data, np.ndarray) or data.shape[1:] != (3072,) or data.dtype != np.uint8:
            raise UserError(f"{place} holds no images of 3 x 32 x 32 bytes; download it again")
        labels_are_ints = isinstance(batch_labels, list) and all(isinstance(label, int) for label in batch_labels)
        if not labels_are_ints or len(batch_labels) != len(data):
            raise UserError(f"{place} has {len(data):,} images but no such list of labels {key!r}; download it again")
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(batch_labels, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _load_svhn(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    from scipy.io import loadmat, whosmat

    name = f"{split}_32x32.mat"
    content, place = _read_file(store, folder, name), store.place(join_path(folder, name))
    try:
        # whosmat reads the headers and unpacks nothing
        shapes = {name: shape for name, shape, _ in whosmat(io.BytesIO(content))}
        if math.prod(shapes["X"]) > MAX_UNPACKED or math.prod(shapes["y"]) > MAX_UNPACKED:
            raise Bomb(f"X and y unpack to more than {MAX_UNPACKED:,} values")
        arrays = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        images, labels = arrays["X"], arrays["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # scipy raises many types for a damaged file
        raise UserError(f"{place} is cut or damaged ({error}); download it again") from None
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise UserError(f"{place} holds no images of 32 x 32 x 3 bytes; download it again")
    labels[labels == 10] = 0  # the digit 0 is stored as class 10
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels


def _load_mnist(store: Store, folder: str, split: str) -> tuple[Array, Array]:
    """Reads idx files: magic 0x000008 and the number of dimensions, each size as a big-endian uint32, then bytes."""
    arrays = []
    for kind, dimensions in (("images", 3), ("labels", 1)):
        name = f"{'train' if split == 'train' else 't10k'}-{kind}-idx{dimensions}-ubyte"
        content, place = _read_file(store, folder, name, packed=True), store.place(join_path(folder, name))
        start = 4 + 4 * dimensions
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
            raise UserError(f"{place} is not an idx file of bytes with {dimensions} dimensions; download it again")
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
        if len(content) != start + math.prod(shape):
            raise UserError(f"{place} has {len(content):,} bytes, not {start + math.prod(shape):,}; download it again")
        arrays.append(np.frombuffer(content, np.uint8, offset=start).reshape(shape))
    return arrays[0], arrays[1].astype(np.int64)


CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CIFAR100_FILES = {"train": ["train"], "test": ["test"]}
LAYOUTS = (
    Layout("CIFAR-10", ("cifar-10-batches-py", ""), "data_batch_1",
           partial(_load_cifar, files=CIFAR10_FILES, key="labels"), PickledNames("batches.meta", "label_names", 10)),
    Layout("CIFAR-100", ("cifar-100-python", ""), "meta",
           partial(_load_cifar, files=CIFAR100_FILES, key="fine_labels"), PickledNames("meta", "fine_label_names", 100)),
    Layout("SVHN", ("",), "train_32x32.mat", _load_svhn, [str(digit) for digit in range(10)]),
    Layout("MNIST", ("MNIST/raw", "raw", ""), "train-images-idx3-ubyte", _load_mnist,
           [f"{digit} - {word}" for digit, word in enumerate(DIGITS)], "/MNIST/"),
    Layout("FashionMNIST", ("FashionMNIST/raw", "raw", ""), "train-images-idx3-ubyte", _load_mnist, FASHION,
           "/FashionMNIST/"),
)  # fmt: skip

"""Small sets in torchvision's formats, intact and damaged."""

from __future__ import annotations

import gzip
import os
import pickle

import numpy as np
import pytest
from scipy.io import savemat

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import safe_pickle
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING


def torchvision_set(root):
    return SOURCES["torchvision"](DataSection(source="torchvision", path=str(root)))


def noise(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cifar10(root, protocol=2, per_batch=3):
    """Five training batches and a test batch; returns all images as torchvision gives them, N x 32 x 32 x 3."""
    folder, flat = root / "cifar-10-batches-py", []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = noise(per_batch + number, 3072)
        batch = {"data": data, "labels": [(number + i) % 10 for i in range(len(data))], "filenames": ["x"] * len(data)}
        write(folder / name, pickle.dumps(batch, protocol))
        flat.append(data)
    write(folder / "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}, protocol))
    return np.concatenate(flat).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar100(root):
    for split in ("train", "test"):
        batch = {"data": noise(4, 3072), "fine_labels": [0, 99, 5, 7], "coarse_labels": [0] * 4}
        write(root / "cifar-100-python" / split, pickle.dumps(batch, 2))
    write(root / "cifar-100-python" / "meta", pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, 2))


def svhn(root):
    for split in ("train", "test"):
        images = noise(6, 32, 32, 3).transpose(1, 2, 3, 0)
        root.mkdir(parents=True, exist_ok=True)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [9], [2], [10], [3]], np.uint8)})


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return head + array.tobytes()


def mnist(root, name="MNIST", packed=False):
    for prefix, count in (("train", 5), ("t10k", 3)):
        for kind, array in (("images-idx3", noise(count, 28, 28)), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            file = root / name / "raw" / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            write(file, gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_is_read_in_torchvisions_order(tmp_path, protocol):
    images = cifar10(tmp_path, protocol)
    source = torchvision_set(tmp_path)
    table = source.listing("train")
    assert table.schema == LISTING
    assert source.class_names == list("abcdefghij")
    assert table["sample_id"].to_pylist()[:2] == ["train/00000", "train/00001"]
    assert table["label"].to_pylist()[:4] == [0, 1, 2, 1]
    both = [*source.read(table), *source.read(source.listing("test"))]
    assert np.array_equal(np.stack(both), images)
    assert ImageDecoder(32)(both[0]).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST"])
def test_torchvision_itself_reads_the_same(tmp_path, name, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    makers = {"CIFAR10": cifar10, "CIFAR100": cifar100, "SVHN": svhn, "MNIST": mnist}
    makers[name](tmp_path) if name in makers else mnist(tmp_path, name)
    if name in ("CIFAR10", "CIFAR100", "SVHN"):  # synthetic files have no known checksums
        monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = torchvision_set(tmp_path)
    for split in ("train", "test"):
        which = {"split": split} if name == "SVHN" else {"train": split == "train"}
        official = getattr(datasets, name)(str(tmp_path), **which)
        table = source.listing(split)
        pairs = [official[i] for i in range(len(official))]
        assert table["label"].to_pylist() == [int(label) for _, label in pairs]
        assert np.array_equal(np.stack(source.read(table)), np.stack([np.asarray(image) for image, _ in pairs]))
        assert source.class_names == list(getattr(official, "classes", source.class_names))


def test_cifar100_uses_fine_labels(tmp_path):
    cifar100(tmp_path)
    source = torchvision_set(tmp_path / "cifar-100-python")
    assert source.listing("test")["label"].to_pylist() == [0, 99, 5, 7]
    assert len(source.class_names) == 100


def test_svhn_counts_class_ten_as_zero(tmp_path):
    svhn(tmp_path)
    source = torchvision_set(tmp_path)
    assert source.listing("train")["label"].to_pylist() == [0, 1, 9, 2, 0, 3]
    images = np.stack(source.read(source.listing("train")))
    assert np.array_equal(images, noise(6, 32, 32, 3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("below", ["", "{name}", "{name}/raw"])
def test_mnist_is_found_from_its_root_or_its_own_folder(tmp_path, name, packed, below):
    mnist(tmp_path, name, packed)
    source = torchvision_set(tmp_path / below.format(name=name))
    datasets = pytest.importorskip("torchvision.datasets")
    assert source.class_names == getattr(datasets, name).classes
    assert np.array_equal(np.stack(source.read(source.listing("train"))), noise(5, 28, 28))
    assert source.listing("test")["label"].to_pylist() == [0, 1, 2]


def test_packed_and_unpacked_files_have_the_same_digest(tmp_path):
    mnist(tmp_path / "a")
    mnist(tmp_path / "b", packed=True)
    digests = {torchvision_set(tmp_path / folder).digest("train") for folder in "ab"}
    assert len(digests) == 1
    assert torchvision_set(tmp_path / "a").digest("test") not in digests


def test_several_sets_in_one_root_need_the_path_of_one(tmp_path):
    mnist(tmp_path)
    cifar10(tmp_path)
    with pytest.raises(UserError, match=r"several sets: CIFAR-10 \(cifar-10-batches-py\), MNIST \(MNIST/raw\)"):
        torchvision_set(tmp_path)
    assert torchvision_set(tmp_path / "cifar-10-batches-py").layout.name == "CIFAR-10"


def test_no_set_names_what_is_looked_for(tmp_path):
    with pytest.raises(UserError, match="holds none of the sets that torchvision stores"):
        torchvision_set(tmp_path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_3"])
def test_a_hostile_pickle_is_refused_without_running(tmp_path, file):
    cifar10(tmp_path)
    trap = tmp_path / "trap"
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps({"data": Hostile(trap)}, 2))
    with pytest.raises(UserError, match=rf"{file} is refused, nothing of it was run: it asks for (posix|nt)\.mkdir"):
        torchvision_set(tmp_path).listing("train")
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [np.array([Hostile("x"), None], object), np.array(["a"]), {1, 2}, 1j, np.float64(1), np.dtype("u1"), len],
    ids=["objects", "text array", "set", "complex", "scalar", "dtype", "function"],
)
def test_pickles_with_anything_but_plain_data_are_refused(value):
    with pytest.raises(safe_pickle.UnsafePickle):
        safe_pickle.load(pickle.dumps({"data": value}, 2))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["u1", "<i4", ">f4", "b1"])
def test_plain_arrays_survive_every_protocol(kind, protocol):
    array = np.arange(12).reshape(3, 4).astype(kind)
    for original in (array, np.asfortranarray(array), array[:, ::2]):
        loaded = safe_pickle.load(pickle.dumps([original, ("text", b"raw", None, 1.5)], protocol))
        assert np.array_equal(loaded[0], original)
        assert loaded[0].dtype == original.dtype
        assert loaded[1] == ("text", b"raw", None, 1.5)


PYTHON_2 = (  # as CIFAR's files were written: {"data": array([[97, 98, 99], [255, 0, 1]], u1), "labels": [1]}
    b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x06abc\xff\x00\x01tbU\x06labels]K\x01au."
)


def test_a_pickle_of_python_2_is_read():
    loaded = safe_pickle.load(PYTHON_2)
    assert loaded["data"].tolist() == [[97, 98, 99], [255, 0, 1]]
    assert loaded["data"].dtype == np.uint8
    assert loaded["labels"] == [1]


def test_a_pickle_cannot_grow_without_end():
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    assert len(safe_pickle.load(pickle.dumps(value))) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\xff\xff\xff\x0f.",  # LONG_BINPUT 2**28 - 1: the memo would take 4 GiB
        b"Np268435455\n.",
        b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x0ftX\x01\x00\x00\x00O\x86R.",  # ndarray((2**28 - 1,), "O")
        PYTHON_2.replace(b"K\x02K\x03\x86", b"X\x01\x00\x00\x00aJ\xff\xff\xff\x0f\x86"),  # "a" * 2**28
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x02" + b"N0" * 2**20 + b"N.",
        bytes(2**28 + 1),
    ],
    ids=["memo", "memo in text", "array", "shape", "persistent id", "opcodes", "size"],
)
def test_a_small_pickle_cannot_ask_for_much_memory(content):
    with pytest.raises(safe_pickle.UnsafePickle):
        safe_pickle.load(content)


def test_a_pickle_cannot_change_how_the_next_one_is_read():
    pickled = pickle.dumps(np.arange(3), 2)
    with pytest.raises(safe_pickle.UnsafePickle):
        safe_pickle.load(b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00stateK\x05s\x86b.")
    assert safe_pickle.load(pickled).tolist() == [0, 1, 2]


@pytest.mark.parametrize("file", ["data_batch_2", "batches.meta"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_pickle_is_named(tmp_path, file, keep):
    cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=rf"{file} is cut or damaged.*download it again"):
        torchvision_set(tmp_path).listing("train")


def test_a_missing_batch_is_named(tmp_path):
    cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4 is missing"):
        torchvision_set(tmp_path).listing("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "data_batch_1 has 3 images but no such list of labels 'labels'"),
        ({"labels": [0, 1, 10]}, r"the label 10 of sample 2 is outside 0\.\.9"),
        ({"data": noise(3, 3000)}, "data_batch_1 holds no images"),
        ({"data": "x"}, "data_batch_1 holds no images"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(tmp_path, change, message):
    cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **change}, 2))
    with pytest.raises(UserError, match=message):
        torchvision_set(tmp_path).listing("train")


@pytest.mark.parametrize("keep", [0, 3, 1000])
def test_a_cut_idx_file_is_named(tmp_path, keep):
    mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"train-images-idx3-ubyte (is not an idx file|has 1,000 bytes).*download it again"
    ):
        torchvision_set(tmp_path).listing("train")


def test_a_cut_gz_file_is_named(tmp_path):
    mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
        torchvision_set(tmp_path).listing("train")


def test_counts_of_images_and_labels_that_differ_are_an_error(tmp_path):
    mnist(tmp_path)
    write(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", idx(np.arange(4, dtype=np.uint8)))
    with pytest.raises(UserError, match=r"the train split of MNIST .* has 5 images and 4 labels"):
        torchvision_set(tmp_path).listing("train")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_cut_mat_file_is_named(tmp_path, keep):
    svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"train_32x32\.mat is cut or damaged"):
        torchvision_set(tmp_path).listing("train")

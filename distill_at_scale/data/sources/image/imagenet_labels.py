"""ImageNet's validation labels: the lists, what the numbers in them mean, and the label of each image (`val_labels`).

There are two numberings, and they disagree. The devkit's ILSVRC2012_ID counts from 1 in its own order (1 is n02119789);
only meta.mat or a list in that order translates it. Caffe's val.txt counts from 0 in the order of the sorted WordNet ids. A
list of bare numbers uses the devkit's; numbers next to file names are Caffe's. Files are found by their usual names near the
root, also inside the devkit's archive, which is read in memory and never unpacked to disk.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import tar
from distill_at_scale.data.archives.gunzip import Bomb, gunzip
from distill_at_scale.data.sources.label_files import LabelFile, named_file
from distill_at_scale.storage.filesystem import Store, join_path

LISTS = (  # lists of WordNet ids first: they cannot be misread
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
    "val.txt",
)
DEVKIT_MAPPINGS = ("meta.mat", "meta_clsloc.mat", "map_clsloc.txt")
SORTED_MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")
MAX_ARCHIVE_SIZE = 100 * 2**20  # bytes, packed and unpacked; the devkit has 2.5 MB
GET_LIST = (
    "put the devkit (ILSVRC2012_devkit_t12.tar.gz, as it is or unpacked) or Kaggle's LOC_val_solution.csv there, "
    "or set data.val_labels"
)
GET_MAPPING = "put the devkit (ILSVRC2012_devkit_t12.tar.gz or its meta.mat) there, or set data.synsets"


@dataclass(frozen=True)
class LabelList:
    """A label per image: `stems` are file names without extension (None: the sorted files), `values` numbers or WordNet ids."""

    place: str
    stems: list[str] | None
    values: list[str]


@dataclass(frozen=True)
class Numbering:
    """The WordNet ids of the numbers 0, 1, … or (the devkit's) 1, 2, …; `place` names the file that says so."""

    place: str
    wnids: Sequence[str]
    is_devkit: bool


def val_labels(store: Store, config: DataSection, file_names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """The label of each validation image, as its index in `class_names`, in the order of `file_names`.

    Folders in `file_names` are ignored. The list and the numbering are data.val_labels and data.synsets, else the files with
    the usual names near the root of `store`. Raises UserError if one is missing or uses the wrong numbering, for an unknown
    number or WordNet id, and if images and labels do not match.
    """
    named = config.val_labels
    file = next(find(store, LISTS), None) if named is None else named_file(store, named, "data.val_labels")
    if file is None:
        subject = f"the validation images in {store.place()}"
        raise UserError(f"{subject} lie in no class folders and have no list: {GET_LIST}")
    labels = read_labels(file)
    names = [PurePosixPath(name).name for name in file_names]
    if len(set(names)) != len(names):
        raise UserError(f"two validation images in {store.place()} have the same file name; keep one of them")
    if len(labels.values) != len(names):
        counts = f"{len(labels.values):,} labels for {len(names):,} validation images in {store.place()}"
        hint = "complete the images, or give the list that belongs to them (data.val_labels)"
        raise UserError(f"{labels.place} has {counts}; {hint}")
    is_numbered = all(value.isdecimal() for value in labels.values)
    wnids = _to_wnids(labels, store, config, class_names) if is_numbered else labels.values
    if labels.stems is None:  # the list speaks of the sorted files
        keys, wnid_of = names, dict(zip(sorted(names), wnids, strict=True))
    else:
        keys, wnid_of = [_stem(name) for name in names], dict(zip(labels.stems, wnids, strict=True))
    classes = {wnid: label for label, wnid in enumerate(class_names)}
    if unlabelled := [name for name, key in zip(names, keys, strict=True) if key not in wnid_of]:
        raise UserError(f"{labels.place} has no label for {unlabelled[0]}; give the list that belongs to these images")
    for name, key in zip(names, keys, strict=True):
        if wnid_of[key] not in classes:
            problem = f"the class {wnid_of[key]!r} of {name} is not one of the {len(classes)} training classes"
            hint = "complete train/, or give the list that belongs to these images"
            raise UserError(f"{labels.place}: {problem}; {hint}")
    return [classes[wnid_of[key]] for key in keys]


def _to_wnids(labels: LabelList, store: Store, config: DataSection, class_names: Sequence[str]) -> list[str]:
    numbering = _numbering(labels, store, config, class_names)
    first, count = int(numbering.is_devkit), len(numbering.wnids)
    for position, value in enumerate(labels.values, 1):
        if not first <= int(value) < first + count:
            counts_images = labels.values == [str(number) for number in range(1, len(labels.values) + 1)]
            hint = " (it seems to number the images, not their classes)" if counts_images else ""
            numbers = f"{first}..{first + count - 1}, the numbers of {numbering.place}{hint}"
            problem = f"{labels.place}, label {position}: {value} is outside {numbers}"
            raise UserError(f"{problem}; give the list and the mapping that belong together")
    return [numbering.wnids[int(value) - first] for value in labels.values]


def _numbering(labels: LabelList, store: Store, config: DataSection, class_names: Sequence[str]) -> Numbering:
    if labels.stems is not None:  # Caffe's numbering, unless data.synsets says otherwise
        if config.synsets is not None:
            numbering = read_mapping(named_file(store, config.synsets, "data.synsets"))
            return Numbering(numbering.place, numbering.wnids, numbering.place.endswith(".mat"))
        file = next(find(store, SORTED_MAPPINGS), None)
        sorted_ids = Numbering("the sorted class folders", sorted(class_names), is_devkit=False)
        return sorted_ids if file is None or (read := read_mapping(file)).is_devkit else read
    if config.synsets is not None:
        mappings = [read_mapping(named_file(store, config.synsets, "data.synsets"))]
    else:
        mappings = [read_mapping(file) for file in find(store, (*DEVKIT_MAPPINGS, *SORTED_MAPPINGS))]
    if (devkit := next((mapping for mapping in mappings if mapping.is_devkit), None)) is not None:
        return devkit
    problem = f"{labels.place} numbers the classes as the devkit does, "
    if not mappings:
        raise UserError(f"{problem}and nothing near {store.place()} says what the numbers mean: {GET_MAPPING}")
    order = f"{mappings[0].place} lists them in the order of their WordNet ids"
    raise UserError(f"{problem}but {order}, which would give wrong labels: {GET_MAPPING}")


def read_labels(file: LabelFile) -> LabelList:
    """Parses a list; raises UserError for an empty one, an odd line, and numbers mixed with WordNet ids; names the line."""
    rows = file.rows()
    if rows and rows[0][0].lower() == "imageid":  # Kaggle's CSV: the id, then "wnid x y x y" for each object
        rows = rows[1:]
    if not rows:
        raise UserError(f"{file.place} holds no labels; download it again")
    named = len(rows[0]) > 1
    for number, row in enumerate(rows, 1):
        if (len(row) > 1) != named or row[named].isdecimal() != rows[0][named].isdecimal():
            words, first = " ".join(row), " ".join(rows[0])
            problem = f"{file.place}, label {number}: {words!r} has another form than the first, {first!r}"
            raise UserError(f"{problem}; correct the list or download it again")
    return LabelList(file.place, [_stem(row[0]) for row in rows] if named else None, [row[named] for row in rows])


def read_mapping(file: LabelFile) -> Numbering:
    """Parses meta.mat, or text with a WordNet id per line (words may follow) or a number and a WordNet id.

    A list that is not sorted by WordNet id is the devkit's. Raises UserError for any other file.
    """
    if file.place.endswith(".mat"):
        from scipy.io import loadmat

        try:
            synsets: Any = loadmat(io.BytesIO(file.content), squeeze_me=True)["synsets"].reshape(-1)
            inner = synsets["num_children"] if "num_children" in (synsets.dtype.names or ()) else [0] * len(synsets)
            columns = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], inner, strict=True)
            pairs = sorted((int(number), str(wnid)) for number, wnid, children in columns if int(children) == 0)
        except Exception as error:  # scipy raises many types for a damaged file
            raise UserError(f"{file.place} is not the devkit's meta.mat ({error}); download the devkit again") from None
        if [number for number, _ in pairs] != list(range(1, len(pairs) + 1)):
            raise UserError(f"{file.place}: the classes are not numbered 1..{len(pairs)}; download the devkit again")
        return Numbering(file.place, [wnid for _, wnid in pairs], is_devkit=True)
    rows = file.rows()
    if rows and all(len(row) > 1 and (row[0].isdecimal() or row[1].isdecimal()) for row in rows):
        pairs = [(int(row[0]), row[1]) if row[0].isdecimal() else (int(row[1]), row[0]) for row in rows]
        wnids = [wnid for _, wnid in sorted(pairs)]
    else:
        wnids = [row[0] for row in rows]
    if not wnids or len(set(wnids)) != len(wnids):
        raise UserError(f"{file.place} must name every class once, one per line, as n01440764; download it again")
    return Numbering(file.place, wnids, is_devkit=wnids != sorted(wnids))


def _stem(name: str) -> str:
    """`val/ILSVRC2012_val_00000001.JPEG` and `ILSVRC2012_val_00000001` name the same image."""
    return PurePosixPath(name).name.rsplit(".", 1)[0]


def find(store: Store, names: Sequence[str]) -> Iterator[LabelFile]:
    """Yields the files with these names near the root, in the order of the names; then those inside a devkit archive.

    "Near" is the root and two levels of folders below it, without class folders.
    """
    top, files = store.names()
    places = [("", set(files))]
    for folder in (name for name in top if not name.lower().startswith("test")):
        subfolders, files = ([], []) if folder.lower().startswith("train") else store.names(folder)
        places.append((folder, set(files)))
        if not folder.lower().startswith("val"):  # its folders are classes
            inner = [join_path(folder, name) for name in subfolders[:20]]
            places += [(path, set(store.names(path)[1])) for path in inner]
    for path in (join_path(folder, name) for name in names for folder, present in places if name in present):
        yield LabelFile(store.place(path), store.read(path))
    for folder, present in places:
        for archive in present:
            if "devkit" in archive and archive.endswith((".tar.gz", ".tgz", ".tar")):
                yield from _find_in_archive(store, join_path(folder, archive), names)


def _find_in_archive(store: Store, archive: str, names: Sequence[str]) -> Iterator[LabelFile]:
    if (store.size(archive) or 0) > MAX_ARCHIVE_SIZE:
        return
    files = {}
    try:
        content = store.read(archive)
        content = content if archive.endswith(".tar") else gunzip(content, MAX_ARCHIVE_SIZE)
        for path, offset, size in tar.members(tar.Window(io.BytesIO(content), store.place(archive))):
            if (name := PurePosixPath(path).name) in names:
                files[name] = LabelFile(store.place(f"{archive}/{path}"), content[offset : offset + size])
    except (OSError, EOFError, zlib.error, Bomb) as error:
        raise UserError(f"{store.place(archive)} cannot be read ({error}); download it again") from None
    yield from (files[name] for name in names if name in files)

"""ImageNet's lists of validation labels, and what the numbers in them mean; `imagenet.val_labels` puts them together.

There are two numberings and they disagree. The devkit's ILSVRC2012_ID runs from 1 in an order of its own (1 is
n02119789), which only meta.mat or a list in that order can translate. Caffe's val.txt counts from 0 in the order of the
sorted WordNet ids. A list of bare numbers is the devkit's; numbers beside file names are Caffe's. Files are found by
their usual names near the root, also inside the devkit's own archive, which is read in memory and never unpacked.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import tar
from distill_at_scale.data.archives.gunzip import Bomb, gunzip
from distill_at_scale.storage.filesystem import Store, is_uri, joined, shown

LISTS = (  # those that name WordNet ids first: nothing in them can be misread
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
    "val.txt",
)
DEVKIT_MAPPINGS = ("meta.mat", "meta_clsloc.mat", "map_clsloc.txt")
SORTED_MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")
LARGEST_ARCHIVE = 100 * 2**20  # bytes, unpacked too; the devkit has 2.5 MB


@dataclass(frozen=True)
class File:
    place: str  # for messages
    content: bytes

    def rows(self) -> list[list[str]]:
        """The words of every line that has some; commas count as spaces."""
        try:
            lines = self.content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{self.place} is not a text file; download it again") from None
        return [words for line in lines if (words := line.replace(",", " ").split())]


@dataclass(frozen=True)
class Labels:
    """A list of labels: the file stems it speaks of (None: the sorted files in order), and a number or WordNet id each."""

    place: str
    stems: list[str] | None
    values: list[str]

    @property
    def numbered(self) -> bool:
        return all(value.isdecimal() for value in self.values)


@dataclass(frozen=True)
class Mapping:
    """WordNet ids by number: `wnids[0]` is number 1 of the devkit; `devkit` says whether the order is the devkit's."""

    place: str
    wnids: list[str]
    devkit: bool


def read_labels(file: File) -> Labels:
    """Raises UserError for an empty list, a line of another form, or numbers mixed with WordNet ids; names the line."""
    rows = file.rows()
    if rows and rows[0][0].lower() == "imageid":  # Kaggle's CSV: the id, then "wnid x y x y" once per object
        rows = rows[1:]
    if not rows:
        raise UserError(f"{file.place} holds no labels; download it again")
    named = len(rows[0]) > 1
    for number, row in enumerate(rows, 1):
        if (len(row) > 1) != named or row[named].isdecimal() != rows[0][named].isdecimal():
            raise UserError(
                f"{file.place}, label {number}: {' '.join(row)!r} has another form than the first, "
                f"{' '.join(rows[0])!r}; mend the list or download it again"
            )
    return Labels(file.place, [stem(row[0]) for row in rows] if named else None, [row[named] for row in rows])


def read_mapping(file: File) -> Mapping:
    """meta.mat, or text: a WordNet id per line with words behind it, or a number and a WordNet id.

    Raises UserError where the file is no such thing.
    """
    if file.place.endswith(".mat"):
        return Mapping(file.place, _from_matlab(file), devkit=True)
    rows = file.rows()
    if rows and all(len(row) > 1 and (row[0].isdecimal() or row[1].isdecimal()) for row in rows):
        pairs = [(int(row[0]), row[1]) if row[0].isdecimal() else (int(row[1]), row[0]) for row in rows]
        wnids = [wnid for _, wnid in sorted(pairs)]
    else:
        wnids = [row[0] for row in rows]
    if not wnids or len(set(wnids)) != len(wnids):
        raise UserError(f"{file.place} must name every class once, one a line, as n01440764; download it again")
    return Mapping(file.place, wnids, devkit=wnids != sorted(wnids))


def _from_matlab(file: File) -> list[str]:
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(io.BytesIO(file.content), squeeze_me=True)["synsets"].reshape(-1)
        inner = synsets["num_children"] if "num_children" in (synsets.dtype.names or ()) else [0] * len(synsets)
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], inner, strict=True)
        pairs = sorted((int(number), str(wnid)) for number, wnid, children in rows if int(children) == 0)
    except Exception as error:  # scipy raises nearly anything for a damaged file
        raise UserError(f"{file.place} is not the devkit's meta.mat ({error}); download the devkit again") from None
    if [number for number, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise UserError(f"{file.place}: the classes are not numbered 1..{len(pairs)}; download the devkit again")
    return [wnid for _, wnid in pairs]


def stem(name: str) -> str:
    """`val/ILSVRC2012_val_00000001.JPEG` and `ILSVRC2012_val_00000001` name the same image."""
    return PurePosixPath(name).name.rsplit(".", 1)[0]


def named_file(store: Store, path: str, key: str) -> File:
    """The file that a configuration key names: absolute, a URI, or relative to the root of the data.

    Raises UserError where it cannot be read, Unreachable among them.
    """
    try:
        if is_uri(path):
            folder, _, rest = path.partition("?")
            parent, _, name = folder.rpartition("/")
            return File(shown(folder), Store(parent + (f"?{rest}" if rest else ""), key).read(name))
        if Path(path).expanduser().is_absolute():
            return File(path, Path(path).expanduser().read_bytes())
        return File(store.place(path), store.read(path))
    except OSError as error:
        raise UserError(
            f"{key} = {shown(path)!r} cannot be read ({error.strerror or error}); "
            f"give a path relative to {store.place()}, or an absolute one"
        ) from None


def find(store: Store, names: Sequence[str]) -> Iterator[File]:
    """The files of these names near the root, in the order of the names; then those inside a devkit archive."""
    places = _places(store)
    for name in names:
        for folder, files in places:
            if name in files:
                yield File(store.place(joined(folder, name)), store.read(joined(folder, name)))
    for folder, files in places:
        for archive in files:
            if "devkit" in archive and archive.endswith((".tar.gz", ".tgz", ".tar")):
                yield from _in_archive(store, joined(folder, archive), names)


def _in_archive(store: Store, archive: str, names: Sequence[str]) -> Iterator[File]:
    if (store.size(archive) or 0) > LARGEST_ARCHIVE:
        return
    found = {}
    try:
        content = store.read(archive)
        content = content if archive.endswith(".tar") else gunzip(content, LARGEST_ARCHIVE)
        for path, offset, size in tar.members(tar.Window(io.BytesIO(content), store.place(archive))):
            if (name := PurePosixPath(path).name) in names:
                found[name] = File(store.place(f"{archive}/{path}"), content[offset : offset + size])
    except (OSError, EOFError, zlib.error, Bomb) as error:
        raise UserError(f"{store.place(archive)} cannot be read ({error}); download it again") from None
    yield from (found[name] for name in names if name in found)


def _places(store: Store) -> list[tuple[str, set[str]]]:
    """The root and the folders two levels below it with the names of their files; not the class folders."""
    top, files = store.names()
    places = [("", set(files))]
    for folder in (name for name in top if not name.lower().startswith("test")):
        below, files = ([], []) if folder.lower().startswith("train") else store.names(folder)
        places.append((folder, set(files)))
        if not folder.lower().startswith("val"):  # its folders are classes
            places += [(joined(folder, name), set(store.names(joined(folder, name))[1])) for name in below[:20]]
    return places

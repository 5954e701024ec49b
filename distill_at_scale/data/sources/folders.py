"""Samples in one folder per class: ImageFolder, VideoFolder, and the base of ImageNet and Tiny-ImageNet.

Sample ids are POSIX paths relative to the root. Paths stay Arrow columns, so listing a million files takes seconds. Listing
opens no file: names decide what is a sample (`media.py`). What looks like a sample and is not used is set aside.

What a folder directly below the root is, is decided by its name (`base.split_word`) and by what it and its neighbours hold. A
folder of samples holds files of the medium and no folders.

If a training folder holds folders, or if the source is no ImageFolder or VideoFolder:
- a folder whose name names a split holds that split (`train` wins over other training folders, EVALUATION ranks the others);
- no other folder is used; `notes` says so if it holds samples.

Else the root itself is the training split, and its folders are the classes, except
- a folder whose name names a split, if it holds folders, or if no folder with an ordinary name is a folder of samples. (A
  folder of samples next to others is a class, whatever its name; `notes` says so.)
- A folder whose name is unclear (`holdout`) is an error under the same condition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import (
    EVALUATION,
    SPLIT_WORDS,
    FileSource,
    listing,
    split_word,
    unclear_name,
    unused_split,
)
from distill_at_scale.data.sources.class_subsets import class_list
from distill_at_scale.data.sources.media import IMAGES, VIDEOS
from distill_at_scale.storage.filesystem import join_path

LEVELS, FOLDERS = 3, 50  # where a training folder is looked for, if the root has none


class FolderSource(FileSource):
    """A source for `train/<class>/...` and a test split; a layout overrides `find_classes` and `list_split`."""

    medium = IMAGES
    root_classes = False  # whether the root may hold the training classes

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self.split_folders = self.find_split_folders()
        self.folders = self.choose_splits()
        self._files: dict[str, tuple[pa.Array, pa.Array]] = {}
        self._listings: dict[str, pa.Table] = {}
        self.class_names = self.find_classes()

    @property
    def layout(self) -> str:
        return f"the layout is train/<class>/<{self.medium.noun}>{self.medium.extensions[0]}"

    def find_split_folders(self) -> dict[str, str]:
        """Folder of the root -> word, of those whose names say something and that are no classes (see the module's docstring).

        Raises UserError for an unclear one where the root itself is the training split.
        """
        names = self.store.names()[0]
        words = {name: word for name in names if (word := split_word(name))}
        if self.root_classes and not any(self.store.names(name)[0] for name, word in words.items() if word == "train"):
            if any(self.holds_only_samples(name) for name in names if name not in words):
                words = {name: word for name, word in words.items() if not self.holds_only_samples(name)}
            unclear = next((name for name, word in words.items() if word == "unclear"), None)
            if unclear is not None and "train" not in words.values():
                raise unclear_name(self.store, unclear)
        return words

    def choose_splits(self) -> dict[str, str]:
        """Split -> folder. A `test` folder without class folders has no labels and is no split.

        Raises UserError for several training folders of which none is `train`.
        """
        of = {word: [name for name, own in self.split_folders.items() if own == word] for word in SPLIT_WORDS}
        training = ["train"] if "train" in of["train"] else of["train"]
        if len(training) > 1:
            several = ", ".join(training)
            raise UserError(f"{self.store.place()} holds several training folders ({several}); merge them into train/")
        of["test"] = [name for name in of["test"] if self.store.names(name)[0]]
        test = next((of[word] for word in EVALUATION if of[word]), [])
        return {split: names[-1] for split, names in (("train", training), ("test", test)) if names}

    def holds_only_samples(self, folder: str) -> bool:
        folders, files = self.store.names(folder)
        return not folders and bool(pc.any(self.medium.mask(pa.array(files, pa.string()))).as_py())

    def notes(self) -> list[str]:
        """Says which folders of the root are not used, and which folders are classes though they are named like splits."""
        used, noun, lines = self.folders.values(), self.medium.noun, []
        rest = {name: word for name, word in self.split_folders.items() if name not in used}
        evaluation = [f"{name}/" for name, word in rest.items() if word in EVALUATION]
        if evaluation and "test" in self.folders:
            lines.append(unused_split(f"{self.folders['test']}/", evaluation))
        elif evaluation:
            lines.append(f"{', '.join(evaluation)} holds no class folders, so its {noun}s have no labels: not used")
        for name in self.store.names()[0]:
            if name in used or f"{name}/" in evaluation:
                continue
            if "" not in used and (count := pc.sum(self.medium.mask(self.store.table(name)[0])).as_py()):
                lines.append(f"{name}/ is next to the splits' folders: not used ({noun}s: {count:,})")
            elif "" in used and split_word(name):
                lines.append(f"{name}/ is taken as a class: it holds {noun}s and is next to class folders")
        loose = pc.sum(self.medium.mask(pa.array(self.store.names()[1], pa.string()))).as_py()
        if loose and "" not in used:
            lines.append(f"files next to the splits' folders: not used ({noun}s: {loose:,})")
        if are_numbers(self.class_names) and self.class_names != sorted(self.class_names):
            first, text = (", ".join(names[:4]) for names in (self.class_names, sorted(self.class_names)))
            order = f"labels follow the numbers ({first}, ...), not text order as torchvision's ({text}, ...)"
            lines.append(f"class folders are whole numbers: {order}; data.class_names sets another order")
        return lines

    def find_classes(self) -> list[str]:
        """The class folders of the training split; raises UserError if there are none."""
        if "train" not in self.folders:
            hint = "" if (name := self.find_root()) is None else f". Did you mean data.path={self.store.place(name)}?"
            raise UserError(f"{self.store.place()} has no folder train/; {self.layout}{hint}")
        return self.class_folders(self.folders["train"])

    def find_root(self) -> str | None:
        """The first folder that holds a training folder, at most LEVELS below the root; looks into FOLDERS a level."""
        level = [""]
        for _ in range(LEVELS):
            level = [join_path(folder, name) for folder in level for name in self.store.names(folder)[0]][:FOLDERS]
            for folder in level:
                if "train" in map(split_word, self.store.names(folder)[0]):
                    return folder
        return None

    def class_folders(self, folder: str) -> list[str]:
        """The class folders of a split's folder, sorted by name, or by value if all names are whole numbers.

        "" is the root, where folders of splits are no classes.
        """
        folders, files = self.store.names(folder)
        names = [name for name in folders if folder or name not in self.split_folders]
        if not names:
            is_class = pc.any(self.medium.mask(pa.array(files, pa.string()))).as_py()
            hint = f"; it holds {self.medium.noun}s itself: did you mean the folder above it?" if is_class else ""
            raise UserError(f"{self.store.place(folder)} holds no class folders; {self.layout}{hint}")
        return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else names

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.folders]

    def listing(self, split: str) -> pa.Table:
        """The samples of a split, class by class; cached."""
        if split not in self._listings:
            self._listings[split] = self.list_split(split)
        return self._listings[split]

    def list_split(self, split: str) -> pa.Table:
        """Lists a split; raises UserError for a class without a sample (with data.classes, only those classes count)."""
        table, names, classes = self.list_by_class(split), self.class_names, self.config.classes
        wanted = set(names if classes is None else class_list(classes))
        counts = np.bincount(table["label"].to_numpy(), minlength=len(names))
        empty = [label for label, name in enumerate(names) if counts[label] == 0 and name in wanted]
        if empty:
            name, noun = names[empty[0]], self.medium.noun
            more = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
            aside = self.unused_files(split, table["location"])
            why = _example(aside.filter(pc.equal(aside["label"], empty[0])))
            sample = "training sample" if split == "train" else "test sample"
            place = self.store.place(join_path(self.folders[split], name))
            problem = f"the class {name!r} has no {sample}: {place} is missing or holds no {noun}{why}{more}"
            raise UserError(f"{problem}; complete the split, or remove the class everywhere")
        return table

    def split_files(self, split: str) -> tuple[pa.Array, pa.Array]:
        """Paths (string) and sizes (int64) of all files below a split's folder, sorted by path; cached."""
        if split not in self._files:
            folder = self.folders[split]
            paths, sizes = self.store.table(folder)
            if not folder and self.split_folders:
                is_own = pc.invert(pc.is_in(owners_of(paths, ""), pa.array(list(self.split_folders), pa.string())))
                paths, sizes = paths.filter(is_own), sizes.filter(is_own)
            self._files[split] = paths, sizes
        return self._files[split]

    def samples(self, split: str) -> tuple[pa.Array, pa.Array]:
        """As `split_files`, with files of the source's medium only (by their endings)."""
        paths, sizes = self.split_files(split)
        mask = self.medium.mask(paths)
        return paths.filter(mask), sizes.filter(mask)

    def set_aside(self, split: str) -> pa.Table:
        """The files of a split that look like samples and are not listed."""
        return self.unused_files(split, self.listing(split)["location"])

    def unused_files(self, split: str, used: pa.ChunkedArray) -> pa.Table:
        paths, folder = self.split_files(split)[0], self.folders[split]
        rest = paths.filter(pc.invert(pc.is_in(paths, used.combine_chunks())))
        owners = owners_of(rest, folder)
        return self.medium.unused(rest, labels_of(owners, self.class_names), pc.is_valid(owners))

    def list_by_class(self, split: str) -> pa.Table:
        """The samples in class folders, sorted by label and path.

        Raises UserError for a folder with samples that is not a class, for a split without samples, and where the class folders
        seem to be a level above the classes.
        """
        folder, (paths, sizes) = self.folders[split], self.split_files(split)
        owners = owners_of(paths, folder)
        mask = pc.and_(pc.is_valid(owners), self.medium.samples(paths))
        paths, sizes, owners = paths.filter(mask), sizes.filter(mask), owners.filter(mask)
        labels = pc.index_in(owners, pa.array(self.class_names, pa.string()))
        if labels.null_count:
            extra = owners[pc.index(pc.is_null(labels), True).as_py()].as_py()
            place = self.store.place(join_path(folder, extra))
            raise UserError(f"{place} is a class that the training split lacks; remove it or complete train/")
        if not len(paths):
            why = _example(self.unused_files(split, pa.chunked_array([], pa.string()))) or f"; {self.layout}"
            if self.medium is VIDEOS and pc.any(IMAGES.mask(self.split_files(split)[0])).as_py():
                why = ", but images; set data.source to imagefolder to use images"
            raise UserError(f"{self.store.place(folder)} holds no {self.medium.noun}s in class folders{why}")
        self.check_level(folder, paths)
        order = pa.array(np.argsort(labels.to_numpy(zero_copy_only=False), kind="stable"))  # paths are sorted already
        paths = paths.take(order)
        return listing(paths, labels.take(order), paths, np.zeros(len(paths), np.int64), sizes.take(order))

    def check_level(self, folder: str, paths: pa.Array) -> None:
        """Checks the only class, and the classes of the root; `paths` are the samples in the split's folder.

        Raises UserError if a class folder holds folders of splits, or if the only class folder holds only folders: the root is
        too high, or the classes come before the splits.
        """
        if folder and len(self.class_names) > 1:
            return
        parts = pc.extract_regex(below(paths, folder), "^(?P<owner>[^/]+)/(?:(?P<inner>[^/]+)/)?")
        pairs = pa.table({name: pc.struct_field(parts, name) for name in ("owner", "inner")})
        for row in pairs.group_by("owner").aggregate([("inner", "distinct")]).sort_by("owner").to_pylist():
            inner, owner = sorted(row["inner_distinct"]), join_path(folder, row["owner"])
            words = {split_word(name) for name in inner if name}
            only_folders = len(self.class_names) == 1 and "" not in inner
            if only_folders or ("train" in words and words.intersection(EVALUATION)):
                names = ", ".join(inner[:3]) + (f" and {len(inner) - 3} more" if len(inner) > 3 else "")
                problem = f"{self.store.place(owner)} would be a class, but holds the folders {names}"
                hint = f"did you mean data.path={self.store.place((not folder and self.find_root()) or owner)}?"
                raise UserError(f"{problem}: {hint} Otherwise {self.layout}")

    def refuse_extra_classes(self, split: str) -> None:
        """Raises UserError for a class folder that the training split does not have."""
        folder = self.folders[split]
        if extra := [name for name in self.class_folders(folder) if name not in self.class_names]:
            problem = f"{self.store.place(folder)}/{extra[0]} is a class that the training split lacks"
            raise UserError(f"{problem}; remove the folder, or add training {self.medium.noun}s of the class")


class ImageFolder(FolderSource):
    """Images in `train/<class>/*.JPEG`, and optionally `val/` or `test/`.

    Without a `train` folder, class folders in the root are the training split. Classes are the sorted folder names of the
    training split. A test split may lack a class; it may not have an extra one.
    """

    root_classes = True

    def find_classes(self) -> list[str]:
        names = self.class_folders(self.folders.get("train", ""))
        self.folders = {"train": "", **self.folders}
        return names

    def list_split(self, split: str) -> pa.Table:
        if split == "train":
            return super().list_split(split)
        folder = self.folders[split]
        if self.store.names(folder)[0]:
            self.refuse_extra_classes(split)
        elif len(self.samples(split)[0]):
            problem = f"{self.store.place(folder)} holds images but no class folders; sort them into class folders"
            raise UserError(f"{problem}, or set data.source to imagenet, which takes a flat val/ with a list of labels")
        return self.list_by_class(split)


class VideoFolder(FolderSource):
    """Videos, laid out as for ImageFolder.

    If only a `val/` or `test/` holds videos, it is the only split, and data.train_split selects it.
    """

    medium, clips, root_classes = VIDEOS, True, True

    def find_classes(self) -> list[str]:
        """The sorted folders of the training split, or of a test split that is the only one."""
        if "train" not in self.folders:
            others = [name for name in self.store.names()[0] if name not in self.split_folders]
            has_samples = (pc.any(self.medium.mask(self.store.table(name)[0])).as_py() for name in others)
            if not self.folders or any(has_samples):
                self.folders = {"train": "", **self.folders}
        return self.class_folders(self.folders.get("train", self.folders.get("test", "")))

    def list_split(self, split: str) -> pa.Table:
        if split == "test":
            self.refuse_extra_classes(split)
        return super().list_split(split) if split == self.splits()[0] else self.list_by_class(split)


def _example(aside: pa.Table) -> str:
    return "".join(f" ({row['sample_id']}: {row['reason']})" for row in aside.slice(0, 1).to_pylist())


def below(paths: pa.Array, folder: str) -> pa.Array:
    """Paths (string) relative to a folder that holds them; "" is the root."""
    return pc.utf8_slice_codeunits(paths, len(folder) + 1) if folder else paths


def owners_of(paths: pa.Array, folder: str) -> pa.Array:
    """The subfolder of `folder` that holds each path (string); null for a file directly in `folder`."""
    return pc.struct_field(pc.extract_regex(below(paths, folder), "^(?P<owner>[^/]+)/"), "owner")


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers, such as "7" and "007"."""
    return all(name.isascii() and name.isdecimal() for name in names)


def labels_of(names: pa.Array, class_names: Sequence[str]) -> pa.Array:
    """The label (int32) of each name (string or null), -1 for one that is not a class."""
    return pc.fill_null(pc.index_in(names, pa.array(class_names, pa.string())), -1)

"""Base of the video sources whose lists name the clips: UCF-101, HMDB-51 and Something-Something.

Lists and files seldom agree: clips vanish from the web, downloads stop, folders hold unlisted files. `join_rows` joins both as
Arrow columns (220,000 rows take a fraction of a second), and everything without a partner is set aside with its reason.
Only samples that the lists themselves exclude (HMDB's unused clips, test splits without labels) are neither listed nor set
aside. Only the lists are opened; the decoder rejects a file that holds no video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import INT32, INT64, TEXT, FileSource, listing, rows_to_table, set_aside_table
from distill_at_scale.data.sources.folders import below, labels_of, owners_of
from distill_at_scale.data.sources.label_files import LabelFiles, find_label_files
from distill_at_scale.data.sources.media import VIDEOS
from distill_at_scale.storage.filesystem import join_path

# Rows of lists: `key` identifies the clip in rows and files, `split` is "train", "test" or "" for a clip in neither,
# `sample_id` is the path where the file should be, and `place` names the row, as "'list.txt' line 3".
ROWS = pa.schema({"key": TEXT, "label": INT32, "split": TEXT, "sample_id": TEXT, "place": TEXT})
FILES = pa.schema({"key": TEXT, "path": TEXT, "size": INT64})


@dataclass(frozen=True)
class Joined:
    """Rows joined with files, and what is left over."""

    used: pa.Table  # ROWS with path and size, in the order of the rows
    missing: pa.Table  # ROWS without a file
    spare: pa.Table  # FILES of a clip whose other file is used, with that file's path (instead) and the clip's label
    unlisted: pa.Table  # FILES in no row


def join_rows(rows: pa.Table, files: pa.Table) -> Joined:
    """Finds the file of each row (schema ROWS) by key among `files` (schema FILES); the first of several files is used.

    Raises UserError if two rows name the same clip.
    """
    row_keys, file_keys = rows["key"].combine_chunks(), files["key"].combine_chunks()
    if (again := np.flatnonzero(_first_index(row_keys) != np.arange(len(row_keys)))).size:
        first, second = (rows["place"][int(i)].as_py() for i in (_first_index(row_keys)[again[0]], again[0]))
        key = row_keys[int(again[0])].as_py()
        raise UserError(f"the clip {key!r} is listed twice, in {first} and {second}; remove one of them")
    file_index = pc.index_in(row_keys, file_keys)
    has_file = pc.is_valid(file_index)
    partners = files.take(file_index.filter(has_file))
    used = rows.filter(has_file).append_column("path", partners["path"]).append_column("size", partners["size"])
    first_file, is_listed = _first_index(file_keys), pc.is_in(file_keys, row_keys)
    is_spare = pc.and_(is_listed, pa.array(first_file != np.arange(len(file_keys)), pa.bool_()))
    spare = files.filter(is_spare)
    spare = spare.append_column("instead", files["path"].take(pa.array(first_file).filter(is_spare)))
    spare = spare.append_column("label", rows["label"].take(pc.index_in(spare["key"], row_keys)))
    return Joined(used, rows.filter(pc.invert(has_file)), spare, files.filter(pc.invert(is_listed)))


def _first_index(values: pa.Array) -> np.ndarray[Any, Any]:
    return pc.index_in(values, values).to_numpy(zero_copy_only=False)


class ListedVideos(FileSource, ABC):
    """A source whose lists name the clips; a subclass finds and parses them.

    Lists are read on first use, so a process that only reads clips needs none.
    """

    clips = True
    home_names: tuple[str, ...] = ()  # folders of the root that may hold the data, else it is the root
    flat = False  # whether clips lie in no class folders
    list_pattern: str  # of the names of the lists; `list_example` is one of them
    list_example: str
    list_folders: tuple[str, ...]  # where lists may be, besides the root
    lists_above = False  # whether lists may also be in the folder that holds the root

    @property
    @abstractmethod
    def class_names(self) -> list[str]: ...

    @cached_property
    def lists(self) -> LabelFiles:
        names = self.list_pattern, self.list_example, self.list_folders
        return find_label_files(self.config, self.store, *names, self.lists_above)

    @property
    def unlisted_reason(self) -> str:
        """The reason for setting aside a file that no list names."""
        return f"in no list of fold {self.config.fold}; data.fold chooses another one"

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        """(path below `home`, label, split, place) of each row; raises UserError for a malformed one."""

    @cached_property
    def home(self) -> str:
        """The folder of the root that holds the clips; "" is the root."""
        top = self.store.names()[0]
        return next((name for name in self.home_names if name in top), "")

    def splits(self) -> list[str]:
        present = set(self._rows["split"].unique().to_pylist())
        return [split for split in ("train", "test") if split in present]

    def listing(self, split: str) -> pa.Table:
        """The clips of a split that have a file, class by class; raises UserError if no clip of any split has one."""
        used = self._joined.used.filter(pc.equal(self._joined.used["split"], split))
        used = used.sort_by([("label", "ascending"), ("path", "ascending")])
        return listing(used["path"], used["label"], used["path"], np.zeros(used.num_rows, np.int64), used["size"])

    def set_aside(self, split: str) -> pa.Table:
        """Rows of a split without a file. The split that is distilled also gets the files without a row."""
        missing = self._joined.missing.filter(pc.equal(self._joined.missing["split"], split))
        reasons = pc.binary_join_element_wise("listed in ", missing["place"], ", no file; download it", "")
        parts = [set_aside_table(missing["sample_id"], missing["label"], reasons)]
        if (split == "train") == (self.config.train_split == "train"):
            unlisted, spare, others = self._joined.unlisted["path"], self._joined.spare, self._files[1]
            end = "', which is used; remove one of the two"
            reasons = pc.binary_join_element_wise("the same clip as '", spare["instead"], end, "")
            parts += [
                set_aside_table(unlisted, self._labels(unlisted), pa.repeat(self.unlisted_reason, len(unlisted))),
                set_aside_table(spare["path"], spare["label"], reasons),
                VIDEOS.unused(others, self._labels(others), pa.array([True] * len(others), pa.bool_())),
            ]
        return pa.concat_tables(parts).sort_by("sample_id")

    def _labels(self, paths: pa.Array) -> pa.Array:
        return labels_of(owners_of(paths, self.home), self.class_names)

    @cached_property
    def _rows(self) -> pa.Table:
        rows = [
            (path.rpartition(".")[0], label, split, join_path(self.home, path), place)
            for path, label, split, place in self.rows()
        ]
        return rows_to_table(rows, ROWS)

    @cached_property
    def _files(self) -> tuple[pa.Table, pa.Array]:
        """The videos (schema FILES), and the paths of other files among them, without lists and files above the clips."""
        paths, sizes = self.store.table(self.home)
        root = f"{self.store.place()}/"
        list_paths = [self.lists.place(name) for name in self.lists.paths]
        list_folders = {p.removeprefix(root).rpartition("/")[0] for p in list_paths if p.startswith(root)}
        for folder in list_folders - {"", self.home}:  # no clips are expected next to the lists
            outside = pc.invert(pc.starts_with(paths, f"{folder}/"))
            paths, sizes = paths.filter(outside), sizes.filter(outside)
        is_video = VIDEOS.mask(paths)
        others = paths.filter(pc.invert(is_video))
        if not (self.flat and self.home):  # archives and notes above the class folders are not clips
            others = others.filter(pc.match_substring(below(others, self.home), "/"))
        paths, sizes = paths.filter(is_video), sizes.filter(is_video)
        names = below(paths, self.home)
        names = pc.replace_substring_regex(names, r"^.*/", "") if self.flat else names
        keys = pc.replace_substring_regex(names, r"\.[^./]*$", "")
        return pa.table([keys, paths, sizes], schema=FILES), others

    @cached_property
    def _joined(self) -> Joined:
        joined = join_rows(self._rows, self._files[0])
        if not pc.any(pc.not_equal(joined.used["split"], "")).as_py():
            missing = joined.missing.filter(pc.not_equal(joined.missing["split"], ""))
            first = self.store.place(missing["sample_id"][0].as_py()) if missing.num_rows else "any"
            problem = f"{self.store.place(self.home)} holds none of the {missing.num_rows:,} clips that the lists name"
            hint = "unpack the videos there, or set data.path to the folder that holds them"
            raise UserError(f"{problem}, for example {first}; {hint}")
        return joined

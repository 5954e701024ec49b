"""Videos and the lists that name them: what VideoFolder, UCF-101, HMDB-51 and Something-Something have in common.

A list and the files seldom agree: clips are gone from the web, downloads stop, folders hold what nobody listed. So the
rows of the lists and the files are joined as Arrow columns (`join_rows`; 220,000 of each take a fraction of a second), and
whatever has no partner is set aside with its reason; nothing is dropped unsaid. Only what the lists themselves leave out
(HMDB's unused clips, test splits without labels) is neither listed nor set aside. Nothing is opened but the lists: whether
a file holds a video is for the decoder to find out, so an empty file stays in the listing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import SET_ASIDE, Column, data_store, listing
from distill_at_scale.data.sources.image.folders import Medium, listing_digest
from distill_at_scale.data.sources.video.label_lists import Lists

VIDEO_EXTENSIONS = (  # no .gif: in a folder of videos it is a preview
    ".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts",
)  # fmt: skip
VIDEOS = Medium("video", VIDEO_EXTENSIONS)
ROWS = pa.schema(  # of lists; `key` is what a row and its file have in common, `place` is "'list.txt' line 3"
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),  # "train", "test", or "" for a clip that is known and in neither
        ("sample_id", pa.string()),  # where its file should be
        ("place", pa.string()),
    ]
)
FILES = pa.schema([("key", pa.string()), ("path", pa.string()), ("size", pa.int64())])


@dataclass(frozen=True)
class Joined:
    """Rows and files that belong together, and those that are left."""

    used: pa.Table  # ROWS, with path and size; in the order of the rows
    missing: pa.Table  # ROWS without a file
    spare: pa.Table  # FILES whose clip has another file, which is used; with its path (instead) and the clip's label
    unlisted: pa.Table  # FILES in no row


def join_rows(rows: pa.Table, files: pa.Table) -> Joined:
    """Finds the file of every row by the key; of several files of a clip the first counts.

    Raises UserError where two rows name the same clip, saying where.
    """
    keys, there = rows["key"].combine_chunks(), files["key"].combine_chunks()
    _refuse_repeats(rows, keys)
    place = pc.index_in(keys, there)
    has_file = pc.is_valid(place)
    partners = files.take(place.filter(has_file))
    used = rows.filter(has_file).append_column("path", partners["path"]).append_column("size", partners["size"])
    first = pc.index_in(there, there).to_numpy(zero_copy_only=False)
    listed = pc.is_in(there, keys)
    again = pc.and_(listed, pa.array(first != np.arange(len(there)), pa.bool_()))
    spare = files.filter(again).append_column("instead", files["path"].take(pa.array(first).filter(again)))
    spare = spare.append_column("label", rows["label"].take(pc.index_in(spare["key"], keys)))
    return Joined(used, rows.filter(pc.invert(has_file)), spare, files.filter(pc.invert(listed)))


def _refuse_repeats(rows: pa.Table, keys: pa.Array) -> None:
    first = pc.index_in(keys, keys).to_numpy(zero_copy_only=False)
    if (again := np.flatnonzero(first != np.arange(len(keys)))).size:
        one, two = rows["place"][int(first[again[0]])].as_py(), rows["place"][int(again[0])].as_py()
        raise UserError(
            f"the clip {keys[int(again[0])].as_py()!r} is listed twice, in {one} and {two}; remove one of them"
        )


def set_aside_table(ids: Column, labels: Column, reasons: Column, locations: Column | None = None) -> pa.Table:
    """Columns of one length (sequences, numpy or Arrow arrays) as a table of schema SET_ASIDE; a file's id is its location."""
    given = [ids, labels, ids if locations is None else locations, reasons]
    columns = [c.cast(f.type) if isinstance(c, pa.ChunkedArray | pa.Array) else pa.array(c, f.type)
               for c, f in zip(given, SET_ASIDE, strict=True)]  # fmt: skip
    return pa.table(columns, schema=SET_ASIDE)


def no_videos(paths: pa.Array, labels: Column) -> pa.Table:
    """Sets aside files (paths, string) that are no videos by their names, each with its ending."""
    endings = pc.struct_field(pc.extract_regex(paths, r"(?P<ending>\.[^./]*)$"), "ending")
    reasons = pc.binary_join_element_wise("no video by its name, which ends in '", endings, "'", "")
    return set_aside_table(paths, labels, pc.fill_null(reasons, "no video by its name, which has no ending"))


def owners_of(paths: pa.Array, folder: str) -> pa.Array:
    """The folder right below `folder` that each path (string) below it lies in; null where it is in none."""
    return pc.struct_field(pc.extract_regex(below(paths, folder), "^(?P<owner>[^/]+)/"), "owner")


def below(paths: pa.Array, folder: str) -> pa.Array:
    """Paths (string) relative to a folder that they lie in; "" is the root."""
    return pc.utf8_slice_codeunits(paths, len(folder) + 1) if folder else paths


def labels_of(names: pa.Array, class_names: Sequence[str]) -> pa.Array:
    """The label (int32) of each name (string or null), -1 where it is no class."""
    return pc.fill_null(pc.index_in(names, pa.array(class_names, pa.string())), -1)


class ListedVideos(ABC):
    """The contract of a source whose lists name the clips; a layout says what its lists hold.

    A layout sets `home_names` (folders of the root that may hold everything, else it is the root) and `flat` (the clips
    lie in no class folders). Lists are read when they are first asked for: a process that only reads clips needs none.
    """

    clips = True
    home_names: tuple[str, ...] = ()
    flat = False

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Every class, in the order of the labels."""

    @property
    @abstractmethod
    def lists(self) -> Lists:
        """The lists of the set."""

    @property
    @abstractmethod
    def no_row(self) -> str:
        """The reason why a file that no list names is set aside."""

    @abstractmethod
    def rows(self) -> pa.Table:
        """What the lists hold (schema ROWS); raises UserError for what is wrong in them."""

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)

    @cached_property
    def home(self) -> str:
        """The folder of the root that holds the clips; "" is the root itself."""
        top = self.store.names()[0]
        return next((name for name in self.home_names if name in top), "")

    def keys(self, paths: pa.Array) -> pa.Array:
        """The key of each file (string): its path below the home, or its name where the layout is flat; no ending."""
        inner = below(paths, self.home)
        inner = pc.replace_substring_regex(inner, r"^.*/", "") if self.flat else inner
        return pc.replace_substring_regex(inner, r"\.[^./]*$", "")

    def splits(self) -> list[str]:
        there = set(self._rows["split"].unique().to_pylist())
        return [split for split in ("train", "test") if split in there]

    def listing(self, split: str) -> pa.Table:
        """Every clip of a split that has a file, class by class; found once and then remembered.

        Raises UserError where no clip of any split has a file.
        """
        used = self._joined.used.filter(pc.equal(self._joined.used["split"], split))
        used = used.sort_by([("label", "ascending"), ("path", "ascending")])
        return listing(used["path"], used["label"], used["path"], np.zeros(used.num_rows, np.int64), used["size"])

    def set_aside(self, split: str) -> pa.Table:
        """The rows of a split without a file; with the split that is distilled, the files without a row, too."""
        missing = self._joined.missing.filter(pc.equal(self._joined.missing["split"], split))
        reasons = pc.binary_join_element_wise("listed in ", missing["place"], ", no file", "")
        parts = [set_aside_table(missing["sample_id"], missing["label"], reasons)]
        if (split == "train") == (self.config.train_split == "train"):
            parts += self._strays()
        return pa.concat_tables(parts).sort_by("sample_id")

    def digest(self, split: str) -> str:
        """Hash of all paths, labels and sizes; no video is opened."""
        return listing_digest(self.listing(split))

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        return self.store.read_many(rows["location"].to_pylist())

    def _strays(self) -> list[pa.Table]:
        unlisted, spare = self._joined.unlisted["path"], self._joined.spare
        reasons = pc.binary_join_element_wise("the same clip as '", spare["instead"], "', which is used", "")
        others = self._files[1]
        return [
            set_aside_table(unlisted, self._labels(unlisted), pa.repeat(self.no_row, len(unlisted))),
            set_aside_table(spare["path"], spare["label"], reasons),
            no_videos(others, self._labels(others)),
        ]

    def _labels(self, paths: pa.Array) -> pa.Array:
        return labels_of(owners_of(paths, self.home), self.class_names)

    @cached_property
    def _rows(self) -> pa.Table:
        return self.rows()

    @cached_property
    def _files(self) -> tuple[pa.Table, pa.Array]:
        """The videos (schema FILES), and the paths of other files among them (not the lists, nor what lies above the clips)."""
        paths, sizes = self.store.table(self.home)
        for folder in self._list_folders():
            mine = pc.invert(pc.starts_with(paths, f"{folder}/"))
            paths, sizes = paths.filter(mine), sizes.filter(mine)
        videos = VIDEOS.mask(paths)
        others = paths.filter(pc.invert(videos))
        if not (self.flat and self.home):  # archives and notes above the class folders are no clips
            others = others.filter(pc.match_substring(below(others, self.home), "/"))
        paths, sizes = paths.filter(videos), sizes.filter(videos)
        return pa.table([self.keys(paths), paths, sizes], schema=FILES), others

    def _list_folders(self) -> set[str]:
        """The folders below the home that hold the lists; no clips are expected there."""
        root = f"{self.store.place()}/"
        places = [
            place.removeprefix(root) for name in self.lists.paths if (place := self.lists.place(name)).startswith(root)
        ]
        return {place.rpartition("/")[0] for place in places} - {"", self.home}

    @cached_property
    def _joined(self) -> Joined:
        found = join_rows(self._rows, self._files[0])
        if not pc.any(pc.not_equal(found.used["split"], "")).as_py():
            missing = found.missing.filter(pc.not_equal(found.missing["split"], ""))
            first = self.store.place(missing["sample_id"][0].as_py()) if missing.num_rows else "any"
            raise UserError(
                f"{self.store.place(self.home)} holds none of the {missing.num_rows:,} clips that the lists name, for example "
                f"{first}; unpack the videos there, or set data.path to the folder that holds them"
            )
        return found

"""Videos in one folder per class: `train/<class>/*.mp4`, and `val/` or `test/` where there is one.

As `imagefolder`: ids are the POSIX paths relative to the root, split included; without a `train` folder, class folders right
below the root are the training split; classes are in the order of their sorted names; where there are both, `val` is the test
split and not `test`. Where nothing but a `val/` or `test/` holds videos, that is the only split, and data.train_split chooses
it. Files in class folders that are no videos by their names, and videos in no class folder, are set aside. Hidden files and
what lies beside the folders of the splits are left out.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import SET_ASIDE
from distill_at_scale.data.sources.image.folders import FolderSource, by_class, complete
from distill_at_scale.data.sources.video.base import VIDEOS, below, labels_of, no_videos, owners_of, set_aside_table

LAYOUT = "the layout is train/<class>/<video>.mp4"


class VideoFolder(FolderSource):
    medium, clips = VIDEOS, True

    def __init__(self, config: DataSection) -> None:
        self._tables: dict[str, tuple[pa.Array, pa.Array]] = {}
        super().__init__(config)

    def find_classes(self) -> list[str]:
        """The sorted folders of the training split, or of the test split where it is the only one.

        Raises UserError where there are none.
        """
        if "train" not in self.folders:
            others = [name for name in self.store.names()[0] if name not in self.folders.values()]
            if not self.folders or any(self._holds_videos(name) for name in others):
                self.folders = {"train": "", **self.folders}
        folder = self.folders.get("train", self.folders.get("test", ""))
        names = [name for name in self.store.names(folder)[0] if folder or name not in self.folders.values()]
        if not names:
            raise UserError(f"{self.store.place(folder)} holds no class folders; {LAYOUT}")
        return names

    def listing_of(self, split: str) -> pa.Table:
        """Raises UserError for an empty class folder, a test class that training lacks, or where there is no video."""
        folder = self.folders[split]
        there = self.store.names(folder)[0]
        if not there:
            raise UserError(f"{self.store.place(folder)} holds no class folders; {LAYOUT}")
        if split == "test" and (extra := [name for name in there if name not in self.class_names]):
            raise UserError(
                f"{self.store.place(folder)}/{extra[0]} is a class that the training split does not have; "
                "remove the folder, or add training videos of the class"
            )
        paths, sizes = self._table(split)
        videos = VIDEOS.mask(paths)
        found = by_class(self.store, folder, self.class_names, (paths.filter(videos), sizes.filter(videos)), VIDEOS)
        if split == self.splits()[0]:
            complete(self, split, found)
        return found

    def set_aside(self, split: str) -> pa.Table:
        """Files in class folders that are no videos by their names, and videos in no class folder (schema SET_ASIDE)."""
        paths, folder = self._table(split)[0], self.folders[split]
        videos, inside = VIDEOS.mask(paths), pc.match_substring(below(paths, folder), "/")
        others, loose = paths.filter(pc.and_(inside, pc.invert(videos))), paths.filter(pc.and_not(videos, inside))
        labels = labels_of(owners_of(others, folder), self.class_names)
        lost = set_aside_table(loose, [-1] * len(loose), ["a video in no class folder"] * len(loose))
        return pa.concat_tables([SET_ASIDE.empty_table(), no_videos(others, labels), lost]).sort_by("sample_id")

    def _table(self, split: str) -> tuple[pa.Array, pa.Array]:
        """Paths and sizes of all files of a split, looked up once."""
        if split not in self._tables:
            folder = self.folders[split]
            paths, sizes = self.store.table(folder)
            if not folder and (others := [name for name in self.folders.values() if name]):
                mine = pc.invert(pc.is_in(owners_of(paths, ""), pa.array(others, pa.string())))
                paths, sizes = paths.filter(mine), sizes.filter(mine)
            self._tables[split] = paths, sizes
        return self._tables[split]

    def _holds_videos(self, folder: str) -> bool:
        return bool(pc.any(VIDEOS.mask(self.store.table(folder)[0])).as_py())

"""Videos in one folder per class: `train/<class>/*.mp4`, and optionally `val/` or `test/`.

As `imagefolder`: sample ids are POSIX paths relative to the root, split included; without a `train` folder, class folders in
the root are the training split; classes are the sorted folder names; `val` wins over `test` as the test split. If only a `val/`
or `test/` holds videos, it is the only split, and data.train_split selects it. Files in class folders without a video
extension, and videos outside class folders, are set aside. Hidden files and other folders in the root are ignored.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources.base import SET_ASIDE
from distill_at_scale.data.sources.folders import FolderSource, below, labels_of, owners_of
from distill_at_scale.data.sources.video.base import VIDEOS, no_videos, set_aside_table


class VideoFolder(FolderSource):
    medium, clips = VIDEOS, True

    def __init__(self, config: DataSection) -> None:
        self._split_files: dict[str, tuple[pa.Array, pa.Array]] = {}
        super().__init__(config)

    def find_classes(self) -> list[str]:
        """The sorted folders of the training split, or of a test split that is the only one."""
        if "train" not in self.folders:
            others = [name for name in self.store.names()[0] if name not in self.folders.values()]
            has_videos = (pc.any(VIDEOS.mask(self.store.table(name)[0])).as_py() for name in others)
            if not self.folders or any(has_videos):
                self.folders = {"train": "", **self.folders}
        return self.class_folders(self.folders.get("train", self.folders.get("test", "")))

    def list_split(self, split: str) -> pa.Table:
        """Raises UserError for an empty class folder, a test class that training lacks, and a split without videos."""
        if split == "test":
            self.refuse_extra_classes(split)
        return super().list_split(split) if split == self.splits()[0] else self.list_by_class(split)

    def set_aside(self, split: str) -> pa.Table:
        """Files in class folders without a video extension, and videos outside class folders (schema SET_ASIDE)."""
        paths, folder = self.split_files(split)[0], self.folders[split]
        is_video, inside = VIDEOS.mask(paths), pc.match_substring(below(paths, folder), "/")
        others = paths.filter(pc.and_(inside, pc.invert(is_video)))
        loose = paths.filter(pc.and_not(is_video, inside))
        labels = labels_of(owners_of(others, folder), self.class_names)
        parts = [
            SET_ASIDE.empty_table(),
            no_videos(others, labels),
            set_aside_table(loose, [-1] * len(loose), ["a video in no class folder"] * len(loose)),
        ]
        return pa.concat_tables(parts).sort_by("sample_id")

    def split_files(self, split: str) -> tuple[pa.Array, pa.Array]:
        if split not in self._split_files:
            self._split_files[split] = super().split_files(split)
        return self._split_files[split]

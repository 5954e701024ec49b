"""HMDB-51 as it is unpacked: `<class>/*.avi`, and the lists of its three folds, one per class and fold.

Class folders (the content of the .rar files) lie in the root or in `hmdb51_org/`; the lists in the root, beside it
(`testTrainMulti_7030_splits/`), or in data.annotations. data.fold selects `<class>_test_split<F>.txt`, with lines of a file
name and 1 (training), 2 (test) or 0 (in neither split, as its authors intend). Classes are those that have lists, sorted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.media import VIDEO_EXTENSIONS
from distill_at_scale.data.sources.video.base import ListedVideos

LIST = re.compile(r"(?P<owner>.+)_test_split(?P<fold>[123])\.txt")
LINE = re.compile(r"([^/]+?)\s+([012])")
SPLITS = {"1": "train", "2": "test", "0": ""}


class Hmdb51(ListedVideos):
    home_names = ("hmdb51_org", "hmdb51", "HMDB51")
    list_pattern, list_example = LIST.pattern, "brush_hair_test_split1.txt"
    list_folders, lists_above = ("testTrainMulti_7030_splits", "test_train_splits"), True

    @cached_property
    def class_names(self) -> list[str]:
        """The classes that have lists, sorted; raises UserError for a class that has lists of other folds only."""
        matches = [match for name in self.lists.paths if (match := LIST.fullmatch(name))]
        names = sorted({match["owner"] for match in matches})
        present = {match["owner"] for match in matches if int(match["fold"]) == self.config.fold}
        if missing := [name for name in names if name not in present]:
            place = self.lists.place(self._list_name(missing[0]))
            raise UserError(f"{place} is missing (data.fold = {self.config.fold}); download it, or choose another fold")
        return names

    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        for label, class_name in enumerate(self.class_names):
            name = self._list_name(class_name)
            for number, line in self.lists.lines(name):
                match = LINE.fullmatch(line)
                if match is None or not match[1].lower().endswith(VIDEO_EXTENSIONS):
                    what = "a file name and 1 (training), 2 (test) or 0 (neither), as in 'clip_1.avi 1'"
                    place = f"{self.lists.place(name)}, line {number}"
                    raise UserError(f"{place}: {line!r} is not {what}; correct the line or download the lists again")
                yield f"{class_name}/{match[1]}", label, SPLITS[match[2]], f"'{name}' line {number}"

    def _list_name(self, class_name: str) -> str:
        return f"{class_name}_test_split{self.config.fold}.txt"

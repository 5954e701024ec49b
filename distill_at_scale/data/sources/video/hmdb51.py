"""HMDB-51 as it is unpacked: `<class>/*.avi`, and the lists of its three folds, one per class and fold.

The class folders (what the .rar files hold) lie in the root or in `hmdb51_org/`; the lists in the root or beside it
(`testTrainMulti_7030_splits/`), or in data.annotations. data.fold picks `<class>_test_split<F>.txt`, whose lines are a file
name and 1 (training), 2 (test) or 0 (neither: the clip is left out, as its authors mean it). Classes are those that have
lists, sorted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.video.base import ROWS, VIDEO_EXTENSIONS, ListedVideos
from distill_at_scale.data.sources.video.label_lists import Lists, find_lists
from distill_at_scale.storage.filesystem import joined

LIST = re.compile(r"(?P<owner>.+)_test_split(?P<fold>[123])\.txt")
LINE = re.compile(r"([^/]+?)\s+([012])")
SPLITS = {"1": "train", "2": "test", "0": ""}


class Hmdb51(ListedVideos):
    home_names = ("hmdb51_org", "hmdb51", "HMDB51")

    @cached_property
    def lists(self) -> Lists:
        folders = ("testTrainMulti_7030_splits", "test_train_splits")
        example = "brush_hair_test_split1.txt"
        return find_lists(self.config, self.store, LIST.pattern, example, folders, above=True)

    @cached_property
    def class_names(self) -> list[str]:
        """The classes that have lists, sorted.

        Raises UserError for a class whose list of the fold is missing, though it has one of another fold.
        """
        found = [match for name in self.lists.paths if (match := LIST.fullmatch(name))]
        names = sorted({match["owner"] for match in found})
        have = {match["owner"] for match in found if int(match["fold"]) == self.config.fold}
        if lacking := [name for name in names if name not in have]:
            place = self.lists.place(self._list(lacking[0]))
            raise UserError(
                f"{place} is missing (data.fold = {self.config.fold}); download the lists again, or take another fold"
            )
        return names

    @property
    def no_row(self) -> str:
        return f"in no list of fold {self.config.fold}"

    def rows(self) -> pa.Table:
        """Raises UserError for a line of another form, naming it."""
        found = [row for label, owner in enumerate(self.class_names) for row in self._rows_of(owner, label)]
        return pa.Table.from_pylist(found, ROWS)

    def _list(self, owner: str) -> str:
        return f"{owner}_test_split{self.config.fold}.txt"

    def _rows_of(self, owner: str, label: int) -> Iterator[dict[str, Any]]:
        name = self._list(owner)
        for line, text in self.lists.lines(name):
            parts = LINE.fullmatch(text)
            if parts is None or not parts[1].lower().endswith(VIDEO_EXTENSIONS):
                raise UserError(
                    f"{self.lists.place(name)}, line {line}: {text!r} is no line of such a list; a line is a file name and 1 "
                    "(training), 2 (test) or 0 (neither), as in 'clip_1.avi 1'; mend the line or download the lists again"
                )
            yield {
                "key": f"{owner}/{parts[1].rpartition('.')[0]}",
                "label": label,
                "split": SPLITS[parts[2]],
                "sample_id": joined(self.home, f"{owner}/{parts[1]}"),
                "place": f"'{name}' line {line}",
            }

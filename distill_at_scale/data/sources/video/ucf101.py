"""UCF-101 as it is unpacked: `UCF-101/<Class>/v_<Class>_g01_c01.avi`, and the lists of its three folds.

The root may be the folder UCF-101 itself or the one above; the lists may lie in either (`ucfTrainTestlist/`), or in
data.annotations. data.fold picks `trainlist0F.txt` and `testlist0F.txt`; classes are in the order of classInd.txt. Clips that
were converted to another container (`v_….mp4`) are found too. Lists of the detection task are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa

from distill_at_scale.config.load import suggest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.video.base import ROWS, VIDEO_EXTENSIONS, ListedVideos
from distill_at_scale.data.sources.video.label_lists import Lists, find_lists
from distill_at_scale.storage.filesystem import joined

CLASSES = "classInd.txt"
LINE = re.compile(r"([^/]+)/([^/]+?)(?:\s+(\d+))?")
FORM = "a line is ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi, in lists of training clips with the number of the class"


class Ucf101(ListedVideos):
    home_names = ("UCF-101", "UCF101")

    @cached_property
    def lists(self) -> Lists:
        pattern = r"classInd\.txt|(?:train|test)list0[123]\.txt"
        return find_lists(self.config, self.store, pattern, CLASSES, ("ucfTrainTestlist",), above=True)

    @cached_property
    def class_names(self) -> list[str]:
        """The classes by their numbers in classInd.txt.

        Raises UserError where the file is missing, or where its numbers are not 1..n.
        """
        numbered: dict[int, str] = {}
        for line, text in self.lists.lines(CLASSES):
            number, name = [*text.split(maxsplit=1), "", ""][:2]
            if not number.isdecimal() or not name.strip() or int(number) in numbered:
                place = self.lists.place(CLASSES)
                raise UserError(f"{place}, line {line}: {text!r} is no new number and class, as in '1 ApplyEyeMakeup'")
            numbered[int(number)] = name.strip()
        names = [numbered[number] for number in sorted(numbered)]
        if sorted(numbered) != list(range(1, len(names) + 1)) or len(set(names)) != len(names) or not names:
            place = self.lists.place(CLASSES)
            raise UserError(f"{place} must name every class once, numbered 1, 2, 3, …; download the lists again")
        return names

    @property
    def no_row(self) -> str:
        return f"in no list of fold {self.config.fold}"

    def rows(self) -> pa.Table:
        """Raises UserError for a missing list, or a line of another form or of an unknown class, naming it."""
        found = [row for split in ("train", "test") for row in self._rows_of(split)]
        return pa.Table.from_pylist(found, ROWS)

    def _rows_of(self, split: str) -> Iterator[dict[str, Any]]:
        name = f"{split}list{self.config.fold:02d}.txt"
        labels = {known: label for label, known in enumerate(self.class_names)}
        for line, text in self.lists.lines(name):
            owner, file = self._parsed(name, line, text, labels)
            yield {
                "key": f"{owner}/{file.rpartition('.')[0]}",
                "label": labels[owner],
                "split": split,
                "sample_id": joined(self.home, f"{owner}/{file}"),
                "place": f"'{name}' line {line}",
            }

    def _parsed(self, name: str, line: int, text: str, labels: dict[str, int]) -> tuple[str, str]:
        """Class and file of a line."""
        parts = LINE.fullmatch(text)
        place = f"{self.lists.place(name)}, line {line}"
        if parts is None or not parts[2].lower().endswith(VIDEO_EXTENSIONS):
            raise UserError(f"{place}: {text!r} is no line of such a list; {FORM}")
        owner, file, number = parts.groups()
        if owner not in labels:
            raise UserError(f"{place}: {owner!r} is no class of {CLASSES} ({suggest(owner, labels)}); mend the line")
        if number is not None and int(number) != labels[owner] + 1:
            raise UserError(
                f"{place}: the number is {number}, but {owner} has {labels[owner] + 1} in {CLASSES}; mend the line"
            )
        return owner, file

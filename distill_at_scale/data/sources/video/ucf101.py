"""UCF-101 as it is unpacked: `UCF-101/<Class>/v_<Class>_g01_c01.avi`, and the lists of its three folds.

The root is the folder UCF-101 or the one above it; the lists lie in either (`ucfTrainTestlist/`), or in data.annotations.
data.fold selects `trainlist0F.txt` and `testlist0F.txt`; classes are in the order of classInd.txt. Clips that were converted to
another container (`v_….mp4`) work as well. Not covered: lists of the detection task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

from distill_at_scale.config.explain import suggest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.media import VIDEO_EXTENSIONS
from distill_at_scale.data.sources.video.base import ListedVideos

CLASSES = "classInd.txt"
LINE = re.compile(r"([^/]+)/([^/]+?)(?:\s+(\d+))?")


class Ucf101(ListedVideos):
    home_names = ("UCF-101", "UCF101")
    list_pattern, list_example = r"classInd\.txt|(?:train|test)list0[123]\.txt", CLASSES
    list_folders, lists_above = ("ucfTrainTestlist",), True

    @cached_property
    def class_names(self) -> list[str]:
        place, numbered = self.lists.place(CLASSES), dict[int, str]()
        for line_number, line in self.lists.lines(CLASSES):
            number, name = [*line.split(maxsplit=1), "", ""][:2]
            if not number.isdecimal() or not name.strip() or int(number) in numbered:
                where = f"{place}, line {line_number}"
                raise UserError(f"{where}: {line!r} is not a new number and class as '1 ApplyEyeMakeup'")
            numbered[int(number)] = name.strip()
        names = [numbered[number] for number in sorted(numbered)]
        if sorted(numbered) != list(range(1, len(names) + 1)) or len(set(names)) != len(names) or not names:
            raise UserError(f"{place} must name every class once, numbered 1, 2, 3, …; download the lists again")
        return names

    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        for split in ("train", "test"):
            name = f"{split}list{self.config.fold:02d}.txt"
            for number, line in self.lists.lines(name):
                place = f"{self.lists.place(name)}, line {number}"
                match = LINE.fullmatch(line)
                if match is None or not match[2].lower().endswith(VIDEO_EXTENSIONS):
                    form = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"
                    ending = "in lists of training clips followed by the number of the class"
                    raise UserError(f"{place}: {line!r} is malformed; a line is {form}, {ending}")
                class_name, file, class_number = match.groups()
                if class_name not in labels:
                    close = suggest(class_name, labels)
                    raise UserError(f"{place}: {class_name!r} is no class of {CLASSES} ({close}); correct it")
                if class_number is not None and int(class_number) != (own := labels[class_name] + 1):
                    numbers = f"the number is {class_number}, but {class_name} has {own} in {CLASSES}"
                    raise UserError(f"{place}: {numbers}; correct it")
                yield f"{class_name}/{file}", labels[class_name], split, f"'{name}' line {number}"

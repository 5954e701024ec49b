"""Something-Something V2 as it is unpacked: one flat folder of `<id>.webm` (or .mp4), and lists in JSON.

Clips lie in `20bn-something-something-v2/`, `videos/` or the root; lists in the root, `labels/` or data.annotations, under
their first names (`something-something-v2-train.json`) or the newer ones (`train.json`). A clip's class is its template
without the brackets; labels.json numbers the classes. The validation list is the test split. The official test list has no
labels: its clips are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from distill_at_scale.config.explain import suggest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.video.base import ListedVideos

PREFIX = "something-something-v2-"
NO_BRACKETS = str.maketrans("", "", "[]")
SPLITS = {"train": "train", "validation": "test", "test": ""}  # list -> split


class SomethingV2(ListedVideos):
    home_names = ("20bn-something-something-v2", "videos")
    flat = True
    list_pattern = rf"(?:{PREFIX})?(?:train|validation|test|labels)\.json"
    list_example, list_folders = f"{PREFIX}train.json", ("labels", "annotations")
    unlisted_reason = "in no list (training, validation or test); complete the lists, or remove the file"

    @cached_property
    def class_names(self) -> list[str]:
        name = self._list_name("labels")
        numbered = self._json(name, dict)
        numbers = [int(number) if str(number).isdecimal() else -1 for number in numbered.values()]
        if sorted(numbers) != list(range(len(numbers))) or not numbers:
            place = self.lists.place(name)
            raise UserError(f'{place} must map every class to its number, "0", "1", "2", …; download the lists again')
        return [class_name for _, class_name in sorted(zip(numbers, numbered, strict=True))]

    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        present = {kind: name for kind in SPLITS if (name := self._list_name(kind)) in self.lists.paths}
        if not any(SPLITS[kind] for kind in present):
            self.lists.read(self._list_name("train"))  # raises: it is missing
        labels = {class_name: label for label, class_name in enumerate(self.class_names)}
        for kind, name in present.items():
            split = SPLITS[kind]
            for number, entry in enumerate(self._json(name, list), 1):
                fields = entry if isinstance(entry, dict) else {}
                clip_id, template = fields.get("id"), fields.get("template")
                place = f"{self.lists.place(name)}, entry {number}"
                if not isinstance(clip_id, str | int) or (split and not isinstance(template, str)):
                    shown = json.dumps(entry, ensure_ascii=False)[:200]
                    example = '{"id": "78687", "template": "Holding [something]", ...}'
                    raise UserError(f"{place}: {shown} has no id or no template; an entry is {example}")
                class_name = str(template).translate(NO_BRACKETS) if split else ""
                if split and class_name not in labels:
                    problem = f"no class of {self._list_name('labels')} ({suggest(class_name, labels)})"
                    raise UserError(f"{place}: {class_name!r} is {problem}; download the lists that belong together")
                yield f"{clip_id}.webm", labels.get(class_name, -1), split, f"'{name}' entry {number}"

    def _list_name(self, kind: str) -> str:
        """The name of a list that is present: the first name, else the newer one."""
        return first if (first := f"{PREFIX}{kind}.json") in self.lists.paths else f"{kind}.json"

    def _json(self, name: str, kind: type) -> Any:
        try:
            value = json.loads(self.lists.read(name))
        except json.JSONDecodeError as error:
            place = f"{self.lists.place(name)}, line {error.lineno}"
            raise UserError(f"{place}: this is not JSON ({error.msg}); download it again") from None
        if not isinstance(value, kind):
            raise UserError(f"{self.lists.place(name)} must hold a {kind.__name__} in JSON; download it again")
        return value

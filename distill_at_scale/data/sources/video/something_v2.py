"""Something-Something V2 as it is unpacked: one flat folder of `<id>.webm` (or .mp4), and lists in JSON.

The clips lie in `20bn-something-something-v2/`, in `videos/` or in the root; the lists in the root, in `labels/` or in
data.annotations, by their first names (`something-something-v2-train.json`) or the newer ones (`train.json`). A clip's
class is its template without the brackets; labels.json numbers the classes, which is their order. The validation list is
the test split. The official test list has no labels: its clips are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.load import suggest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.video.base import ROWS, ListedVideos
from distill_at_scale.data.sources.video.label_lists import Lists, find_lists
from distill_at_scale.storage.filesystem import joined

PREFIX = "something-something-v2-"
NO_BRACKETS = str.maketrans("", "", "[]")
FORM = 'an entry is {"id": "78687", "template": "Holding [something]", ...}'


class SomethingV2(ListedVideos):
    home_names = ("20bn-something-something-v2", "videos")
    flat = True
    no_row = "in no list (training, validation or test)"

    @cached_property
    def lists(self) -> Lists:
        pattern = rf"(?:{PREFIX})?(?:train|validation|test|labels)\.json"
        return find_lists(self.config, self.store, pattern, f"{PREFIX}train.json", ("labels", "annotations"))

    @cached_property
    def class_names(self) -> list[str]:
        """The classes by their numbers in labels.json.

        Raises UserError where it is missing, or where its numbers are not 0..n-1.
        """
        name = self._name("labels")
        found = self._json(name, dict)
        numbers = [int(number) if str(number).isdecimal() else -1 for number in found.values()]
        if sorted(numbers) != list(range(len(numbers))) or not numbers:
            place = self.lists.place(name)
            raise UserError(f'{place} must map every class to its number, "0", "1", "2", …; download the lists again')
        return [owner for _, owner in sorted(zip(numbers, found, strict=True))]

    def rows(self) -> pa.Table:
        """Raises UserError where there is no list of labelled clips, or for an entry of another form, naming it."""
        parts = [("train", "train"), ("validation", "test"), ("test", "")]
        there = [(self._name(kind), split) for kind, split in parts if self._name(kind) in self.lists.paths]
        if not any(split for _, split in there):
            self.lists.read(self._name("train"))  # says that it is missing
        return pa.concat_tables([self._rows_of(name, split) for name, split in there])

    def _rows_of(self, name: str, split: str) -> pa.Table:
        """The rows of a list; those of no split have no label (-1)."""
        entries = self._json(name, list)
        ids, templates = self._columns(name, entries, labelled=bool(split))
        count = len(ids)
        places = pc.binary_join_element_wise(f"'{name}' entry ", pa.array(range(1, count + 1)).cast(pa.string()), "")
        paths = pc.binary_join_element_wise(joined(self.home, ""), ids, ".webm", "")
        return pa.table([ids, self._labels_of(name, templates), pa.repeat(split, count), paths, places], schema=ROWS)

    def _columns(self, name: str, entries: list[Any], labelled: bool) -> tuple[pa.Array, list[str | None]]:
        """Ids (string) and, where the list has them, templates."""
        ids, templates = [], []
        for number, entry in enumerate(entries, 1):
            key = entry.get("id") if isinstance(entry, dict) else None
            template = entry.get("template") if isinstance(entry, dict) and labelled else None
            if not isinstance(key, str | int) or (labelled and not isinstance(template, str)):
                shown = json.dumps(entry, ensure_ascii=False)[:200]
                raise UserError(f"{self.lists.place(name)}, entry {number}: {shown} has no id or no template; {FORM}")
            ids.append(str(key))
            templates.append(template)
        return pa.array(ids, pa.string()), templates

    def _labels_of(self, name: str, templates: Sequence[str | None]) -> pa.Array:
        labels: dict[str | None, int] = {owner: label for label, owner in enumerate(self.class_names)}
        known = {template: labels.get(template and template.translate(NO_BRACKETS), -1) for template in set(templates)}
        if bad := {template for template, label in known.items() if template is not None and label < 0}:
            number = next(i for i, template in enumerate(templates, 1) if template in bad)
            owner = str(templates[number - 1]).translate(NO_BRACKETS)
            raise UserError(
                f"{self.lists.place(name)}, entry {number}: {owner!r} is no class of {self._name('labels')} "
                f"({suggest(owner, self.class_names)}); download the lists that belong together"
            )
        return pa.array([known[template] for template in templates], pa.int32())

    def _name(self, kind: str) -> str:
        """The name of a list that is there: the first name, else the newer one."""
        return first if (first := f"{PREFIX}{kind}.json") in self.lists.paths else f"{kind}.json"

    def _json(self, name: str, kind: type) -> Any:
        try:
            value = json.loads(self.lists.read(name))
        except json.JSONDecodeError as error:
            place = f"{self.lists.place(name)}, line {error.lineno}"
            raise UserError(f"{place}: this is no JSON ({error.msg}); download it again") from None
        if not isinstance(value, kind):
            raise UserError(f"{self.lists.place(name)} must hold a {kind.__name__} in JSON; download it again")
        return value

"""Checks files that are numbered parts of a set, named like `train-00000-of-00003.parquet`: each part must be there once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import split_word
from distill_at_scale.storage.filesystem import Store

# older releases of Hugging Face's datasets add a hash: train-00000-of-00001-0123456789abcdef.parquet
NUMBERED = re.compile(r"(?P<set>.*?)(?P<number>\d{5,})-of-(?P<total>\d{5,})(?:-[0-9a-f]{16})?(?P<ending>\.\w+)")


def check_numbered(paths: Sequence[str], store: Store, complete: bool = True) -> None:
    """Files of one split and of one name before the number are one set, in whatever folders they lie.

    Raises UserError for two files of one number (two versions or two configurations of the set), naming both, and with
    `complete` for a number without a file.
    """
    sets: dict[tuple[str | None, str, str], dict[int, str]] = {}
    totals: dict[tuple[str | None, str, str], tuple[int, str]] = {}
    for path in sorted(paths):
        match = NUMBERED.fullmatch(path.rpartition("/")[2])
        if match is None:
            continue
        key, number = (split_word(path), match["set"], match["ending"]), int(match["number"])
        total = int(match["total"])
        first_total, other = totals.setdefault(key, (total, path))
        other = sets.setdefault(key, {}).setdefault(number, path) if total == first_total else other
        if other != path:
            problem = f"{store.place(other)} and {store.place(path)} are parts of two versions or configurations"
            raise UserError(f"{problem}; give the folder of one of them in data.path, or remove the other")
    for key, files in sets.items() if complete else ():
        total, path = totals[key]
        if missing := sorted(set(range(total)) - set(files)):
            name = f"{key[1]}{missing[0]:05d}-of-{total:05d}{key[2]}"
            more = f" and {len(missing) - 1} more of {total} files are" if len(missing) > 1 else " is"
            advice = "download it, or take -of- out of the names of the files to use a part of the set"
            raise UserError(f"{store.place(path.rpartition('/')[0])}: {name}{more} missing; {advice}")

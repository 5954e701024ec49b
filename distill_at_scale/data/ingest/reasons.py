"""Groups the reasons in rejected.parquet by kind: reasons that differ only in numbers and quoted names are of one kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, zip_longest

VARYING = re.compile(r"(?<![A-Za-z])\d[\d.,:]*|'[^']*'|\"[^\"]*\"")  # numbers, and names in quotes


def kinds_of(reasons: Sequence[str]) -> dict[str, list[int]]:
    """The words of each kind -> the places of its reasons in `reasons`; the most frequent kind comes first.

    "…" stands for a number or a name that is not the same in all reasons of the kind.
    """
    groups: dict[str, list[int]] = {}
    for place, reason in enumerate(reasons):
        groups.setdefault(VARYING.sub("…", reason), []).append(place)
    kinds = {}
    for places in sorted(groups.values(), key=len, reverse=True):
        values = zip(*(VARYING.findall(reasons[place]) for place in places), strict=True)
        shown = [group[0] if len(set(group)) == 1 else "…" for group in values]
        texts = VARYING.split(reasons[places[0]])
        kinds["".join(chain.from_iterable(zip_longest(texts, shown, fillvalue="")))] = places
    return kinds

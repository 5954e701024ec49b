"""What a plot shows, without how it is drawn: series of marks, axes, and reference lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["ours", "random", "unpruned", "other"]  # decides the colour
Kind = Literal["line", "points", "bars"]


@dataclass(frozen=True)
class Series:
    """Marks of one kind in a plot; `error` is a standard deviation per mark, None where there is none."""

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    error: Sequence[float | None] | None = None
    kind: Kind = "line"
    role: Role = "other"


@dataclass(frozen=True)
class Plot:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()  # horizontal lines: the unpruned accuracy, chance
    marks: Sequence[tuple[str, float]] = ()  # vertical lines: a recommended rate, a break point
    log_x: bool = False

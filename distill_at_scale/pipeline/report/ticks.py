"""The numbers along an axis of a chart: where ticks stand, whether they are per cent, and labels that do not overlap."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.ticker import FuncFormatter

STEPS = (1, 2, 5)  # of ticks on a logarithmic axis, in every decade
UNIT_GIVEN = re.compile(r"%|per cent|percent|points|seconds|difference|correlation", re.IGNORECASE)
A_SHARE = re.compile(r"\b(accuracy|top-1|share|rate|keep|kept|drop|dropped)\b", re.IGNORECASE)


def log_ticks(low: float, high: float) -> list[float]:
    """Plain numbers between two: 1, 2 and 5 of every decade, of many decades only the ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = STEPS if high / low < 2e3 else STEPS[:1]
    found = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in found if low / 1.1 <= tick <= high * 1.1] or [low, high]


def shares(label: str, values: Sequence[float], log: bool = False) -> bool:
    """Whether the values are fractions that are better read in per cent."""
    fits = bool(values) and min(values) >= 0 and max(values) <= 1
    return fits and not UNIT_GIVEN.search(label) and bool(A_SHARE.search(label))


def formatter(scale: float) -> FuncFormatter:
    """Plain numbers; with a scale of 100, per cent."""
    unit = "\u00a0%" if scale == 100 else ""
    return FuncFormatter(lambda value, _: f"{scale * value:,.6g}{unit}".replace("-", "−"))


def apart(places: Sequence[float], distance: float) -> list[float]:
    """Places at least `distance` from each other, in their order, moved as little as a pass upwards needs."""
    found = list(places)
    order = sorted(range(len(found)), key=found.__getitem__)
    for lower, upper in pairwise(order):
        found[upper] = max(found[upper], found[lower] + distance)
    return found

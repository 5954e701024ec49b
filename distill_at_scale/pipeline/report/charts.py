"""Draws a study's or a sweep's `Plot` as SVG, in the style of `pipeline/report/run_plots.py`.

Numbers on x give lines, points and error bars over two axes; names on x (or bars) give rows, one per name, which leaves
room for long names. Colours tell roles: what was selected, what was drawn at random, what is unpruned; the rest takes a
cycle that colour-blind readers can part, with a marker of its own each. Names stand in a legend above the plot and beside its
lines, never on the data. The same plot gives the same bytes. Left out: what is plotted (`studies/`, `sweep/`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.style import COLORS, FAINT, INK, LINE, STYLE, WIDTH, clip, svg

ROLES = {"ours": COLORS["distilled"], "random": COLORS["random_real"], "unpruned": COLORS["full"]}
TEXT = {COLORS["full"]: "#96650f", COLORS["random_real"]: FAINT}  # of pale colours, dark enough to be read
CYCLE = ("#12927f", "#c2483d", "#7a5195", "#0f8ec7", "#8a6d1f", "#cc79a7", "#1c2430")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LARGEST_NAME = 40  # characters of a name in the legend
HEIGHT, ROW = 3.5, 0.27  # inches: of a plot, and of a bar
DODGE = 2.5  # points between the error bars of two series at the same x
LINE_HEIGHT = 0.052  # of a label beside the plot, as a share of its height
FAR = 0.6  # of the height of all series: a level farther from them is named at the edge
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what no XML may hold


def draw(plot: Plot) -> str:
    """A plot as a data URI.

    Values that are not finite are left out, on a logarithmic axis also those that are not positive. Shares between 0 and 1 are
    shown in per cent where the label names an accuracy, share or rate and no unit.
    """
    shown = [(series, color, marker) for series, (color, marker) in zip(plot.series, styles(plot.series), strict=True)]
    with matplotlib.rc_context(STYLE):
        if any(series.kind == "bars" or _named(series) for series in plot.series):
            return svg(_rows(plot, shown))
        return svg(_plane(plot, shown))


def styles(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colour and marker of each: the first of a role has the role's colour, so that the cycle tells all others apart."""
    found, taken, cycle = [], set(), 0
    for place, one in enumerate(series):
        color = ROLES.get(one.role)
        if color is None or color in taken:
            color, cycle = CYCLE[cycle % len(CYCLE)], cycle + 1
        taken.add(color)
        found.append((color, MARKERS[place % len(MARKERS)]))
    return found


def _plane(plot: Plot, shown: Sequence[tuple[Series, str, str]]) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    log = plot.log_x and any(True for series, *_ in shown for _ in _values(series, True))
    for place, (series, color, marker) in enumerate(shown):
        dodge = (place - (len(shown) - 1) / 2) * DODGE / 72 if series.kind == "line" else 0.0
        aside = ScaledTranslation(dodge, 0, figure.dpi_scale_trans)
        _series(axes, series, color, marker, axes.transData + aside, log)
    xs = [x for series, *_ in shown for x, _, _ in _values(series, log)]
    xs += [x for _, x in plot.marks if _usable(x, log)]
    ys = [v for series, *_ in shown for _, y, e in _values(series, log) for v in (y - e, y + e)]
    _x_axis(axes, plot, xs, log)
    _y_axis(axes, plot, ys, [y for _, y in plot.levels if math.isfinite(y)])
    axes.yaxis.set_major_formatter(
        formatter(_scale(plot, [y for series, *_ in shown for _, y, _ in _values(series, log)]))
    )
    _levels(axes, [(name, y) for name, y in plot.levels if math.isfinite(y)])
    _marks(axes, [(name, x) for name, x in plot.marks if _usable(x, log)])
    _frame(axes, "both")
    _legend(axes, shown)
    return figure


def _series(axes: Axes, series: Series, color: str, marker: str, where: Transform, log: bool) -> None:
    if not (points := sorted(_values(series, log))):
        return
    x, y, error = zip(*points, strict=True)
    line = "-" if series.kind == "line" else "none"
    if any(error):
        axes.errorbar(
            x, y, yerr=error, fmt="none", ecolor=color, elinewidth=1, capsize=2.5, alpha=0.75, transform=where
        )
    axes.plot(x, y, ls=line, lw=1.7, color=color, marker=marker, ms=5, mec="white", mew=0.7, transform=where, zorder=3)


def _values(series: Series, log: bool) -> Iterator[tuple[float, float, float]]:
    """x, y and error of the marks that can be drawn; the error is 0 where there is none."""
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if _usable(x, log) and y is not None and math.isfinite(y):
            error = series.error[i] if series.error is not None else None
            yield float(x), float(y), float(error) if error is not None and math.isfinite(error) else 0.0


def _usable(x: Any, log: bool) -> TypeGuard[float]:
    return x is not None and not isinstance(x, str) and math.isfinite(x) and (x > 0 or not log)


def _x_axis(axes: Axes, plot: Plot, xs: Sequence[float], log: bool) -> None:
    axes.set_xlabel(clean(plot.x_label))
    scale = 100 if shares(plot.x_label, xs, log) else 1
    axes.xaxis.set_major_formatter(formatter(scale))
    if not xs:
        return
    low, high = min(xs), max(xs)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.04 / 1.05, high * (high / low) ** 0.04 * 1.05)
        axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(formatter(scale))
    else:
        room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
        axes.set_xlim(low - room, high + room)
        if high > 1 and all(float(x).is_integer() for x in xs):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def _y_axis(axes: Axes, plot: Plot, ys: Sequence[float], levels: Sequence[float]) -> None:
    """A level far from all series is not allowed to press them together."""
    reach = FAR * (max(ys) - min(ys)) if ys else 0.0
    ys = [*ys, *(y for y in levels if not ys or not reach or min(ys) - reach <= y <= max(ys) + reach)]
    axes.set_ylabel(clean(plot.y_label))
    if ys:
        room = 0.07 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 0.1
        axes.set_ylim(min(ys) - room, max(ys) + room)


def _scale(plot: Plot, values: Sequence[float]) -> int:
    """100 where values are shares; a whisker may reach beyond 0 and 1, a share does not."""
    return 100 if shares(plot.y_label, values) else 1


def _levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    """Dashed lines with their names at the right, moved apart where they would overlap; arrows for those outside."""
    low, high = axes.get_ylim()
    shares_up = [(y - low) / (high - low) for _, y in levels]
    levels = [
        (f"{'↓ ' if up < 0 else '↑ ' if up > 1 else ''}{name}", y)
        for (name, y), up in zip(levels, shares_up, strict=True)
    ]
    places = apart([min(1.0, max(0.0, up)) for up in shares_up], LINE_HEIGHT)
    for (name, y), place in zip(levels, places, strict=True):
        color = level_color(name)
        if low <= y <= high:
            axes.axhline(y, color=color, lw=1.1, ls=(0, (4, 3)), zorder=1)
        text = clip(clean(name), LARGEST_NAME)
        axes.text(1.012, place, text, transform=axes.transAxes, va="center", color=TEXT.get(color, color), size=8.5)


def level_color(name: str) -> str:
    """That of the role which the name speaks of."""
    words = name.lower()
    return next((ROLES[role] for role in ("unpruned", "random") if role in words), FAINT)


def _marks(axes: Axes, marks: Sequence[tuple[str, float]]) -> None:
    """Vertical lines with their names above the plot, each on a line of its own."""
    for row, (name, x) in enumerate(sorted(marks, key=lambda mark: mark[1])):
        axes.axvline(x, color=INK, lw=1, ls=(0, (1, 2)), zorder=1)
        low, high = axes.transAxes.inverted().transform(axes.transData.transform([(x, 0), (x, 1)]))[:, 0]
        left = (low + high) / 2 < 0.5
        text = f"{clip(clean(name), LARGEST_NAME)}"
        axes.text(x, 1.015 + LINE_HEIGHT * row, text, transform=axes.get_xaxis_transform(),
                  ha="left" if left else "right", va="bottom", size=8.5)  # fmt: skip


def _rows(plot: Plot, shown: Sequence[tuple[Series, str, str]]) -> Figure:
    """A row per name with a bar or a mark per series; the values lie on the horizontal axis."""
    names = list(dict.fromkeys(_name(x) for series, *_ in shown for x in series.x))
    alone = len(names) == sum(len(series.x) for series, *_ in shown)  # each name is in one series only
    beside = 1 if alone else len(shown)
    height = max(1.0, ROW * beside + 0.16)  # of a row, in units of the vertical axis
    figure = Figure(figsize=(WIDTH, min(40.0, 0.36 * height * len(names) + 1.1)), layout="constrained")
    axes = figure.add_subplot()
    values = [v for series, *_ in shown for _, y, e in _values_by_name(series) for v in (y - e, y + e)]
    values += [level for _, level in plot.levels if math.isfinite(level)]
    scale = _scale(plot, [y for series, *_ in shown for _, y, _ in _values_by_name(series)])
    for place, (series, color, marker) in enumerate(shown):
        aside = (place - (beside - 1) / 2) * 0.82 / beside if beside > 1 else 0.0
        _row_series(axes, series, color, marker, {name: row + aside for row, name in enumerate(names)}, beside)
    axes.set_yticks(range(len(names)), [clip(clean(name)) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(clean(plot.y_label))
    axes.xaxis.set_major_formatter(formatter(scale))
    _row_limits(axes, values, any(series.kind == "bars" for series, *_ in shown))
    _row_levels(axes, [(name, level) for name, level in plot.levels if math.isfinite(level)])
    _frame(axes, "x")
    _legend(axes, shown)
    return figure


def _row_series(axes: Axes, series: Series, color: str, marker: str, rows: dict[str, float], among: int) -> None:
    points = list(_values_by_name(series))
    if not points:
        return
    names, values, error = zip(*points, strict=True)
    places = [rows[name] for name in names]
    if series.kind == "bars":
        axes.barh(places, values, height=0.76 / among, color=color, alpha=0.85)
    else:
        line = "-" if series.kind == "line" else "none"
        axes.plot(values, places, ls=line, lw=1.2, color=color, marker=marker, ms=5.5, mec="white", mew=0.7, zorder=3)
    ink = INK if series.kind == "bars" else color
    for place, value, spread in zip(places, values, error, strict=True):
        if spread:
            axes.errorbar(value, place, xerr=spread, fmt="none", ecolor=ink, elinewidth=1, capsize=2.5)


def _values_by_name(series: Series) -> Iterator[tuple[str, float, float]]:
    places = list(range(len(series.x)))
    for place, y, error in _values(Series(series.name, places, series.y, series.error), False):
        yield _name(series.x[int(place)]), y, error


def _name(x: Any) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _named(series: Series) -> bool:
    return any(isinstance(x, str) for x in series.x)


def _row_limits(axes: Axes, values: Sequence[float], bars: bool) -> None:
    """Bars begin at zero: their length is what is read."""
    if values:
        low, high = min(values), max(values)
        low, high = (min(0.0, low), max(0.0, high)) if bars else (low, high)
        room = 0.06 * (high - low) or 0.1
        axes.set_xlim(low - room * (low < 0 or not bars), high + room)


def _row_levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    for row, (name, level) in enumerate(levels):
        color = level_color(name)
        axes.axvline(level, color=color, lw=1.1, ls=(0, (4, 3)), zorder=4)
        low, high = axes.get_xlim()
        side = "left" if level < (low + high) / 2 else "right"
        text, where = clip(clean(name), LARGEST_NAME), axes.get_xaxis_transform()
        style: dict[str, Any] = {"ha": side, "color": TEXT.get(color, color), "size": 8.5}
        axes.annotate(text, (level, 1), (0, 3 + 11 * row), xycoords=where, textcoords="offset points", **style)


def _frame(axes: Axes, grid: Any) -> None:
    axes.grid(axis=grid, color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _legend(axes: Axes, shown: Sequence[tuple[Series, str, str]]) -> None:
    """Names above the plot, as many beside each other as fit."""
    entries = [(_handle(*one), clip(clean(one[0].name), LARGEST_NAME)) for one in shown if one[0].name]
    if entries:
        longest = max(len(name) for _, name in entries)
        columns = max(1, min(len(entries), int(108 / (longest + 7))))
        handles, names = zip(*entries, strict=True)
        axes.figure.legend(
            handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, borderaxespad=0.2
        )


def _handle(series: Series, color: str, marker: str) -> Any:
    if series.kind == "bars":
        return Patch(color=color, alpha=0.85)
    line = "-" if series.kind == "line" else "none"
    return Line2D([], [], ls=line, lw=1.7, color=color, marker=marker, ms=5.5, mec="white", mew=0.7)


def clean(text: str) -> str:
    """Without characters that a picture cannot hold."""
    return UNPRINTABLE.sub("\ufffd", text)


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

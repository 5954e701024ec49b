"""Draws a `Plot` as an SVG data URI: sweeps, studies and the search for a keep rate.

Numbers on x give lines, points and error bars over two axes. Names on x, or bars, give one row per name, which leaves room for
long names. Colours show roles: selected, random, unpruned. All other series take a colour-blind-safe cycle with a marker each.
The same plot gives the same bytes.
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
from matplotlib.transforms import ScaledTranslation

from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.style import COLORS, FAINT, INK, NARROW, STYLE, WIDTH, clip, frame, svg

ROLES = {"ours": COLORS["distilled"], "random": COLORS["random_real"], "unpruned": COLORS["unpruned"]}
TEXT = {COLORS["unpruned"]: "#96650f", COLORS["random_real"]: FAINT}  # readable text colours for pale line colours
CYCLE = ("#12927f", "#c2483d", "#7a5195", "#0f8ec7", "#8a6d1f", "#cc79a7", "#1c2430")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_NAME = 40  # characters of a name in the legend
HEIGHT, ROW = 3.5, 0.27  # inches: of a plot, and of a bar
DODGE = 2.5  # points between the error bars of two series at the same x
LINE_HEIGHT = 0.052  # of a label beside the plot, as a fraction of the plot's height
FAR = 0.6  # a level farther from the series than this fraction of their height is named at the edge
LEGEND_CHARACTERS = 11.25  # per inch of a legend
LOG_STEPS = (1, 2, 5)  # ticks per decade
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not allowed in XML
HAS_UNIT = re.compile(r"%|per cent|percent|points|seconds|difference|correlation", re.IGNORECASE)
IS_SHARE = re.compile(r"\b(accuracy|top-1|share|rate|keep|kept|drop|dropped)\b", re.IGNORECASE)

Styled = tuple[Series, str, str]  # a series with its colour and marker


def draw(plot: Plot, width: float = WIDTH) -> str:
    """Draw a plot of a width in inches as a data URI. Values that are not finite are skipped, on a logarithmic axis also
    values that are not positive. Fractions between 0 and 1 are shown in per cent if the axis label names an accuracy, share
    or rate and no unit.
    """
    styled = [(series, *style) for series, style in zip(plot.series, styles(plot.series), strict=True)]
    rows = any(series.kind == "bars" or any(isinstance(x, str) for x in series.x) for series in plot.series)
    with matplotlib.rc_context(STYLE):
        return svg((_rows if rows else _plane)(plot, styled, width))


def both_widths(plot: Plot) -> dict[str, str]:
    """A plot as data URIs, `wide` and `narrow`, for the macro `chart` of the templates."""
    return {"wide": draw(plot), "narrow": draw(plot, NARROW)}


def picture(plot: Plot) -> dict[str, Any]:
    """The variables of the template's macro `picture`: title, drawn chart and alternative text."""
    names = ", ".join(series.name for series in plot.series if series.name)
    return {"title": plot.title, "chart": both_widths(plot), "alt": f"{plot.y_label} over {plot.x_label}: {names}"}


def styles(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colour and marker of each series: the first of a role takes the role's colour, all others take the cycle."""
    result, taken, cycle = list[tuple[str, str]](), set[str](), 0
    for place, one in enumerate(series):
        color = ROLES.get(one.role)
        if color is None or color in taken:
            color, cycle = CYCLE[cycle % len(CYCLE)], cycle + 1
        taken.add(color)
        result.append((color, MARKERS[place % len(MARKERS)]))
    return result


def _plane(plot: Plot, styled: Sequence[Styled], width: float) -> Figure:
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    log = plot.log_x and any(True for series, *_ in styled for _ in _values(series, True))
    points = [sorted(_values(series, log)) for series, *_ in styled]
    for place, ((series, color, marker), values) in enumerate(zip(styled, points, strict=True)):
        if values:
            dodge = (place - (len(styled) - 1) / 2) * DODGE / 72 if series.kind == "line" else 0.0
            where = axes.transData + ScaledTranslation(dodge, 0, figure.dpi_scale_trans)
            x, y, error = zip(*values, strict=True)
            if any(error):
                bar: Any = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 2.5}
                axes.errorbar(x, y, yerr=error, **bar, alpha=0.75, transform=where)
            axes.plot(x, y, lw=1.7, ms=5, **_line(series, color, marker), transform=where, zorder=3)
    marks = [(name, x) for name, x in plot.marks if _usable(x, log)]
    levels = [(name, y) for name, y in plot.levels if math.isfinite(y)]
    _x_axis(axes, plot, [x for values in points for x, _, _ in values] + [x for _, x in marks], log)
    ys = [bound for values in points for _, y, e in values for bound in (y - e, y + e)]
    reach = FAR * (max(ys) - min(ys)) if ys else 0.0
    ys += [y for _, y in levels if not ys or not reach or min(ys) - reach <= y <= max(ys) + reach]
    if ys:
        room = 0.07 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 0.1
        axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_ylabel(clean(plot.y_label))
    axes.yaxis.set_major_formatter(formatter(plot.y_label, [y for values in points for _, y, _ in values]))
    _levels(axes, levels)
    for row, (name, at) in enumerate(sorted(marks, key=lambda mark: mark[1])):  # each name on a line of its own
        axes.axvline(at, color=INK, lw=1, ls=(0, (1, 2)), zorder=1)
        low, high = axes.transAxes.inverted().transform(axes.transData.transform([(at, 0), (at, 1)]))[:, 0]
        side, above = "left" if (low + high) / 2 < 0.5 else "right", axes.get_xaxis_transform()
        text = clip(clean(name), MAX_NAME)
        axes.text(at, 1.015 + LINE_HEIGHT * row, text, transform=above, ha=side, va="bottom", size=8.5)
    frame(axes, "both")
    _legend(axes, styled, width)
    return figure


def _values(series: Series, log: bool) -> Iterator[tuple[float, float, float]]:
    """x, y and error of the marks that can be drawn; the error is 0 if the series has none."""
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if _usable(x, log) and y is not None and math.isfinite(y):
            error = series.error[i] if series.error is not None else None
            yield float(x), float(y), float(error) if error is not None and math.isfinite(error) else 0.0


def _usable(x: Any, log: bool) -> TypeGuard[float]:
    return x is not None and not isinstance(x, str) and math.isfinite(x) and (x > 0 or not log)


def _x_axis(axes: Axes, plot: Plot, xs: Sequence[float], log: bool) -> None:
    axes.set_xlabel(clean(plot.x_label))
    if xs:
        low, high = min(xs), max(xs)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.04 / 1.05, high * (high / low) ** 0.04 * 1.05)
            axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
            axes.set_xlim(low - room, high + room)
            if high > 1 and all(float(x).is_integer() for x in xs):
                axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(formatter(plot.x_label, xs))


def _levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    """Dashed lines with their names at the right, moved apart if they overlap; arrows mark levels outside the plot."""
    low, high = axes.get_ylim()
    heights = [(y - low) / (high - low) for _, y in levels]
    places = apart([min(1.0, max(0.0, height)) for height in heights], LINE_HEIGHT)
    for (name, y), height, place in zip(levels, heights, places, strict=True):
        color = level_color(name)
        if low <= y <= high:
            axes.axhline(y, color=color, lw=1.1, ls=(0, (4, 3)), zorder=1)
        arrow = "↓ " if height < 0 else "↑ " if height > 1 else ""
        text = clip(clean(arrow + name), MAX_NAME)
        axes.text(1.012, place, text, transform=axes.transAxes, va="center", color=TEXT.get(color, color), size=8.5)


def level_color(name: str) -> str:
    """The colour of the role that a level's name mentions."""
    return next((ROLES[role] for role in ("unpruned", "random") if role in name.lower()), FAINT)


def _rows(plot: Plot, styled: Sequence[Styled], width: float) -> Figure:
    """One row per name with a bar or a mark per series; values lie on the horizontal axis."""
    names = list(dict.fromkeys(_name(x) for series, *_ in styled for x in series.x))
    disjoint = len(names) == sum(len(series.x) for series, *_ in styled)  # each name is in one series only
    per_row = 1 if disjoint else len(styled)
    height = max(1.0, ROW * per_row + 0.16)
    figure = Figure(figsize=(width, min(40.0, 0.36 * height * len(names) + 1.1)), layout="constrained")
    axes = figure.add_subplot()
    for place, (series, color, marker) in enumerate(styled):
        offset = (place - (per_row - 1) / 2) * 0.82 / per_row if per_row > 1 else 0.0
        _row_series(axes, series, color, marker, {name: row + offset for row, name in enumerate(names)}, per_row)
    levels = [(name, level) for name, level in plot.levels if math.isfinite(level)]
    points = [(y, e) for series, *_ in styled for _, y, e in _values_by_name(series)]
    values = [bound for y, e in points for bound in (y - e, y + e)] + [level for _, level in levels]
    axes.set_yticks(range(len(names)), [clip(clean(name)) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(clean(plot.y_label))
    axes.xaxis.set_major_formatter(formatter(plot.y_label, [y for y, _ in points]))
    if values:
        bars = any(series.kind == "bars" for series, *_ in styled)
        low, high = min(values), max(values)
        low, high = (min(0.0, low), max(0.0, high)) if bars else (low, high)  # the length of a bar is its value
        if is_share(plot.y_label, [y for y, _ in points]):  # wide intervals are cut
            low, high = max(low, 0.0), min(high, 1.0)
        room = 0.06 * (high - low) or 0.1
        axes.set_xlim(low - room * (low < 0 or not bars), high + room)
    for row, (name, level) in enumerate(levels):
        color, (left, right) = level_color(name), axes.get_xlim()
        axes.axvline(level, color=color, lw=1.1, ls=(0, (4, 3)), zorder=4)
        axes.annotate(
            clip(clean(name), MAX_NAME), (level, 1), (0, 3 + 11 * row), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="left" if level < (left + right) / 2 else "right",
            color=TEXT.get(color, color), size=8.5,
        )  # fmt: skip
    frame(axes, "x")
    _legend(axes, styled, width)
    return figure


def _row_series(axes: Axes, series: Series, color: str, marker: str, rows: dict[str, float], per_row: int) -> None:
    points = list(_values_by_name(series))
    places = [rows[name] for name, _, _ in points]
    values = [value for _, value, _ in points]
    if series.kind == "bars":
        axes.barh(places, values, height=0.76 / per_row, color=color, alpha=0.85)
    else:
        axes.plot(values, places, lw=1.2, ms=5.5, **_line(series, color, marker), zorder=3)
    for place, (_, value, error) in zip(places, points, strict=True):
        if error:
            ink = INK if series.kind == "bars" else color
            axes.errorbar(value, place, xerr=error, fmt="none", ecolor=ink, elinewidth=1, capsize=2.5)


def _values_by_name(series: Series) -> Iterator[tuple[str, float, float]]:
    for place, y, error in _values(Series(series.name, list(range(len(series.x))), series.y, series.error), False):
        yield _name(series.x[int(place)]), y, error


def _name(x: Any) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _line(series: Series, color: str, marker: str) -> dict[str, Any]:
    dash = "-" if series.kind == "line" else "none"
    return {"ls": dash, "color": color, "marker": marker, "mec": "white", "mew": 0.7}


def _legend(axes: Axes, styled: Sequence[Styled], width: float) -> None:
    """Names above the plot, as many per line as fit."""
    handles, names = list[Any](), list[str]()
    for series, color, marker in styled:
        if series.name:
            line = Line2D([], [], lw=1.7, ms=5.5, **_line(series, color, marker))
            handles.append(Patch(color=color, alpha=0.85) if series.kind == "bars" else line)
            names.append(clip(clean(series.name), MAX_NAME))
    if names:
        characters = LEGEND_CHARACTERS * width
        columns = max(1, min(len(names), int(characters / (max(map(len, names)) + 7))))
        where: Any = {"loc": "outside upper left", "ncols": columns, "borderaxespad": 0.2}
        axes.figure.legend(handles, names, **where, frameon=False, fontsize=9)


def clean(text: str) -> str:
    """Replace characters that SVG cannot hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def log_ticks(low: float, high: float) -> list[float]:
    """Plain numbers between two values: 1, 2 and 5 of every decade; only the ones if there are many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = LOG_STEPS if high / low < 2e3 else LOG_STEPS[:1]
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1] or [low, high]


def is_share(label: str, values: Sequence[float]) -> bool:
    """Whether the values are fractions that read better in per cent."""
    fractions = bool(values) and min(values) >= 0 and max(values) <= 1
    return fractions and not HAS_UNIT.search(label) and bool(IS_SHARE.search(label))


def formatter(label: str, values: Sequence[float]) -> FuncFormatter:
    """Plain numbers, or shares in per cent."""
    scale, unit = (100, "\u00a0%") if is_share(label, values) else (1, "")
    return FuncFormatter(lambda value, _: f"{scale * value:,.6g}{unit}".replace("-", "−"))


def apart(places: Sequence[float], distance: float) -> list[float]:
    """Move places upwards until neighbours are at least `distance` apart; their order stays."""
    moved = list(places)
    for lower, upper in pairwise(sorted(range(len(moved)), key=moved.__getitem__)):
        moved[upper] = max(moved[upper], moved[lower] + distance)
    return moved

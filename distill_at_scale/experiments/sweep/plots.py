"""The plots of a sweep: accuracy over the keep rate (or another swept key) with its controls, and accuracy over cost.

A plot has at most eight series. Keys that also affect an unpruned run (method, images per class, ...) get a plot for each
value, with controls of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_at_scale.experiments.sweep import analysis
from distill_at_scale.experiments.sweep.analysis import RANKING, SELECTING, Configuration, Recommendation, distilled
from distill_at_scale.experiments.sweep.text import accuracy, label, short
from distill_at_scale.pipeline.report.plot_spec import Kind, Plot, Role, Series
from distill_at_scale.pipeline.report.text import share

RATE = "share of the training samples kept"
TOP1 = "top-1 accuracy"
MOST_SERIES, MOST_CONTROLS = 8, 2
MOST_BARS = 4 * MOST_SERIES
MOST_PLOTS = 24
WIDE = 15  # an axis whose ends differ by this factor is logarithmic
BARS: dict[Any, str] = {"ours": "selected", "random": "random selection", "unpruned": "unpruned", "real": "random real"}
UNITS = ((5400.0, 3600.0, "hours"), (150.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def accuracy_plots(
    configurations: Sequence[Configuration], recommended: Recommendation | None = None
) -> tuple[list[Plot], int]:
    """Plots of accuracy for each network and each value of the facet keys, and the number of plots left out."""
    axis, ours, plots = axis_of(configurations), distilled(configurations), list[Plot]()
    facet_keys, series_keys = _split_keys(configurations, axis) if axis else ([], [])
    networks = list(dict.fromkeys(one.network for one in ours))
    for network in networks:
        facets: dict[str, tuple[dict[str, Any], list[Configuration]]] = {}
        for one in ours:
            if one.network == network and one.control is None:
                facet = {key: one.keys[key] for key in facet_keys} | ({"network": network} if len(networks) > 1 else {})
                facets.setdefault(repr(facet), (facet, []))[1].append(one)
        for facet, group in facets.values():
            controls = [one for one in distilled(configurations, network) if one.control and _fits(one, facet)]
            title = label(facet, short(list(facet))) or "Accuracy"
            if axis is None:
                real = [one for one in configurations if one.set == "random_real" and one.network == network]
                plots += _bar_plots(title, group, controls, real)
            else:
                plots += _line_plots(title, axis, series_keys, group, controls, configurations, recommended)
    return plots[:MOST_PLOTS], max(0, len(plots) - MOST_PLOTS)


def axis_of(configurations: Sequence[Configuration]) -> str | None:
    """The horizontal axis: the keep rate if it is swept, else the first numeric key, else None."""
    keys = varying(configurations)
    if any(key in analysis.KEEP for key in keys):
        return RATE
    for key in keys:
        values = [one.keys[key] for one in _selections(configurations)]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return key
    return None


def varying(configurations: Sequence[Configuration]) -> list[str]:
    """Swept keys with more than one value, controls not counted."""
    tried = _selections(configurations)
    return [key for key in (tried[0].keys if tried else ()) if len({repr(one.keys[key]) for one in tried}) > 1]


def _selections(configurations: Sequence[Configuration]) -> list[Configuration]:
    return [one for one in configurations if one.control is None] or list(configurations)


def _split_keys(configurations: Sequence[Configuration], axis: str) -> tuple[list[str], list[str]]:
    """Keys with a plot for each value (those that affect an unpruned run, then others until the series fit), and the rest."""
    keys = [key for key in varying(configurations) if key != axis and not (axis == RATE and key in analysis.KEEP)]
    facets = [key for key in keys if not key.startswith(SELECTING)]
    series = [key for key in keys if key.startswith(SELECTING)]
    tried = [one for one in configurations if one.control is None]
    for key in sorted(key for key in series if key != "select.criterion"):
        if len({repr([one.keys[k] for k in series]) for one in tried}) <= MOST_SERIES - MOST_CONTROLS:
            break
        series.remove(key)
        facets.append(key)
    return facets, series


def _fits(control: Configuration, facet: Mapping[str, Any]) -> bool:
    """Whether a control belongs to a plot; a key that it leaves open, or that has no effect on it, matches."""
    free = SELECTING if control.control == "unpruned" else RANKING
    return all(control.keys.get(k) in (None, v) for k, v in facet.items() if k != "network" and not k.startswith(free))


def _line_plots(title: str, axis: str, keys: Sequence[str], ours: Sequence[Configuration],
                controls: Sequence[Configuration], configurations: Sequence[Configuration],
                recommended: Recommendation | None) -> list[Plot]:  # fmt: skip
    # the values of a key have the same order in all plots: that of the sweep
    order = {key: list(dict.fromkeys(repr(one.keys[key]) for one in configurations)) for key in keys}
    ours = sorted(ours, key=lambda one: [order[key].index(repr(one.keys[key])) for key in keys])

    def x_of(one: Configuration) -> float:
        return one.rate if axis == RATE else float(one.keys[axis])

    random = [one for one in controls if one.control == "random" and (axis == RATE or one.keys.get(axis) is not None)]
    drawn = _lines(random, [key for key in keys if key not in RANKING], x_of, "random", "random")[:MOST_CONTROLS]
    if axis in ours[0].keys and not axis.startswith(SELECTING):
        unpruned = [one for one in controls if one.control == "unpruned" and one.keys.get(axis) is not None]
        drawn += _lines(unpruned, [], x_of, "unpruned", "unpruned")
    levels, marks = [], []
    if (control := analysis.unpruned_of(ours[0], configurations)) and not any(one.role == "unpruned" for one in drawn):
        levels.append((f"unpruned {accuracy(control.accuracy)}", control.accuracy.mean))
    if real := analysis.unpruned_of(ours[0], configurations, "random_real"):
        levels.append((f"random real {accuracy(real.accuracy)}", real.accuracy.mean))
    if axis == RATE and recommended is not None and recommended.chosen in ours:
        marks.append((f"recommended: {share(recommended.chosen.rate)}", recommended.chosen.rate))
    lines, room, plots = _lines(ours, keys, x_of, "ours"), MOST_SERIES - len(drawn), []
    x_label = axis if axis == RATE else f"{axis.rpartition('.')[2]} ({axis})"
    for start in range(0, len(lines), room):
        series = [*lines[start : start + room], *drawn]
        name = f"{title} ({start // room + 1} of {math.ceil(len(lines) / room)})" if len(lines) > room else title
        log_x = _is_wide([float(x) for one in series for x in one.x])
        plots.append(Plot(name, x_label, TOP1, series, levels, marks, log_x))
    return plots


def _lines(group: Sequence[Configuration], keys: Sequence[str], x_of: Callable[[Configuration], float], role: Role,
           name: str = "") -> list[Series]:  # fmt: skip
    """A line for each combination of `keys`; only the first has the role "ours"."""
    groups, names = dict[str, list[Configuration]](), short(keys)
    for one in group:
        text = label({key: one.keys.get(key) for key in keys}, names)
        groups.setdefault(", ".join(filter(None, (name, text))), []).append(one)
    return [
        _series(text or "selected", members, x_of, "line", "other" if number and role == "ours" else role)
        for number, (text, members) in enumerate(groups.items())
    ]


def _series(name: str, group: Sequence[Configuration], x_of: Callable[[Configuration], float],
            kind: Kind, role: Role) -> Series:  # fmt: skip
    group = sorted(group, key=x_of)
    error = [one.accuracy.std for one in group] if kind == "line" else None
    return Series(name, [x_of(one) for one in group], [one.accuracy.mean for one in group], error, kind, role)


def _bar_plots(title: str, ours: Sequence[Configuration], controls: Sequence[Configuration],
               real: Sequence[Configuration]) -> list[Plot]:  # fmt: skip
    """For a sweep without a numeric key: a bar for each configuration and each of its controls."""
    keys = varying(ours)
    names = short(keys)

    def name(one: Configuration, free: tuple[str, ...]) -> str:
        return label({k: one.keys[k] for k in keys if not k.startswith(free)}, names)

    rows = [(name(one, ("-",)) or "selected", one.accuracy, "ours") for one in ours]
    for one in [*controls, *real]:
        kind = "real" if one in real else str(one.control)
        rows.append((name(one, SELECTING if one.control == "unpruned" else RANKING) or kind, one.accuracy, kind))
    plots = []
    for start in range(0, len(rows), MOST_BARS):
        series = []
        for kind, legend in BARS.items():
            if bars := [(text, bar) for text, bar, of in rows[start : start + MOST_BARS] if of == kind]:
                x, y, error = [text for text, _ in bars], [bar.mean for _, bar in bars], [bar.std for _, bar in bars]
                series.append(Series(legend, x, y, error, "bars", "other" if kind == "real" else kind))
        plots.append(Plot(title, "", TOP1, series))
    return plots


def cost_plot(configurations: Sequence[Configuration]) -> Plot:
    """Accuracy over the cost of one distillation, with the Pareto front; for one network."""
    longest = max((one.cost for one in configurations), default=0.0)
    scale, unit = next((scale, unit) for limit, scale, unit in UNITS if longest >= limit)
    by_control = {name: [one for one in configurations if one.control == name] for name in (None, "random", "unpruned")}
    front = analysis.pareto(configurations)
    others = [one for one in by_control[None] if one not in front]
    parts: list[tuple[str, list[Configuration], Kind, Role]] = [
        ("Pareto front", front, "line", "ours"),
        ("other configurations", others, "points", "other"),
        ("random selection", by_control["random"], "points", "random"),
        ("unpruned", by_control["unpruned"], "points", "unpruned"),
    ]
    series = [_series(name, group, lambda c: c.cost / scale, kind, role) for name, group, kind, role in parts if group]
    x_label = f"cost of one distillation in {unit}, all of scoring included"
    return Plot("Accuracy and cost", x_label, TOP1, series, log_x=_is_wide([c.cost or 1e-3 for c in configurations]))


def _is_wide(xs: Sequence[float]) -> bool:
    return min(xs) > 0 and max(xs) >= WIDE * min(xs)

"""The plots of a sweep: accuracy over the keep rate (or what else was swept) with its controls, and accuracy over cost.

A plot holds at most eight series; keys that also matter without pruning (method, images per class, ...) get plots of
their own, each with its own controls. Left out: how plots are drawn (`pipeline/report/charts.py`) and the figures in them (`analysis.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distill_at_scale.experiments.sweep.analysis import (
    KEEP,
    RANKING,
    SELECTING,
    Configuration,
    Recommendation,
    distilled,
    pareto,
    unpruned_of,
)
from distill_at_scale.experiments.sweep.text import accuracy, label, short
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pipeline.report.text import share

RATE = "share of the training samples kept"
TOP1 = "top-1 accuracy on the test split"
MOST_SERIES, MOST_CONTROLS = 8, 2
MOST_PLOTS = 24
WIDE = 15  # ends of an axis that are so many times apart are shown on a logarithmic one
BARS = {"ours": "selected", "random": "random selection", "unpruned": "unpruned", "real": "random real"}
UNITS = ((5400.0, 3600.0, "hours"), (150.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))

Group = tuple[dict[str, Any], list[Configuration]]


def curves(found: Sequence[Configuration], recommended: Recommendation | None = None) -> tuple[list[Plot], int]:
    """Plots of accuracy, and how many more there would be."""
    plots = [plot for group in _facets(found) for plot in _plots(*group, found, recommended)]
    return plots[:MOST_PLOTS], max(0, len(plots) - MOST_PLOTS)


def axis_of(found: Sequence[Configuration]) -> str | None:
    """What accuracy is plotted over: the keep rate where it is swept, else the first numeric key, else None."""
    tried = [one for one in found if one.control is None] or list(found)
    keys = list(tried[0].keys) if tried else []
    if any(len({repr(one.keys[key]) for one in tried}) > 1 for key in KEEP if key in keys):
        return RATE
    return next((key for key in keys if _numeric([one.keys[key] for one in tried])), None)


def _numeric(values: Sequence[Any]) -> bool:
    return len(set(map(repr, values))) > 1 and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    )


def varying(found: Sequence[Configuration]) -> list[str]:
    """Swept keys with more than one value among what is not a control."""
    tried = [one for one in found if one.control is None] or list(found)
    keys = list(tried[0].keys) if tried else []
    return [key for key in keys if len({repr(one.keys[key]) for one in tried}) > 1]


def _facets(found: Sequence[Configuration]) -> Iterator[Group]:
    """By network and by the keys that an unpruned run has too, but what is on the x axis."""
    axis, ours = axis_of(found), distilled(found)
    keys = _apart(found, axis) if axis else []
    networks = list(dict.fromkeys(one.network for one in ours))
    for network in networks:
        groups: dict[str, Group] = {}
        for one in (one for one in ours if one.network == network and one.control is None):
            own = {key: one.keys[key] for key in keys} | ({"network": network} if len(networks) > 1 else {})
            groups.setdefault(repr(own), (own, []))[1].append(one)
        yield from groups.values()


def _apart(found: Sequence[Configuration], axis: str | None) -> list[str]:
    """Keys whose values get plots of their own: those of unpruned runs, then others until the series of a plot fit."""
    every = [key for key in varying(found) if key != axis and not (axis == RATE and key in KEEP)]
    own = [key for key in every if not key.startswith(SELECTING)]
    rest = [key for key in every if key.startswith(SELECTING)]
    ordered = sorted(key for key in rest if key != "select.criterion")
    while axis and ordered and _combinations(found, rest) > MOST_SERIES - MOST_CONTROLS:
        rest.remove(last := ordered.pop(0))
        own.append(last)
    return own


def _combinations(found: Sequence[Configuration], keys: Sequence[str]) -> int:
    return len({repr([one.keys[key] for key in keys]) for one in found if one.control is None})


def _plots(own: dict[str, Any], ours: Sequence[Configuration], found: Sequence[Configuration],
           recommended: Recommendation | None) -> Iterator[Plot]:  # fmt: skip
    axis = axis_of(found)
    controls = [one for one in distilled(found, ours[0].network) if one.control and fits(one, own)]
    title = label(own, short(list(own))) or "Accuracy"
    if axis is None:
        yield from _bars(
            title, ours, controls, [o for o in found if o.set == "random_real" and o.network == ours[0].network]
        )
        return
    apart = [key for key in varying(found) if key not in (*own, axis) and not (axis == RATE and key in KEEP)]
    ours = in_order(ours, apart, found)
    place = (lambda one: one.rate) if axis == RATE else (lambda one: float(one.keys[axis]))
    lines = _lines(ours, apart, place, "ours")
    drawn = [one for one in controls if one.control == "random" and (axis == RATE or one.keys.get(axis) is not None)]
    drawn_apart = [key for key in apart if key not in RANKING]
    lines_at_random = _lines(drawn, drawn_apart, place, "random", "random")[:MOST_CONTROLS]
    lines_unpruned = []
    if axis in ours[0].keys and not axis.startswith(SELECTING):
        whole = [one for one in controls if one.control == "unpruned" and one.keys.get(axis) is not None]
        lines_unpruned = _lines(whole, [], place, "unpruned", "unpruned")
    levels = _levels(ours[0], found, bool(lines_unpruned))
    marks = _mark(ours, recommended) if axis == RATE else []
    room = MOST_SERIES - len(lines_at_random) - len(lines_unpruned)
    parts = math.ceil(len(lines) / room)
    for part in range(parts):
        series = [*lines[part * room : (part + 1) * room], *lines_at_random, *lines_unpruned]
        xs = [float(x) for one in series for x in one.x]
        name = f"{title} ({part + 1} of {parts})" if parts > 1 else title
        x_label = axis if axis == RATE else f"{axis.rpartition('.')[2]} ({axis})"
        yield Plot(name, x_label, TOP1, series, levels, marks, _wide(xs))


def fits(control: Configuration, own: Mapping[str, Any]) -> bool:
    """Whether a control belongs to a plot; a key that it leaves open, or that is no matter to it, fits."""
    free = SELECTING if control.control == "unpruned" else RANKING
    return all(control.keys.get(k) in (None, v) for k, v in own.items() if k != "network" and not k.startswith(free))


def _lines(found: Sequence[Configuration], apart: Sequence[str], place: Callable[[Configuration], float], role: Any,
           name: str = "") -> list[Series]:  # fmt: skip
    """A line per combination of the keys in `apart`; only the first has the role "ours"."""
    groups: dict[str, list[Configuration]] = {}
    names = short(apart)
    for one in found:
        text = label({key: one.keys.get(key) for key in apart}, names)
        groups.setdefault(", ".join(filter(None, (name, text))), []).append(one)
    lines = []
    for number, (text, group) in enumerate(groups.items()):
        ordered = sorted(group, key=place)
        own: Any = role if number == 0 or role != "ours" else "other"
        x, y = [place(one) for one in ordered], [one.accuracy.mean for one in ordered]
        lines.append(Series(text or "selected", x, y, [one.accuracy.std for one in ordered], "line", own))
    return lines


def in_order(ours: Sequence[Configuration], keys: Sequence[str], found: Sequence[Configuration]) -> list[Configuration]:
    """In the order in which the values of keys appear in the whole sweep, the same in all plots."""
    order = {key: list(dict.fromkeys(repr(one.keys[key]) for one in found)) for key in keys}
    return sorted(ours, key=lambda one: [order[key].index(repr(one.keys[key])) for key in keys])


def _levels(one: Configuration, found: Sequence[Configuration], drawn: bool) -> list[tuple[str, float]]:
    whole = unpruned_of(one, found)
    level = [(f"unpruned {accuracy(whole.accuracy)}", whole.accuracy.mean)] if whole and not drawn else []
    return level + _real(one, found)


def _real(one: Configuration, found: Sequence[Configuration]) -> list[tuple[str, float]]:
    real = unpruned_of(one, found, "random_real")
    return [(f"random real {accuracy(real.accuracy)}", real.accuracy.mean)] if real else []


def _mark(ours: Sequence[Configuration], recommended: Recommendation | None) -> list[tuple[str, float]]:
    if recommended is None or recommended.chosen not in ours:
        return []
    return [(f"recommended: {share(recommended.chosen.rate)}", recommended.chosen.rate)]


def _bars(title: str, ours: Sequence[Configuration], controls: Sequence[Configuration],
          real: Sequence[Configuration]) -> Iterator[Plot]:  # fmt: skip
    """Where nothing numeric was swept: a bar per configuration, and one per control of its setting."""
    apart = varying(ours)
    names = short(apart)

    def named(one: Configuration, free: tuple[str, ...]) -> str:
        return label({k: one.keys[k] for k in apart if not k.startswith(free)}, names)

    rows = [(named(one, ("-",)) or "selected", one, "ours") for one in ours]
    for one in [*controls, *real]:
        role = "real" if one in real else one.control
        rows.append((named(one, SELECTING if one.control == "unpruned" else RANKING) or str(role), one, str(role)))
    for start in range(0, len(rows), 4 * MOST_SERIES):
        part = rows[start : start + 4 * MOST_SERIES]
        series = []
        for kind, name in BARS.items():
            role = "other" if kind == "real" else kind
            own = [(text, one.accuracy) for text, one, of in part if of == kind]
            if own:
                x, y, error = [text for text, _ in own], [a.mean for _, a in own], [a.std for _, a in own]
                series.append(Series(name, x, y, error, "bars", role))  # type: ignore[arg-type]
        yield Plot(title, "", TOP1, series)


def _wide(xs: Sequence[float]) -> bool:
    return min(xs) > 0 and max(xs) >= WIDE * min(xs)


def costs(found: Sequence[Configuration]) -> Plot:
    """Accuracy over the cost of one distillation, with the Pareto front; of one network."""
    scale, unit = unit_of([one.cost for one in found])
    front = pareto(found)
    rest = [one for one in found if one.control is None and one not in front]
    parts = [
        ("Pareto front", front, "line", "ours"),
        ("other configurations", rest, "points", "other"),
        ("random selection", [one for one in found if one.control == "random"], "points", "random"),
        ("unpruned", [one for one in found if one.control == "unpruned"], "points", "unpruned"),
    ]
    series = [_cloud(name, group, kind, role, scale) for name, group, kind, role in parts if group]
    x_label = f"cost of one distillation in {unit}, all of scoring included"
    return Plot("Accuracy and cost", x_label, TOP1, series, log_x=_wide([one.cost or 1e-3 for one in found]))


def _cloud(name: str, found: Sequence[Configuration], kind: Any, role: Any, scale: float) -> Series:
    ordered = sorted(found, key=lambda one: one.cost)
    error = [one.accuracy.std for one in ordered] if kind == "line" else None
    return Series(
        name, [one.cost / scale for one in ordered], [one.accuracy.mean for one in ordered], error, kind, role
    )


def unit_of(seconds: Sequence[float]) -> tuple[float, str]:
    """Seconds in a unit, and its name, that suits the longest time."""
    longest = max(seconds, default=0.0)
    return next((scale, name) for limit, scale, name in UNITS if longest >= limit)

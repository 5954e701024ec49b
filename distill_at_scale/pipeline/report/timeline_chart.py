"""The report's chart of who worked when, as an SVG data URI, and the sentence above it.

A lane for every worker process while they are few; else a lane for every host, and of very many hosts one for several, in
which the height says how many of its workers were busy. The first lane is the driver with its stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distill_at_scale.pipeline.monitoring.timeline import TimelineEntry
from distill_at_scale.pipeline.monitoring.utilization import Utilization, Worker, WorkSpan, account
from distill_at_scale.pipeline.report.style import INK, LINE, STYLE, clean, figure_of, svg
from distill_at_scale.pipeline.report.text import NBSP, duration

COLORS = {
    "ingest": "#5b8c5a",
    "score": "#d9962b",
    "select": "#8b97a8",
    "distill": "#2f5fd0",
    "evaluate": "#a4508b",
    "report": "#66717f",
}
OTHER, WAITING, LOST = "#8b97a8", "#c9bd94", "#c2483d"
LANES = 24  # at most, beside the driver's
LEAST = 0.005  # of the time; less is not spoken of
BINS = 240  # of the time, in lanes of many workers
LANE, EDGES = 0.27, 0.75  # inches
UNITS = ((300, 1, "seconds"), (5 * 3600, 60, "minutes"), (float("inf"), 3600, "hours"))  # up to so many seconds


@dataclass(frozen=True)
class Lane:
    name: str
    workers: Sequence[Worker]


def part(entries: Sequence[TimelineEntry]) -> dict[str, Any] | None:
    """What the page shows of a timeline; None where there is nothing."""
    found = account(entries)
    if found is None:
        return None
    return {"chart": chart(found), "sentence": sentence(found), "legend": legend(found)}


def lanes(workers: Sequence[Worker]) -> list[Lane]:
    """Workers, hosts, or groups of hosts, whatever fits."""
    hosts: dict[str, list[Worker]] = {}
    for worker in workers:
        hosts.setdefault(worker.host, []).append(worker)
    if len(workers) <= LANES:
        return [Lane(f"{host} · {worker.pid}", [worker]) for host, members in hosts.items() for worker in members]
    size = -(-len(hosts) // LANES)
    parts = [list(hosts)[i : i + size] for i in range(0, len(hosts), size)]
    return [Lane(_named(part, hosts), [worker for host in part for worker in hosts[host]]) for part in parts]


def chart(found: Utilization) -> str:
    """The same account gives the same bytes."""
    shown = lanes(found.workers)
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(LANE * (1 + len(shown)) + EDGES)
        _driver(axes, found)
        for row, lane in enumerate(shown, 1):
            _lane(axes, row, lane, found.seconds)
        for start in found.starts[1:]:
            axes.axvline(start, color=INK, lw=0.9, ls=(0, (3, 3)))
        clean(axes, [(0, "driver"), *((row, lane.name) for row, lane in enumerate(shown, 1))])
        axes.set_ylim(len(shown) + 0.6, -0.6)
        _time(axes, found.seconds, "  (dashed: another command goes on)" if found.starts[1:] else "")
        return svg(figure)


def legend(found: Utilization) -> list[tuple[str, str]]:
    """Names and colours of what the chart shows."""
    seen = {bar.stage for bar in found.stages}
    shown = [(name, color) for name, color in COLORS.items() if name in seen]
    return shown + ([("starting Ray", WAITING)] if found.waited >= LEAST * found.seconds else [])


def sentence(found: Utilization) -> str:
    """What the time went to."""
    rest = max(0.0, found.seconds - found.busy - found.waited)
    commands = f" in {len(found.starts)} commands" if len(found.starts) > 1 else ""
    parts = [f"some worker was busy for {_percent(found.busy / found.seconds)} of it"]
    if found.waited >= LEAST * found.seconds:
        parts.append(f"{_percent(found.waited / found.seconds)} went to starting Ray")
    parts.append(f"in {_percent(rest / found.seconds)} workers were starting or only the driver worked")
    lost = len(found.losses)
    told = (
        f" Workers were lost {'once' if lost == 1 else f'{lost} times'} (crosses), and their work was done again."
        if lost
        else ""
    )
    return f"Of {duration(found.seconds)}{commands}, {', '.join(parts[:-1])}, and {parts[-1]}.{told}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f}{NBSP}%"


def _named(part: Sequence[str], hosts: dict[str, list[Worker]]) -> str:
    count = sum(len(hosts[host]) for host in part)
    name = part[0] if len(part) == 1 else f"{part[0]} +{len(part) - 1}"
    return f"{name} ({count}{NBSP}workers)" if count > 1 else name


def _driver(axes: Axes, found: Utilization) -> None:
    for bar in found.stages:
        _spans(axes, 0, [bar], COLORS.get(bar.stage, OTHER), 0.45)
    _spans(axes, 0, found.waits, WAITING)
    axes.scatter(found.losses, [0] * len(found.losses), marker="x", color=LOST, s=26, lw=1.6, zorder=4)


def _time(axes: Axes, seconds: float, remark: str) -> None:
    """The horizontal axis in a unit that suits."""
    scale, unit = next((scale, unit) for most, scale, unit in UNITS if seconds < most)
    ticks = MaxNLocator(8).tick_values(0, seconds / scale)
    axes.set_xticks([scale * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, seconds)
    axes.set_xlabel(f"{unit} since the start{remark}")


def _spans(axes: Axes, row: int, bars: Sequence[WorkSpan], color: str, alpha: float = 1) -> None:
    spans: Any = [(bar.began, bar.seconds) for bar in bars]
    axes.broken_barh(spans, (row - 0.36, 0.72), facecolor=color, alpha=alpha, lw=0)


def _lane(axes: Axes, row: int, lane: Lane, seconds: float) -> None:
    axes.axhline(row + 0.36, color=LINE, lw=0.6, zorder=0)
    stages = list(dict.fromkeys(bar.stage for worker in lane.workers for bar in worker.bars))
    for stage in stages:
        bars = [bar for worker in lane.workers for bar in worker.bars if bar.stage == stage]
        color = COLORS.get(stage, OTHER)
        if len(lane.workers) == 1:
            _spans(axes, row, bars, color)
        else:
            edges = np.linspace(0, seconds, BINS + 1)
            height = 0.72 * np.minimum(1, _busy(bars, edges) / len(lane.workers))
            axes.stairs(row + 0.36 - height, edges, baseline=row + 0.36, fill=True, color=color)


def _busy(bars: Sequence[WorkSpan], edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean number of busy workers in every bin."""
    found = np.zeros(len(edges) - 1)
    for bar in bars:
        found += np.clip(np.minimum(bar.ended, edges[1:]) - np.maximum(bar.began, edges[:-1]), 0, None)
    return found / (edges[1] - edges[0])

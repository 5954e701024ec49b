"""The report's chart of worker activity over time, as an SVG data URI, and the sentence above it.

The first lane is the driver with its stages. Below it each worker process has a lane; with more than `LANES` processes each
host, or group of hosts, has one, and the height shows how many of its workers were busy.
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
from distill_at_scale.pipeline.monitoring.utilization import Utilization, WorkerUtilization, WorkSpan, account
from distill_at_scale.pipeline.report.style import INK, LINE, NARROW, STYLE, WIDTH, figure_of, name_rows, svg
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
LANES = 24  # at most, without the driver's
MIN_SHARE = 0.005  # of the time; a smaller part is not mentioned
BINS = 240  # of the time, in lanes of several workers
LANE, EDGES = 0.27, 0.75  # inches
UNITS = ((300, 1, "seconds"), (5 * 3600, 60, "minutes"), (float("inf"), 3600, "hours"))  # limit in seconds, scale, name


@dataclass(frozen=True)
class Lane:
    name: str
    workers: Sequence[WorkerUtilization]


def part(entries: Sequence[TimelineEntry]) -> dict[str, Any] | None:
    """The template's values: `chart`, `sentence` and `legend`. None if the timeline is empty."""
    if (usage := account(entries)) is None:
        return None
    stages = {span.stage for span in usage.stages}
    legend = [(name, color) for name, color in COLORS.items() if name in stages]
    if usage.waited >= MIN_SHARE * usage.seconds:
        legend.append(("starting Ray", WAITING))
    charts = {"wide": chart(usage), "narrow": chart(usage, NARROW)}
    return {"chart": charts, "sentence": sentence(usage), "legend": legend}


def lanes(workers: Sequence[WorkerUtilization]) -> list[Lane]:
    """One lane per worker, per host, or per group of hosts, whichever gives at most `LANES`."""
    hosts: dict[str, list[WorkerUtilization]] = {}
    for worker in workers:
        hosts.setdefault(worker.host, []).append(worker)
    if len(workers) <= LANES:
        return [Lane(f"{host} · {worker.pid}", [worker]) for host, members in hosts.items() for worker in members]
    names, size, result = list(hosts), -(-len(hosts) // LANES), []
    for start in range(0, len(names), size):
        group = names[start : start + size]
        members = [worker for host in group for worker in hosts[host]]
        name = group[0] if len(group) == 1 else f"{group[0]} +{len(group) - 1}"
        result.append(Lane(f"{name} ({len(members)}{NBSP}workers)" if len(members) > 1 else name, members))
    return result


def chart(usage: Utilization, width: float = WIDTH) -> str:
    """A data URI; the same utilization gives the same bytes."""
    rows = lanes(usage.workers)
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(LANE * (1 + len(rows)) + EDGES, width)
        for span in usage.stages:
            _spans(axes, 0, [span], COLORS.get(span.stage, OTHER), 0.45)
        _spans(axes, 0, usage.waits, WAITING)
        axes.scatter(usage.losses, [0] * len(usage.losses), marker="x", color=LOST, s=26, lw=1.6, zorder=4)
        edges = np.linspace(0, usage.seconds, BINS + 1)
        for row, lane in enumerate(rows, 1):
            axes.axhline(row + 0.36, color=LINE, lw=0.6, zorder=0)
            spans = [span for worker in lane.workers for span in worker.spans]
            for stage in dict.fromkeys(span.stage for span in spans):
                own, color = [span for span in spans if span.stage == stage], COLORS.get(stage, OTHER)
                if len(lane.workers) == 1:
                    _spans(axes, row, own, color)
                    continue
                busy = np.zeros(BINS)  # seconds of work of all workers, per time bin
                for span in own:
                    busy += np.clip(np.minimum(span.ended, edges[1:]) - np.maximum(span.began, edges[:-1]), 0, None)
                height = 0.72 * np.minimum(1, busy / (edges[1] - edges[0]) / len(lane.workers))
                axes.stairs(row + 0.36 - height, edges, baseline=row + 0.36, fill=True, color=color)
        for start in usage.starts[1:]:
            axes.axvline(start, color=INK, lw=0.9, ls=(0, (3, 3)))
        name_rows(axes, [(0, "driver"), *((row, lane.name) for row, lane in enumerate(rows, 1))])
        axes.set_ylim(len(rows) + 0.6, -0.6)
        scale, unit = next((scale, unit) for limit, scale, unit in UNITS if usage.seconds < limit)
        ticks = MaxNLocator(8).tick_values(0, usage.seconds / scale)
        axes.set_xticks([scale * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        axes.set_xlim(0, usage.seconds)
        remark = "  (dashed: another command resumes)" if usage.starts[1:] else ""
        axes.set_xlabel(f"{unit} since the start{remark}")
        return svg(figure)


def sentence(usage: Utilization) -> str:
    """How the time divides into work, start-up and the rest."""

    def percent(seconds: float) -> str:
        return f"{100 * seconds / usage.seconds:.0f}{NBSP}%"

    commands = f" in {len(usage.starts)} commands" if len(usage.starts) > 1 else ""
    parts = [f"at least one worker was busy for {percent(usage.busy)}"]
    if usage.waited >= MIN_SHARE * usage.seconds:
        parts.append(f"Ray was starting for {percent(usage.waited)}")
    rest = max(0.0, usage.seconds - usage.busy - usage.waited)
    parts.append(f"for {percent(rest)} workers were starting or only the driver worked")
    times = "once" if len(usage.losses) == 1 else f"{len(usage.losses)} times"
    losses = f" Workers were lost {times} (crosses); their work was repeated." if usage.losses else ""
    return f"Of {duration(usage.seconds)}{commands}, {', '.join(parts[:-1])}, and {parts[-1]}.{losses}"


def _spans(axes: Axes, row: int, spans: Sequence[WorkSpan], color: str, alpha: float = 1) -> None:
    bars: Any = [(span.began, span.seconds) for span in spans]
    axes.broken_barh(bars, (row - 0.36, 0.72), facecolor=color, alpha=alpha, lw=0)

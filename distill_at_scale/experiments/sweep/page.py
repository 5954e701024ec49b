"""The page of a sweep: `sweep.html`, one file that opens offline, made of the sweep's table and nothing else.

This file puts together what `analysis.py` finds, `experiments/sweep/text.py` says and `experiments/sweep/plots.py` plots. Left out: running trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_at_scale.config.fields import flatten
from distill_at_scale.config.load import Config
from distill_at_scale.experiments.sweep import analysis
from distill_at_scale.experiments.sweep import plots as curves
from distill_at_scale.experiments.sweep import text as answers
from distill_at_scale.experiments.sweep.analysis import Configuration, Recommendation
from distill_at_scale.pipeline.report import charts
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report.plot_spec import Plot
from distill_at_scale.pipeline.report.text import points

LISTED = 30  # configurations that are listed at once; the rest on demand
FIRST_PLOTS = 6  # that are shown at once
MOST_CONTEXTS = 24
OTHER_TESTS = ("data.", "evaluate.")  # keys under which accuracies are of other tests: nothing is best of all then
LONGEST_ERROR = 400  # characters


def write(folder: Path, table: pa.Table, config: Config) -> Path:
    """Write `sweep.html` into a sweep's folder from its table (the columns of `sweep.parquet`), in one step."""
    return pages.write(Path(folder) / "sweep.html", "sweep.html.j2", contents(table.to_pylist(), config))


def contents(rows: Sequence[analysis.Row], config: Config) -> dict[str, Any]:
    """Everything that the page shows."""
    found = analysis.configurations(rows, flatten(config))
    network = next((one.network for one in found), "")
    ours = analysis.distilled(found, network)
    comparable = not any(key.startswith(OTHER_TESTS) for key in analysis.swept(rows))
    best = analysis.recommend(ours) if comparable else None
    shared = analysis.recommend(ours, shared=True) if comparable else None
    plots, more = curves.curves(found, best)
    names = answers.short(analysis.swept(rows))
    return {
        "name": pages.name_of(config.data.path, config.data.source),
        "detail": detail(rows, found),
        "answer": answers.headline(best, shared) if best else None,
        "reasons": answers.reasons(best, shared) if best else [],
        "contexts": _contexts(ours),
        "network": network if len({one.network for one in found}) > 1 else "",
        "plots": [drawn(plot) for plot in plots],
        "more_plots": more,
        "over_keep": curves.axis_of(found) == curves.RATE,
        "front": drawn(curves.costs(ours)) if ours else None,
        "times": _times(ours),
        "devices": _devices(config),
        "side_by_side": config.sweep.concurrent != 1 and config.cluster.address != "none",
        "parted": any(row.get("score_seconds") is not None for row in rows),
        "names": names,
        "table": _table(found, ours, best, list(names)),
        "listed": LISTED,
        "first_plots": FIRST_PLOTS,
        "failed": _failed(rows),
        "stopped": _stopped(rows, list(names)),
        "settings": pages.settings(config),
    }


def drawn(plot: Plot) -> dict[str, str]:
    """A plot as the templates want it."""
    names = ", ".join(series.name for series in plot.series if series.name)
    return {"title": plot.title, "chart": charts.draw(plot), "alt": f"{plot.y_label} over {plot.x_label}: {names}"}


def detail(rows: Sequence[analysis.Row], found: Sequence[Configuration]) -> str:
    """How much was tried, in a line."""
    keys, trials = analysis.swept(rows), {row["trial"] for row in rows}
    tried = len({repr(sorted(one.keys.items())) + str(one.control) for one in found if one.set == "distilled"})
    over = f" over {', '.join(keys)}" if keys else ""
    return (
        f"Sweep{over}: {tried:,} {'configuration' if tried == 1 else 'configurations'} in {len(trials):,} "
        f"{'trial' if len(trials) == 1 else 'trials'}"
    )


def _contexts(ours: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The recommendation for each combination of keys that is not about pruning, where there are several."""
    groups: dict[str, list[Configuration]] = {}
    for one in ours:
        groups.setdefault(repr(analysis.context(one)), []).append(one)
    if len(groups) < 2 or len(groups) > MOST_CONTEXTS:
        return []
    found = []
    for group in groups.values():
        best, own = analysis.recommend(group), analysis.context(group[0])
        if best and any(one.control is None for one in group):
            name = answers.label(own, answers.short(list(own)))
            found.append({"name": name, "answer": answers.headline(best, named=False), "found": _compared(best)})
    return found


def _times(ours: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Net times of what prunes by a criterion and is on the Pareto front without the random control, or recommended."""
    front = [one for one in analysis.pareto([o for o in ours if o.control != "random"]) if one.control is None]
    for best in (analysis.recommend(ours), analysis.recommend(ours, shared=True)):
        if best and best.chosen.control is None and best.chosen not in front:
            front.append(best.chosen)
    compared = [(one, analysis.compare(one, ours)) for one in sorted(front, key=lambda one: one.cost)]
    return [{"name": answers.describe(one), "one": one, "found": found} for one, found in compared if found.unpruned]


def _devices(config: Config) -> dict[str, Any]:
    """What an hour of a trial takes: GPUs where workers have some, else workers."""
    workers = config.distill.max_workers
    gpus = workers * config.cluster.gpus_per_worker
    return {"count": gpus, "name": "GPU"} if gpus else {"count": workers, "name": "Worker"}


def _table(found: Sequence[Configuration], ours: Sequence[Configuration], best: Recommendation | None,
           keys: Sequence[str]) -> list[dict[str, Any]]:  # fmt: skip
    """All configurations, with the controls, the most accurate first."""
    front = analysis.pareto(ours)
    ordered = sorted(found, key=lambda one: -one.accuracy.mean)
    return [
        {
            "one": one,
            "values": [answers.value(one.keys.get(key)) for key in keys],
            "accuracy": answers.accuracy(one.accuracy),
            "n": answers.size(one.accuracy),
            "what": _what(one),
            "kept": one.kept if one.set == "distilled" else None,
            "front": one in front,
            "recommended": best is not None and one is best.chosen,
            **_compared(analysis.compare(one, found)),
        }
        for one in ordered
    ]


def _what(one: Configuration) -> str:
    if one.set != "distilled":
        return "random real" if one.set == "random_real" else one.set
    return one.control or ""


def _compared(found: Recommendation) -> dict[str, Any]:
    pairs = (("random", found.over_random), ("unpruned", found.over_unpruned))
    if found.chosen.set != "distilled":
        return {"over_random": None, "over_unpruned": None, "saved": None}
    texts = {f"over_{name}": _interval(over) if over else None for name, over in pairs}
    return {**texts, "saved": found.saved if found.chosen.control != "unpruned" else None}


def _interval(over: analysis.AccuracyDifference) -> dict[str, str]:
    low, high = points(over.low), points(over.high)
    return {"value": points(over.value), "interval": f"{low} to {high}", "verdict": over.verdict}


def _failed(rows: Sequence[analysis.Row]) -> list[dict[str, str]]:
    listed = {row["trial"]: row for row in rows if row.get("error") is not None}
    keys = analysis.swept(rows)
    names = answers.short(keys)
    return [
        {
            "trial": str(trial),
            "name": answers.label({key: row.get(key) for key in keys}, names) or str(row.get("control") or ""),
            "error": str(pages.public(row["error"]))[:LONGEST_ERROR],
        }
        for trial, row in listed.items()
    ]


def _stopped(rows: Sequence[analysis.Row], keys: Sequence[str]) -> list[dict[str, Any]]:
    listed = {row["trial"]: row for row in rows if row.get("stopped") is not None and row.get("error") is None}
    names = answers.short(keys)
    found = [
        {
            "name": answers.label({key: row.get(key) for key in keys}, names),
            "step": int(row["stopped"]),
            "mean": row.get("mean"),
        }
        for row in listed.values()
    ]
    return sorted(found, key=lambda row: -(row["mean"] or 0))

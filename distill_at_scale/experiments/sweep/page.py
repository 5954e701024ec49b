"""Writes `sweep.html`, the page of a sweep: one file that opens offline, made only from the sweep's table.

`analysis.py` computes the results, `text.py` words them, `plots.py` defines the plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_at_scale.config.fields import flatten
from distill_at_scale.config.load import Config
from distill_at_scale.distillation.summary import TESTED
from distill_at_scale.experiments.sweep import analysis, plots, text
from distill_at_scale.experiments.sweep.analysis import Configuration, Recommendation, Row
from distill_at_scale.pipeline.report import charts
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report.text import ONE_DISTILLATION, points
from distill_at_scale.storage.filesystem import last_name

LISTED = 30  # configurations in the open table; the others are folded
FIRST_PLOTS = 6  # plots that are not folded
MOST_CONTEXTS = 24
OTHER_TESTS = ("data.", "evaluate.")  # keys that change the test: accuracies are then not comparable
LONGEST_ERROR = 400  # characters


def write(folder: Path, table: pa.Table, config: Config) -> Path:
    """Write `sweep.html` into a sweep's folder from its table (the columns of `sweep.parquet`), atomically."""
    return pages.write(Path(folder) / "sweep.html", "sweep.html.j2", contents(table.to_pylist(), config))


def contents(rows: Sequence[Row], config: Config) -> dict[str, Any]:
    """The variables of the template."""
    configurations, keys = analysis.configurations(rows, flatten(config)), analysis.swept(rows)
    network = next((one.network for one in configurations), "")
    ours = analysis.distilled(configurations, network)
    comparable = not any(key.startswith(OTHER_TESTS) for key in keys)
    best = analysis.recommend(ours) if comparable else None
    shared = analysis.recommend(ours, shared=True) if comparable else None
    shown, omitted = plots.accuracy_plots(configurations, best)
    trials, over = len({row["trial"] for row in rows}), f" over {', '.join(keys)}" if keys else ""
    tried = len({repr(sorted(c.keys.items())) + str(c.control) for c in configurations if c.set == "distilled"})
    workers, networks = config.distill.max_workers, {one.network for one in configurations}
    gpus = workers * config.cluster.gpus_per_worker
    tried_text = f"{tried:,} {'configuration' if tried == 1 else 'configurations'}"
    return {
        "name": last_name(config.data.path or "") or config.data.source,
        "detail": f"Sweep{over}: {tried_text} in {trials:,} {'trial' if trials == 1 else 'trials'}",
        "answer": text.headline(best, shared) if best else None,
        "reasons": text.reasons(best, shared) if best else [],
        "contexts": _contexts(ours),
        "tested": TESTED[config.evaluate.split],
        "network": network if len(networks) > 1 else "",
        "plots": [charts.picture(plot) for plot in shown], "more_plots": omitted,
        "over_keep": plots.axis_of(configurations) == plots.RATE,
        "front": charts.picture(plots.cost_plot(ours)) if ours else None,
        "times": _times(ours),
        # what an hour of a trial takes
        "devices": {"count": gpus, "name": "GPU"} if gpus else {"count": workers, "name": "Worker"},
        "side_by_side": config.sweep.concurrent != 1 and config.cluster.address != "none",
        "parted": any(row.get("score_seconds") is not None for row in rows),
        "names": text.short(keys), "table": _table(configurations, ours, best, keys),
        "single": ONE_DISTILLATION if max((len(one.accuracy.means) for one in ours), default=0) == 1 else "",
        "listed": LISTED, "first_plots": FIRST_PLOTS,
        **_unfinished(rows, keys),
        "settings": pages.as_yaml(config.model_dump()),
    }  # fmt: skip


def _contexts(ours: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The recommendation for each combination of the keys that also affect an unpruned run, if there are several."""
    groups: dict[str, list[Configuration]] = {}
    for one in ours:
        groups.setdefault(repr(analysis.context(one)), []).append(one)
    if len(groups) < 2 or len(groups) > MOST_CONTEXTS:
        return []
    result = []
    for group in groups.values():
        best, keys = analysis.recommend(group), analysis.context(group[0])
        if best and any(one.control is None for one in group):
            name = text.label(keys, text.short(list(keys)))
            result.append({"name": name, "answer": text.headline(best, named=False), "found": _comparison(best)})
    return result


def _times(ours: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Net times of the selections by a criterion that are recommended or on the Pareto front without the random control."""
    front = [one for one in analysis.pareto([c for c in ours if c.control != "random"]) if one.control is None]
    for best in (analysis.recommend(ours), analysis.recommend(ours, shared=True)):
        if best and best.chosen.control is None and best.chosen not in front:
            front.append(best.chosen)
    compared = [(one, analysis.compare(one, ours)) for one in sorted(front, key=lambda one: one.cost)]
    return [{"name": text.describe(one), "one": one, "found": result} for one, result in compared if result.unpruned]


def _table(configurations: Sequence[Configuration], ours: Sequence[Configuration], best: Recommendation | None,
           keys: Sequence[str]) -> list[dict[str, Any]]:  # fmt: skip
    front = analysis.pareto(ours)
    return [
        {
            "one": one, "values": [text.value(one.keys.get(key)) for key in keys],
            "accuracy": text.accuracy(one.accuracy), "n": text.size(one.accuracy),
            "what": (one.control or "") if one.set == "distilled" else one.set.replace("random_real", "random real"),
            "kept": one.kept if one.set == "distilled" else None,
            "front": one in front, "recommended": best is not None and one is best.chosen,
            **_comparison(analysis.compare(one, configurations)),
        }
        for one in sorted(configurations, key=lambda one: -one.accuracy.mean)
    ]  # fmt: skip


def _comparison(result: Recommendation) -> dict[str, Any]:
    if result.chosen.set != "distilled":
        return {"over_random": None, "over_unpruned": None, "saved": None}
    cells: dict[str, Any] = {"saved": result.saved if result.chosen.control != "unpruned" else None}
    for name, over in (("over_random", result.over_random), ("over_unpruned", result.over_unpruned)):
        interval = over and f"{points(over.low)} to {points(over.high)}"
        cells[name] = over and {"value": points(over.value), "interval": interval, "verdict": over.verdict}
    return cells


def _unfinished(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Failed trials, and those that the scheduler stopped, the most accurate first."""
    names, failed, stopped = text.short(keys), dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for row in rows:
        trial, name = str(row["trial"]), text.label({key: row.get(key) for key in keys}, names)
        if row.get("error") is not None:
            error = str(pages.public(row["error"]))[:LONGEST_ERROR]
            failed[trial] = {"trial": trial, "name": name or str(row.get("control") or ""), "error": error}
        elif row.get("stopped") is not None:
            stopped[trial] = {"name": name, "step": int(row["stopped"]), "mean": row.get("mean")}
    by_mean = sorted(stopped.values(), key=lambda row: -(row["mean"] or 0))
    return {"failed": list(failed.values()), "stopped": by_mean}

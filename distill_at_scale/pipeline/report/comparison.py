"""The results of a comparison as a page of their own, as a section of a run's report, and as a table on the terminal.

All are made from the content of `compare.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from distill_at_scale.distillation.summary import TESTED
from distill_at_scale.pipeline.report import charts, html
from distill_at_scale.pipeline.report.plot_spec import Plot, Role, Series
from distill_at_scale.pipeline.report.text import accuracy, points, verdict

COLORED = {"yes": "better", "no": "worse", "unclear": ""}
SHOWN = 40  # rows of a plot; the most accurate

Facts = Mapping[str, Any]


def write(path: Path, facts: Facts) -> Path:
    """Write `compare.html` atomically."""
    return html.write(path, "compare.html.j2", {**contents(facts), "settings": html.as_yaml(facts["settings"])})


def of_run(path: Path) -> dict[str, Any] | None:
    """The section of a run's report from its `compare.json`; None without one."""
    return contents(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def contents(facts: Facts) -> dict[str, Any]:
    """The variables of the template: a leaderboard and a plot for each network, recipes, costs, and what was left out."""
    return {**facts, "name": facts["data"], "boards": [_board(facts, network) for network in facts["networks"]]}


def regime(labels: str, augment: bool) -> str:
    return f"{labels}, augmented" if augment else labels


def _board(facts: Facts, network: str) -> dict[str, Any]:
    """The leaderboard of a network, the most accurate first, and its plot."""
    entries: dict[str, list[Facts]] = {}
    for row in facts["rows"]:
        if row["network"] == network:
            entries.setdefault(row["entry"], []).append(row)
    scores = {score["entry"]: score for score in facts["scores"] if score["network"] == network}
    ranked = sorted(entries.items(), key=lambda item: -max(row["mean"] for row in item[1]))
    regimes = [regime(one["labels"], one["augmented"]) for one in facts["recipes"]]
    lines = []
    for name, rows in ranked:
        cells = {regime(row["labels"], row["augment"]): _cell(row) for row in rows}
        best = max(rows, key=lambda row: row["mean"])
        lines.append({
            "name": name, "kind": rows[0]["kind"], "cells": [cells.get(one) for one in regimes],
            "best": {"accuracy": accuracy(best), "regime": regime(best["labels"], best["augment"])},
            "images": _range([row["images"] for row in rows], "{:,}"),
            "bytes": _range([row["bytes"] / 1024 for row in rows], "{:,.1f}"),
            "lrs": scores.get(name, {}).get("lrs"), "ars": scores.get(name, {}).get("ars"),
            "cost": rows[0]["cost_seconds"], "train": fmean(row["train_seconds"] for row in rows),
        })  # fmt: skip
    plot = charts.picture(_plot(network, regimes, ranked))
    return {"network": network, "regimes": regimes, "rows": lines, "plot": plot}


def _cell(row: Facts) -> dict[str, Any]:
    """Accuracy, and the difference from random samples with its interval, coloured by its verdict."""
    cell: dict[str, Any] = {"accuracy": accuracy(row), "gap": [], "verdict": ""}
    if row.get("over_random") is not None:
        gap = {"mean": row["over_random"], "low": row["over_random_low"], "high": row["over_random_high"]}
        cell["gap"] = [points(gap["mean"])]
        if gap["low"] is not None:
            cell["gap"].append(f"[{points(gap['low'])} to {points(gap['high'])}]")
            cell["verdict"] = COLORED[verdict(gap)]
    return cell


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} – {high}"


def _plot(network: str, regimes: Sequence[str], ranked: Sequence[tuple[str, Sequence[Facts]]]) -> Plot:
    series = []
    for place, name in enumerate(regimes):
        rows = [row for _, rows in ranked[:SHOWN] for row in rows if regime(row["labels"], row["augment"]) == name]
        reach = [None if row["low"] is None else row["high"] - row["mean"] for row in rows]
        role: Role = "ours" if place == 0 else "other"
        series.append(
            Series(name, [row["entry"] for row in rows], [row["mean"] for row in rows], reach, "points", role)
        )
    return Plot(network, "", "top-1 accuracy", [one for one in series if one.x])


def terminal_table(facts: Facts) -> Table:
    """The best result of each set for the first network."""
    board = _board(facts, facts["networks"][0])
    shown = Table(title=f"top-1 accuracy on {TESTED['test']} in the best regime of each set, {board['network']}")
    shown.add_column("set")
    for name in ("images", "KiB", "best", "labels", "LRS", "ARS"):
        shown.add_column(name, justify="left" if name == "labels" else "right")
    for row in board["rows"]:
        robust = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("lrs", "ars")]
        best = row["best"]
        shown.add_row(row["name"], row["images"], row["bytes"], best["accuracy"], best["regime"], *robust)
    return shown

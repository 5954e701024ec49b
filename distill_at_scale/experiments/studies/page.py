"""The page of the studies: `studies.html`, one file that opens offline, made of their findings and nothing else.

Left out: what the findings say; that is each study's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.experiments.studies.base import Finding
from distill_at_scale.experiments.studies.findings import plain
from distill_at_scale.pipeline.report import charts
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report.plot_spec import Plot
from distill_at_scale.pipeline.report.text import NBSP

LISTED = 12  # rows of a table that are shown at once; longer tables are closed
MOST_ROWS = 500
PLOTS_BESIDE = 8  # plots that are shown at once


def write(folder: Path, findings: Sequence[Finding], config: Config) -> Path:
    """Write `studies.html` into a folder, in one step."""
    return pages.write(Path(folder) / "studies.html", "studies.html.j2", contents(findings, config))


def contents(findings: Sequence[Finding], config: Config) -> dict[str, Any]:
    """Everything that the page shows."""
    studies = config.studies
    many = f"{len(findings)} {'study' if len(findings) == 1 else 'studies'}"
    steps = "" if studies.steps is None else f" of {studies.steps:,} steps"
    networks = f"{studies.evaluations} {'network' if studies.evaluations == 1 else 'networks'}"
    return {
        "name": pages.name_of(config.data.path, config.data.source),
        "detail": f"{many} of pruning: {studies.seeds} distillations{steps} of every point, {networks} trained on each",
        "findings": [_shown(finding, number) for number, finding in enumerate(findings)],
        "settings": pages.settings(config),
    }


def _shown(finding: Finding, number: int) -> dict[str, Any]:
    rows = [pages.public(plain(row)) for row in finding.rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kinds = [_numeric(rows, column) for column in columns]
    return {
        "anchor": f"study-{number + 1}",
        "title": finding.title,
        "answer": finding.answer,
        "paper": finding.paper,
        "plots": [_drawn(plot) for plot in finding.plots],
        "first_plots": PLOTS_BESIDE,
        "columns": [(column.replace("_", " "), numeric) for column, numeric in zip(columns, kinds, strict=True)],
        "rows": [[said(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]],
        "count": len(rows),
        "open": len(rows) <= LISTED,
        "facts": [(str(key).replace("_", " "), said(value)) for key, value in _facts(finding.facts).items()],
        "notes": list(finding.notes),
    }


def _drawn(plot: Plot) -> dict[str, str]:
    names = ", ".join(series.name for series in plot.series if series.name)
    return {"title": plot.title, "chart": charts.draw(plot), "alt": f"{plot.y_label} over {plot.x_label}: {names}"}


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those that fit a line; the long ones are in the JSON file."""
    return {key: value for key, value in plain(facts).items() if not isinstance(value, list | dict)}


def _numeric(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    found = [row.get(column) for row in rows if row.get(column) is not None]
    return bool(found) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)


def said(value: Any) -> str:
    """A plain value as a reader says it: four digits of a fraction, yes or no, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return f"{value:,.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value:,.0f}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(map(said, value)).replace(", ", f",{NBSP}") if len(value) < 6 else f"{len(value):,} values"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

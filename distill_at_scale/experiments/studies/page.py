"""Writes `studies.html`, the page of the studies: one file that opens offline, made only from their findings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.experiments.studies.base import Finding
from distill_at_scale.experiments.studies.findings import plain
from distill_at_scale.pipeline.report import charts
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report.text import NBSP
from distill_at_scale.storage.filesystem import last_name

LISTED = 12  # longer tables are folded
MOST_ROWS = 500
FIRST_PLOTS = 8  # plots that are not folded


def write(folder: Path, findings: Sequence[Finding], config: Config) -> Path:
    """Write `studies.html` into a folder, atomically."""
    return pages.write(Path(folder) / "studies.html", "studies.html.j2", contents(findings, config))


def contents(findings: Sequence[Finding], config: Config) -> dict[str, Any]:
    """The variables of the template."""
    studies = config.studies
    many = f"{len(findings)} {'study' if len(findings) == 1 else 'studies'}"
    steps = "" if studies.steps is None else f" of {studies.steps:,} steps"
    networks = f"{studies.evaluations} {'network' if studies.evaluations == 1 else 'networks'}"
    sections = []
    for number, finding in enumerate(findings, 1):
        rows = [pages.public(plain(row)) for row in finding.rows]
        columns = {}  # name -> whether it is numeric
        for column in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(column) for row in rows if row.get(column) is not None]
            numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            columns[column] = bool(values) and numeric
        # long facts are in the JSON file only
        facts = {key: value for key, value in plain(finding.facts).items() if not isinstance(value, list | dict)}
        sections.append({
            "anchor": f"study-{number}",
            "title": finding.title,
            "answer": finding.answer,
            "paper": finding.paper,
            "plots": [charts.picture(plot) for plot in finding.plots],
            "first_plots": FIRST_PLOTS,
            "columns": [(column.replace("_", " "), numeric) for column, numeric in columns.items()],
            "rows": [[as_text(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]],
            "count": len(rows),
            "open": len(rows) <= LISTED,
            "facts": [(str(key).replace("_", " "), as_text(value)) for key, value in facts.items()],
            "notes": list(finding.notes),
        })  # fmt: skip
    return {
        "name": last_name(config.data.path or "") or config.data.source,
        "detail": f"{many} of pruning: {studies.seeds} distillations{steps} of every point, {networks} trained on each",
        "findings": sections,
        "settings": pages.as_yaml(config.model_dump()),
    }


def as_text(value: Any) -> str:
    """A plain value for a reader: four digits of a fraction, yes or no, a dash for null."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return f"{value:,.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value:,.0f}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(map(as_text, value)).replace(", ", f",{NBSP}") if len(value) < 6 else f"{len(value):,} values"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

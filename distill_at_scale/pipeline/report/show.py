"""What the terminal shows of a run: the accuracy of each set and the path of the report."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from distill_at_scale.distillation.summary import differences
from distill_at_scale.pipeline.report.text import ONE_DISTILLATION, points
from distill_at_scale.storage.run_dir import RunDir


def show_result(run: RunDir, console: Console) -> None:
    """Print the accuracy per set and network, and the path of the report."""
    path = run / "evaluation.json"
    if not path.exists():
        return
    table = Table(title="top-1 accuracy on the test split, %")
    for column in ("set", "network", "mean ± std", "n", "distilled − this", "95 % interval"):
        table.add_column(column, justify="left" if column in ("set", "network") else "right")
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    summary = evaluation["summary"]
    gaps = {(gap["against"], gap["network"]): gap for gap in evaluation.get("differences") or differences(summary)}
    for row in summary:
        std, gap = "" if row["std"] is None else f" ± {100 * row['std']:.1f}", gaps.get((row["set"], row["network"]))
        cells = [points(gap["mean"])] if gap else []
        if gap and gap["low"] is not None:
            cells.append(f"{points(gap['low'])} to {points(gap['high'])}")
        table.add_row(row["set"], row["network"], f"{100 * row['mean']:.1f}{std}", str(row["n"]), *cells)
    console.print(table)
    console.print(ONE_DISTILLATION, soft_wrap=True)
    if (run / "report.html").exists():
        place = run.place("report.html") if run.remote else (run / "report.html").resolve()
        console.print(f"report: {place}", markup=False, soft_wrap=True)

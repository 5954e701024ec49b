"""What the command shows at the end of a sweep: the table's rows, repetitions of a configuration taken together.

mean ± std is over the means of the repetitions where there are several, else over the evaluation networks of the only one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.sweep import table

FIXED = {name for name, _ in (*table.BEFORE, *table.AFTER)}
KEYS = ("configuration", "set", "network")


def show(made: pa.Table, console: Console) -> None:
    """Accuracy of each configuration over its repetitions and evaluation networks, and what it took."""
    shown = Table(title="top-1 accuracy on the test split, %")
    for name in (*KEYS, "mean ± std", "n", "seconds"):
        shown.add_column(name, justify="left" if name in KEYS else "right")
    for row in rows(made):
        shown.add_row(*(row[name] for name in (*KEYS, "accuracy", "n", "seconds")))
    console.print(shown)


def rows(made: pa.Table) -> list[dict[str, str]]:
    """configuration, set, network, accuracy (in percent), n and seconds, as text; controls first, the best below."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in made.to_pylist():
        groups.setdefault((configuration(row), row["set"], row["network"] or ""), []).append(row)
    found = [_row(*name, group) for name, group in groups.items()]
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def configuration(row: dict[str, Any]) -> str:
    keys = [f"{key}={_short(value)}" for key, value in row.items() if key not in FIXED and value is not None]
    return " ".join([*([row["control"]] if row["control"] else []), *keys])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(name: str, which: str, network: str, group: list[dict[str, Any]]) -> tuple[tuple[bool, float], dict[str, str]]:
    means = [row["mean"] for row in group if row["mean"] is not None]
    mean, std = mean_and_std(means) if means else (-1.0, None)
    if len(means) == 1:
        std = next(row["std"] for row in group if row["mean"] is not None)
    said = f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}") if means else "failed"
    notes = [f"stopped after {row['stopped']}" for row in group if row["stopped"] is not None]
    return (group[0]["control"] is None, mean), {
        "configuration": name,
        "set": which,
        "network": network,
        "accuracy": " ".join([said, *(f"({note})" for note in dict.fromkeys(notes))]),
        "n": str(len(means)) if len(group) > 1 else str(group[0]["n"] or 0),
        "seconds": f"{_total(row['seconds'] for row in group):.1f}",
    }


def _total(seconds: Iterable[float | None]) -> float:
    return sum(value for value in seconds if value is not None)

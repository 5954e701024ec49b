"""The table of a sweep: outcomes of trials -> rows of sweep.parquet, one for each trial, set and network.

    trial  seed  <one column per swept key>  control  set  network  mean  std  n  kept  of
    select_seconds  distill_seconds  start_seconds  evaluate_seconds  ingest_seconds  score_seconds  shared_seconds
    seconds  stopped  error

mean and std are top-1 fractions over n evaluation networks; std is null for n = 1. `stopped` is the step after which a
scheduler stopped the trial; its mean is then its last evaluation. `error` says why a trial failed; its mean is then null.
start_seconds, a part of distill_seconds, is the start of workers and the loading of samples. shared_seconds is the time of
ingest and scores, which trials share. `show` prints the table with repetitions pooled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.statistics import mean_and_std
from distill_at_scale.distillation.summary import TESTED
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.points import OWN, Failure
from distill_at_scale.experiments.sweep.space import SweepTrial
from distill_at_scale.pipeline.report.text import ONE_DISTILLATION

BEFORE = [("trial", pa.string()), ("seed", pa.int64())]
AFTER = [
    ("control", pa.string()), ("set", pa.string()), ("network", pa.string()), ("mean", pa.float64()),
    ("std", pa.float64()), ("n", pa.int64()), ("kept", pa.int64()), ("of", pa.int64()),
    ("select_seconds", pa.float64()), ("distill_seconds", pa.float64()), ("start_seconds", pa.float64()),
    ("evaluate_seconds", pa.float64()), ("ingest_seconds", pa.float64()), ("score_seconds", pa.float64()),
    ("shared_seconds", pa.float64()), ("seconds", pa.float64()), ("stopped", pa.int64()), ("error", pa.string()),
]  # fmt: skip
FIXED = {name for name, _ in (*BEFORE, *AFTER)}
TEXT_COLUMNS = ("configuration", "set", "network")


def make(trials: Sequence[tuple[SweepTrial, Outcome | Failure]], names: Sequence[str], keys: Sequence[str]) -> pa.Table:
    """The table of finished, stopped and failed trials; `names` are those of their run folders, `keys` the swept keys."""
    rows = [row for (trial, end), name in zip(trials, names, strict=True) for row in _rows(trial, end, name)]
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in BEFORE}
    columns |= {key: _column([row["keys"].get(key) for row in rows]) for key in keys}
    columns |= {name: pa.array([row.get(name) for row in rows], kind) for name, kind in AFTER}
    return pa.table(columns)


def write(table: pa.Table, path: Path) -> None:
    with publish(path) as temporary:
        pq.write_table(table, temporary)


def _rows(trial: SweepTrial, end: Outcome | Failure, name: str) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {"trial": name, "seed": trial.point.seed, "keys": trial.keys, "control": trial.control}
    if isinstance(end, Failure):
        yield {**row, "set": "distilled", "error": end.message}
        return
    row |= {"kept": end.kept, "of": end.of, "stopped": end.stopped}
    row |= {f"{stage}_seconds": end.seconds.get(stage) for stage in (*OWN, "start", "ingest", "score")}
    row["shared_seconds"] = end.seconds.get("ingest", 0.0) + end.seconds.get("score", 0.0)
    row["seconds"] = sum(end.seconds.get(stage, 0.0) for stage in OWN)
    for (which, network), evaluations in groupby(end.rows, lambda row: (row["set"], row["network"])):
        if which == "random_real" and trial.control != "unpruned":
            continue  # the row belongs to the unpruned control that shares the point
        top1 = [evaluation["top1"] for evaluation in evaluations]
        mean, std = mean_and_std(top1)
        yield {**row, "set": which, "network": network, "mean": mean, "std": std, "n": len(top1)}


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as numbers, everything else as text: lists and mappings as JSON."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        integers = all(isinstance(value, int) for value in present)
        return pa.array(values, pa.int64() if integers else pa.float64())
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


def show(table: pa.Table, console: Console, split: str) -> None:
    """Print the accuracy of each configuration over its repetitions and evaluation networks, and its seconds; `split` is
    evaluate.split.
    """
    shown = Table(title=f"top-1 accuracy on {TESTED[split]}, %")
    for name in (*TEXT_COLUMNS, "mean ± std", "n", "seconds"):
        shown.add_column(name, justify="left" if name in TEXT_COLUMNS else "right")
    for row in pooled_rows(table):
        shown.add_row(*(row[name] for name in (*TEXT_COLUMNS, "accuracy", "n", "seconds")))
    console.print(shown)
    if len({row["seed"] for row in table.to_pylist()}) == 1:
        console.print(ONE_DISTILLATION, soft_wrap=True)


def pooled_rows(table: pa.Table) -> list[dict[str, str]]:
    """configuration, set, network, accuracy (per cent), n and seconds as text; controls first, the best at the end.

    The accuracy is over the means of the repetitions if there are several, else over the evaluation networks.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        keys = {key: value for key, value in row.items() if key not in FIXED and value is not None}
        words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in keys.items()]
        name = " ".join([*([row["control"]] if row["control"] else []), *words])
        groups.setdefault((name, row["set"], row["network"] or ""), []).append(row)
    result = []
    for (name, which, network), rows in groups.items():
        means = [row["mean"] for row in rows if row["mean"] is not None]
        mean, std = mean_and_std(means) if means else (-1.0, None)
        if len(means) == 1:
            std = next(row["std"] for row in rows if row["mean"] is not None)
        accuracy = f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}") if means else "failed"
        stops = dict.fromkeys(f"(stopped after {row['stopped']})" for row in rows if row["stopped"] is not None)
        n = str(len(means)) if len(rows) > 1 else str(rows[0]["n"] or 0)
        seconds = f"{sum(row['seconds'] or 0.0 for row in rows):.1f}"
        shown = {"configuration": name, "set": which, "network": network, "accuracy": " ".join([accuracy, *stops]),
                 "n": n, "seconds": seconds}  # fmt: skip
        result.append(((rows[0]["control"] is None, mean), shown))
    return [shown for _, shown in sorted(result, key=lambda pair: pair[0])]

"""The table of a sweep: outcomes of trials -> rows of sweep.parquet, one per trial, set and network.

    trial  seed  <one column per swept key>  control  set  network  mean  std  n  kept  of
    select_seconds  distill_seconds  evaluate_seconds  shared_seconds  seconds  stopped  error

mean and std are top-1 fractions over n evaluation networks; std is null for n = 1. `stopped` is the step after which a
scheduler gave the trial up, whose mean is then its last evaluation; `error` says why it failed, and mean is null then.
shared_seconds are those of the ingest and scores that it stands on, which several trials share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.points import Failure
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.sweep.space import SweepTrial

BEFORE = [("trial", pa.string()), ("seed", pa.int64())]
AFTER = [
    ("control", pa.string()), ("set", pa.string()), ("network", pa.string()), ("mean", pa.float64()),
    ("std", pa.float64()), ("n", pa.int64()), ("kept", pa.int64()), ("of", pa.int64()),
    ("select_seconds", pa.float64()), ("distill_seconds", pa.float64()), ("evaluate_seconds", pa.float64()),
    ("ingest_seconds", pa.float64()), ("score_seconds", pa.float64()), ("shared_seconds", pa.float64()),
    ("seconds", pa.float64()), ("stopped", pa.int64()), ("error", pa.string()),
]  # fmt: skip
RANDOM_REAL = "random_real"


def make(trials: Sequence[tuple[SweepTrial, Outcome | Failure]], names: Sequence[str], keys: Sequence[str]) -> pa.Table:
    """Of trials that are finished, stopped, or failed with a message; `names` are those of their run folders."""
    rows = [row for (trial, found), name in zip(trials, names, strict=True) for row in _rows(trial, found, name)]
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in BEFORE}
    columns |= {key: _column([row["keys"].get(key) for row in rows]) for key in keys}
    columns |= {name: pa.array([row.get(name) for row in rows], kind) for name, kind in AFTER}
    return pa.table(columns)


def write(table: pa.Table, path: Path) -> None:
    with publish(path) as temporary:
        pq.write_table(table, temporary)


def _rows(trial: SweepTrial, found: Outcome | Failure, name: str) -> Iterator[dict[str, Any]]:
    shown: dict[str, Any] = {
        "trial": name, "seed": trial.point.seed, "keys": trial.keys, "control": trial.control,
    }  # fmt: skip
    if isinstance(found, Failure):
        yield {**shown, "set": "distilled", "error": found.message}
        return
    shown |= {"kept": found.kept, "of": found.of, "stopped": found.stopped, **_seconds(found.seconds)}
    for (which, network), rows in groupby(found.rows, lambda row: (row["set"], row["network"])):
        if which == RANDOM_REAL and trial.control != "unpruned":
            continue  # the point is shared with the control, which shows it
        top1 = [row["top1"] for row in rows]
        mean, std = mean_and_std(top1)
        yield {**shown, "set": which, "network": network, "mean": mean, "std": std, "n": len(top1)}


def _seconds(by_stage: Mapping[str, float]) -> dict[str, float | None]:
    own = ("select", "distill", "evaluate")
    found: dict[str, float | None] = {f"{s}_seconds": by_stage.get(s) for s in (*own, "ingest", "score")}
    shared = by_stage.get("ingest", 0.0) + by_stage.get("score", 0.0)
    return found | {"shared_seconds": shared, "seconds": sum(by_stage.get(stage, 0.0) for stage in own)}


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as numbers, anything else as text: names as they are, lists and mappings as JSON."""
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        whole = all(isinstance(value, int) for value in given)
        return pa.array(values, pa.int64() if whole else pa.float64())
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())

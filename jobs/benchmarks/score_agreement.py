"""How well one scoring ranks samples like another: mean within-class Spearman correlation of two score tables.

python jobs/benchmarks/score_agreement.py RUN_A RUN_B [--trials T] [--epochs E] [--keep RATE ...]

RUN_A and RUN_B are run folders of the same data set in which `score` is done. With --trials and --epochs only the first
trials and epochs of RUN_A's losses are used. --keep adds the Jaccard index of the samples with the lowest scores of each
class. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from distill_at_scale.experiments.studies.rankings import correlations
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import lists_to_matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--keep", type=float, nargs="*", default=[])
    options = parser.parse_args()
    ids, labels, a = _scores(options.first, options.trials, options.epochs)
    other, _, b = _scores(options.second, None, None)
    if ids != other:
        raise SystemExit("the two runs score different samples; agreement needs the same data set")
    mean, std = (float(matrix[0, 1]) for matrix in correlations(np.stack([a, b], 1), labels))
    kept = {f"jaccard_{rate:g}": round(_jaccard(a, b, labels, rate), 3) for rate in options.keep}
    print(json.dumps({**kept, "spearman_mean": round(mean, 4), "spearman_std_over_classes": round(std, 4), "samples": len(ids),
                      "mean_score": [round(float(a.mean()), 4), round(float(b.mean()), 4)]}))  # fmt: skip


def _jaccard(a: Any, b: Any, labels: Any, rate: float) -> float:
    first, second = (_lowest(values, labels, rate) for values in (a, b))
    return len(first & second) / len(first | second)


def _lowest(values: Any, labels: Any, rate: float) -> set[int]:
    kept: set[int] = set()
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        kept |= set(own[np.argsort(values[own], kind="stable")[: max(1, round(rate * len(own)))]].tolist())
    return kept


def _scores(run: Path, trials: int | None, epochs: int | None) -> tuple[list[str], Any, Any]:
    scores, facts = score_table.read(run / "scores.parquet")
    values = lists_to_matrix(scores["loss_values"]).reshape(-1, facts["trials"], facts["epochs"])
    values = values[:, : trials or facts["trials"], : epochs or facts["epochs"]]
    return scores["sample_id"].to_pylist(), scores["label"].to_numpy(), np.mean(values, axis=(1, 2), dtype=np.float64)


if __name__ == "__main__":
    main()

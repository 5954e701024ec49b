"""Agreement of rankings of the same samples, class by class: rank correlation, kept sets, reliability of means of trials.

Large tables are sampled: a seeded draw of classes, and of samples of each; a keep rate then applies to the drawn samples.
Skips classes of fewer than three samples, and for each pair of rankings the classes in which one is constant.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import rng
from distill_at_scale.data.prepared.parquet import facts_of, open_table, reading
from distill_at_scale.pruning.criteria import CRITERIA
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import lists_to_matrix
from distill_at_scale.pruning.scoring.reliability import times_needed
from distill_at_scale.pruning.selection.quotas import quota

CLASSES, SAMPLES = 100, 2000  # drawn at most: classes, samples of each
SPLITS = 10  # random pairs of disjoint sets of trials per size
LEAST = 3  # samples of a class

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RankSample:
    """The drawn samples, in the order of the table."""

    rows: Array  # int64 [n], in the table
    labels: Array  # [n]
    places: Array  # int64 [n], within all samples of the class
    of: int  # rows of the table


class Scores:
    """Reads some columns of some rows of a score table."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open_table(path, "score", score_table.REQUIRED, "score table")
        self.facts = facts_of(self.file, score_table.KEY)

    @property
    def columns(self) -> list[str]:
        """The criteria in the table."""
        others = ("sample_id", "label", "score")
        return [n for n in self.file.schema_arrow.names if n not in others and not n.endswith("_values")]

    def low(self, column: str) -> bool:
        """Whether low scores are useful."""
        return self.facts.get("useful", {}).get(column, "low") == "low"

    def draw(self, seed: int) -> RankSample:
        with reading(self.path, "score"):
            labels = self.file.read(["label"])["label"].to_numpy()
        classes, starts, counts = np.unique(labels, return_index=True, return_counts=True)
        drawn = np.sort(rng.numpy_generator(seed, "stability classes").permutation(len(classes))[:CLASSES])
        rows, places = [], []
        for index in drawn.tolist():
            order = rng.numpy_generator(seed, "stability", int(classes[index])).permutation(counts[index])
            places.append(np.sort(order[:SAMPLES]))
            rows.append(starts[index] + places[-1])
        return RankSample(np.concatenate(rows), labels[np.concatenate(rows)], np.concatenate(places), len(labels))

    def read(self, column: str, rows: Array) -> Array:
        """Some rows (ascending) of a column: float32 [n], or [n, values] for a column of lists."""
        parts, start = [], 0
        with reading(self.path, "score"):
            for group in range(self.file.num_row_groups):
                count = self.file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(rows, [start, start + count])
                if first < last:
                    values = self.file.read_row_group(group, [column])[column].take(rows[first:last] - start)
                    parts.append(lists_to_matrix(values) if "list" in str(values.type) else values.to_numpy())
                start += count
        return np.concatenate(parts)

    def values(self, column: str, rows: Array) -> Array | None:
        """The values of a criterion under each checkpoint, [n, trials, epochs]; None if the table does not hold them."""
        name, trials = f"{column}_values", int(self.facts.get("trials") or 0)
        if name not in self.file.schema_arrow.names or not trials:
            return None
        values = self.read(name, rows)
        complete = values.shape[1] >= trials and values.shape[1] % trials == 0
        return values.reshape(len(values), trials, -1) if complete else None


def by_trial(values: Array, column: str, section: ScoreSection) -> Array:
    """[n, trials, epochs] -> the score under each trial alone, float32 [n, trials]."""
    name = next((name for name in section.criteria if name.rpartition(":")[2] == column), column)
    aggregate = lambda values: values.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)  # noqa: E731
    if name in CRITERIA or ":" in name:
        criterion = resolve("score.criterion", name, CRITERIA)
        aggregate = (criterion.of(section) if hasattr(criterion, "of") else criterion()).aggregate
    return np.stack([aggregate(values[:, [trial]]) for trial in range(values.shape[1])], 1)


def correlations(vectors: Array, labels: Array) -> tuple[Array, Array]:
    """Spearman's rank correlation of every two columns of [n, m] within class: mean and deviation over classes, [m, m].

    A pair counts the classes in which neither column is constant; NaN where there is none.
    """
    pairs = (vectors.shape[1],) * 2
    by_class = [np.full(pairs, np.nan)]
    for label in np.unique(labels):
        members = vectors[labels == label]
        if len(members) >= LEAST:
            with np.errstate(invalid="ignore", divide="ignore"):
                by_class.append(np.corrcoef(rankdata(members, axis=0), rowvar=False).reshape(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a slice of NaN only
        return np.nanmean(by_class, 0), np.nanstd(by_class, 0)


def kept(vectors: Array, labels: Array, rate: float, low: bool = True) -> Array:
    """The samples of each class (at least one) that each column of [n, m] would keep: bool [n, m]; ties by place."""
    result = np.zeros(vectors.shape, bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.argsort(vectors[members] if low else -vectors[members], axis=0, kind="stable")
        first = members[order[: quota(rate, len(members), 1)]]  # [kept, m]
        result[first, np.arange(vectors.shape[1])] = True
    return result


def jaccard(sets: Array) -> Array:
    """Samples in both of every two columns of bool [n, m], as a part of those in either: [m, m]."""
    both = sets.T.astype(np.float64) @ sets.astype(np.float64)
    sizes = np.diag(both)
    return both / (sizes[:, None] + sizes[None] - both)


def off_diagonal(matrix: Array) -> float:
    """The mean over all pairs."""
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def half_correlation(trials: Array, labels: Array, size: int, seed: int) -> float:
    """Correlation of means over `size` trials and as many others, averaged over random pairs: trials [n, K], 2 size <= K."""
    result = []
    for split in range(SPLITS):
        order = rng.numpy_generator(seed, "stability halves", size, split).permutation(trials.shape[1])
        halves = [trials[:, order[:size]].mean(1), trials[:, order[size : 2 * size]].mean(1)]
        result.append(correlations(np.stack(halves, 1), labels)[0][0, 1])
    return float(np.mean(result))


def trials_needed(single: float, reliability: float) -> int | None:
    """The fewest trials whose mean has this reliability; None where single trials do not agree at all."""
    times = times_needed(single, reliability) if single > 0 else math.inf  # a comparison with NaN is False
    return None if math.isinf(times) else max(1, math.ceil(times - 1e-9))

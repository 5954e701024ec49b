"""How far rankings of the same samples agree, class by class: rank correlation, kept sets, reliability of means of trials.

Large tables are sampled: some classes, and some samples of each, by a seeded draw; a share that is kept is then one of the
samples drawn. A class of fewer than three samples is left out, and of every pair one in which either is constant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
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
from distill_at_scale.pruning.selection.ranking import RANDOM

CLASSES, SAMPLES = 100, 2000  # that are looked at, and of each class
SPLITS = 10  # random pairs of disjoint sets of trials per size
LEAST = 3  # samples of a class

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RankSample:
    """The samples that are looked at, in the order of the table."""

    rows: Array  # int64 [n], in the table
    labels: Array  # [n]
    places: Array  # int64 [n], within all of the class
    of: int  # rows of the table


class Scores:
    """Some columns of some rows of a score table."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open_table(path, "score", score_table.REQUIRED, "score table")
        self.facts = facts_of(self.file, score_table.KEY)

    @property
    def columns(self) -> list[str]:
        """The criteria in the table."""
        left_out = ("sample_id", "label", "score")
        return [n for n in self.file.schema_arrow.names if n not in left_out and not n.endswith("_values")]

    def low(self, column: str) -> bool:
        """Whether low scores are useful."""
        return self.facts.get("useful", {}).get(column, "low") == "low"

    def draw(self, seed: int) -> RankSample:
        with reading(self.path, "score"):
            labels = self.file.read(["label"])["label"].to_numpy()
        classes, starts, counts = np.unique(labels, return_index=True, return_counts=True)
        chosen = np.sort(rng.numpy_generator(seed, "stability classes").permutation(len(classes))[:CLASSES])
        places = []
        for number in chosen.tolist():
            draw = rng.numpy_generator(seed, "stability", int(classes[number])).permutation(counts[number])
            places.append(np.sort(draw[:SAMPLES]))
        rows = np.concatenate([starts[number] + found for number, found in zip(chosen.tolist(), places, strict=True)])
        return RankSample(rows, labels[rows], np.concatenate(places), len(labels))

    def read(self, column: str, rows: Array) -> Array:
        """Some rows (ascending) of a column: float32 [n], of lists [n, values]."""
        parts, start = [], 0
        with reading(self.path, "score"):
            for group in range(self.file.num_row_groups):
                count = self.file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(rows, [start, start + count])
                if first < last:
                    found = self.file.read_row_group(group, [column])[column].take(rows[first:last] - start)
                    parts.append(lists_to_matrix(found) if "list" in str(found.type) else found.to_numpy())
                start += count
        return np.concatenate(parts)

    def values(self, column: str, rows: Array) -> Array | None:
        """What a criterion saw under every checkpoint, [n, trials, epochs]; None where the table has it not by trial."""
        name, trials = f"{column}_values", int(self.facts.get("trials") or 0)
        if name not in self.file.schema_arrow.names or not trials:
            return None
        found = self.read(name, rows)
        whole = found.shape[1] >= trials and found.shape[1] % trials == 0
        return found.reshape(len(found), trials, -1) if whole else None


def scored(section: ScoreSection) -> bool:
    """Whether a table of these scores has any criterion."""
    return bool(section.imported) or any(name != RANDOM for name in section.criteria)


def by_trial(values: Array, column: str, section: ScoreSection) -> Array:
    """[n, trials, epochs] -> the score under each trial alone, float32 [n, trials]."""
    aggregate = _aggregate(column, section)
    return np.stack([aggregate(values[:, [trial]]) for trial in range(values.shape[1])], 1)


def _aggregate(column: str, section: ScoreSection) -> Callable[[Array], Array]:
    name = next((name for name in section.criteria if name.rpartition(":")[2] == column), column)
    if name not in CRITERIA and ":" not in name:
        return lambda values: values.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
    found = resolve("score.criterion", name, CRITERIA)
    made = found.of(section) if hasattr(found, "of") else found()
    return made.aggregate  # type: ignore[no-any-return]


def correlations(vectors: Array, labels: Array) -> tuple[Array, Array]:
    """Spearman's rank correlation of every two columns of [n, m] within class: mean and deviation over classes, [m, m].

    Each pair counts the classes in which neither column is constant; NaN where there is none.
    """
    pairs = (vectors.shape[1],) * 2
    found = [np.full(pairs, np.nan)]
    for label in np.unique(labels):
        members = vectors[labels == label]
        if len(members) >= LEAST:
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append(np.corrcoef(rankdata(members, axis=0), rowvar=False).reshape(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        return np.nanmean(found, 0), np.nanstd(found, 0)


def kept(vectors: Array, labels: Array, rate: float, low: bool = True) -> Array:
    """What each column of [n, m] would keep of every class (one sample at least): bool [n, m]; ties by place."""
    found = np.zeros(vectors.shape, bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.argsort(vectors[members] if low else -vectors[members], axis=0, kind="stable")
        first = members[order[: quota(rate, len(members), 1)]]  # [kept, m]
        found[first, np.arange(vectors.shape[1])] = True
    return found


def jaccard(sets: Array) -> Array:
    """Shared samples of every two columns of bool [n, m], as a part of those in either: [m, m]."""
    both = sets.T.astype(np.float64) @ sets.astype(np.float64)
    sizes = np.diag(both)
    return both / (sizes[:, None] + sizes[None] - both)


def off_diagonal(lists_to_matrix: Array) -> float:
    """The mean of all pairs."""
    return float(lists_to_matrix[np.triu_indices(len(lists_to_matrix), 1)].mean())


def half_correlation(trials: Array, labels: Array, size: int, seed: int) -> float:
    """How the mean over `size` trials agrees with that over as many others: trials [n, K], 2 size <= K; over random pairs."""
    found = []
    for split in range(SPLITS):
        order = rng.numpy_generator(seed, "stability halves", size, split).permutation(trials.shape[1])
        halves = [trials[:, order[:size]].mean(1), trials[:, order[size : 2 * size]].mean(1)]
        found.append(correlations(np.stack(halves, 1), labels)[0][0, 1])
    return float(np.mean(found))


def trials_needed(single: float, reliability: float) -> int | None:
    """The fewest trials whose mean is so reliable; None where single ones do not agree at all."""
    times = times_needed(single, reliability) if single > 0 else math.inf  # NaN agrees with nothing
    return None if math.isinf(times) else max(1, math.ceil(times - 1e-9))


def rates_of(rates: Sequence[float | None]) -> list[float]:
    """Shares below one, each once, ascending."""
    return sorted({rate for rate in rates if rate is not None and 0 < rate < 1})

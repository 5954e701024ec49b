"""From the accuracies of Monte Carlo subsets to a utility for every sample, and how far it can be trusted.

A utility is a mean over the subsets that held the sample; its standard error follows from their spread. Selection cuts
within classes, so signal and noise are those within classes: reliability = 1 - mean squared standard error / variance of
the utilities, beside it the correlation of two halves of the subsets, stepped up (Spearman and Brown 1910).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.sections import MonteCarloSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO
from distill_at_scale.pruning.scoring import monte_carlo
from distill_at_scale.pruning.scoring.reliability import TARGET, spearman_brown, times_needed

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class UtilityEstimate:
    """Of every training sample, by class and place: utility, its standard error (NaN below two subsets), and how many
    subsets held it; float32 [n], float32 [n], int32 [n]."""

    utility: Array
    error: Array
    held: Array
    facts: dict[str, Any]


def read_accuracies(pieces: Path, section: MonteCarloSection) -> Array:
    """Of all subsets, float32 [subsets, classes].

    Raises UserError where a unit is missing.
    """
    found = []
    for unit in monte_carlo.subset_ranges(section):
        path = monte_carlo.subset_part_path(pieces, unit)
        if not path.exists():
            raise UserError(f"{path} is missing; give the command again to run its subsets")
        found.append(safetensors_io.load(path)["accuracies"].numpy())
    return np.concatenate(found)


def estimate(found: Array, counts: Sequence[int], section: MonteCarloSection, seed: int) -> UtilityEstimate:
    """Accuracies [subsets, classes] -> utilities; a sample that no subset held gets the mean of its class."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    held, sums = (np.zeros((2, starts[-1])) for _ in range(2))  # by halves of the subsets: even and odd
    squares = np.zeros(starts[-1])
    for subset, row in enumerate(found.astype(np.float64)):
        half = subset % 2
        for label, drawn in enumerate(monte_carlo.draw_subset(seed, subset, counts, section)):
            places = starts[label] + drawn.members
            held[half, places] += 1
            sums[half, places] += row[label]
            squares[places] += row[label] ** 2
    labels = np.repeat(np.arange(len(counts)), counts)
    return _estimate(held, sums, squares, labels, len(found))


def _estimate(held: Array, sums: Array, squares: Array, labels: Array, subsets: int) -> UtilityEstimate:
    number = held.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / number
        variance = np.maximum(squares - number * mean**2, 0) / (number - 1)
        error = np.where(number > 1, np.sqrt(variance / number), np.nan)
        halves = sums / held
    missed = number == 0
    for label in np.unique(labels[missed]):
        inside = labels == label
        rest = mean[inside & ~missed]
        mean[inside & missed] = rest.mean() if len(rest) else 0.0
    facts = {"subsets": subsets, "held": round(float(number.mean()), 3), "missed": int(missed.sum())}
    facts |= _trust(mean, error, halves, labels, subsets)
    return UtilityEstimate(mean.astype(np.float32), error.astype(np.float32), number.astype(np.int32), facts)


def _trust(mean: Array, error: Array, halves: Array, labels: Array, subsets: int) -> dict[str, Any]:
    """Standard error, reliability and the subsets that are missing for WANTED; None for what cannot be told."""
    known = np.isfinite(error)
    if known.sum() < 2:
        return {"standard_error": None, "reliability": None, "split_half": None, "more_subsets": None}
    noise, total = float((error[known] ** 2).mean()), float(_within(mean, labels, known).var())
    reliability = max(0.0, 1 - noise / total) if total > 0 else 0.0
    times = times_needed(reliability)
    more = None if math.isinf(times) else max(0, math.ceil(subsets * (times - 1)))
    return {
        "standard_error": round(float(error[known].mean()), 6),
        "reliability": round(reliability, 4),
        "split_half": _split_half(halves, labels),
        "more_subsets": more,
    }


def _split_half(halves: Array, labels: Array) -> float | None:
    """Two halves' utilities [2, n] -> the reliability of both together; None where they say nothing."""
    both = np.isfinite(halves[0]) & np.isfinite(halves[1])
    if both.sum() < 3:
        return None
    first, second = (_within(half, labels, both) for half in halves)
    if not first.std() or not second.std():
        return None
    agreement = float(np.corrcoef(first, second)[0, 1])
    return round(spearman_brown(agreement, 2), 4) if agreement > -1 else -1.0


def _within(values: Array, labels: Array, which: Array) -> Array:
    """Some of the values less their class's mean."""
    chosen, of = values[which], labels[which]
    sums, sizes = np.bincount(of, chosen), np.bincount(of)
    return chosen - (sums / np.maximum(sizes, 1))[of]


def summary(facts: dict[str, Any]) -> list[str]:
    """What the command shows."""
    lines = []
    if facts["standard_error"] is not None:
        half = "" if facts["split_half"] is None else f" (two halves: {facts['split_half']:.2f})"
        lines.append(
            f"  Monte Carlo: {facts['subsets']:,} subsets, each sample in {facts['held']:.1f} of them; standard error "
            f"{facts['standard_error']:.4f}, reliability {facts['reliability']:.2f}{half}"
        )
        more = facts["more_subsets"]
        if more is None:
            lines.append(f"  no signal beyond the noise yet, so it cannot be said how many subsets reach {TARGET:g}")
        elif more:
            lines.append(f"  about {more:,} more subsets would reach a reliability of {TARGET:g}")
    if facts["missed"]:
        lines.append(f"  {facts['missed']} samples were in no subset and get the mean of their class")
    return lines


def write(path: Path, ids: pa.Array, labels: Array, found: UtilityEstimate) -> None:
    """monte_carlo.parquet: sample_id, label, monte_carlo, standard_error and held; the facts under the key monte_carlo."""
    columns = {
        "sample_id": ids,
        "label": labels.astype(np.int32),
        MONTE_CARLO: found.utility,
        "standard_error": found.error,
        "held": found.held,
    }
    table = pa.table(columns).replace_schema_metadata({MONTE_CARLO: json.dumps(found.facts, sort_keys=True)})
    with publish(path) as temporary:
        pq.write_table(table, temporary)

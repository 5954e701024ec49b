"""From the accuracies of Monte Carlo subsets to the utility of each sample, and its reliability within classes.

reliability = 1 - mean squared standard error / variance of the utilities. `split_half` is the correlation of two halves of
the subsets, stepped up (Spearman and Brown 1910).
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
    """Per training sample, by class and position: utility float32 [n], its standard error float32 [n] (NaN below two
    subsets), and the number of subsets that contain it int32 [n]."""

    utility: Array
    error: Array
    held: Array
    facts: dict[str, Any]


def read_accuracies(folder: Path, section: MonteCarloSection) -> Array:
    """The accuracies of all subsets, float32 [subsets, classes]. Raises UserError if a part file is missing."""
    parts = []
    for unit in monte_carlo.subset_ranges(section):
        path = monte_carlo.subset_part_path(folder, unit)
        if not path.exists():
            raise UserError(f"{path} is missing; repeat the command to run its subsets")
        parts.append(safetensors_io.load(path)["accuracies"].numpy())
    return np.concatenate(parts)


def estimate(accuracies: Array, counts: Sequence[int], section: MonteCarloSection, seed: int) -> UtilityEstimate:
    """Accuracies [subsets, classes] -> utilities; a sample that is in no subset gets the mean of its class."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    held, sums = (np.zeros((2, starts[-1])) for _ in range(2))  # for even and odd subsets
    squares = np.zeros(starts[-1])
    for subset, row in enumerate(accuracies.astype(np.float64)):
        for label, part in enumerate(monte_carlo.draw_subset(seed, subset, counts, section)):
            samples = starts[label] + part.members
            held[subset % 2, samples] += 1
            sums[subset % 2, samples] += row[label]
            squares[samples] += row[label] ** 2
    number, subsets = held.sum(0), len(accuracies)
    with np.errstate(invalid="ignore", divide="ignore"):
        utility = sums.sum(0) / number
        variance = np.maximum(squares - number * utility**2, 0) / (number - 1)
        error = np.where(number > 1, np.sqrt(variance / number), np.nan)
        halves = sums / held
    labels, missed = np.repeat(np.arange(len(counts)), counts), number == 0
    for label in np.unique(labels[missed]):
        inside = labels == label
        rest = utility[inside & ~missed]
        utility[inside & missed] = rest.mean() if len(rest) else 0.0
    facts = {"subsets": subsets, "held": round(float(number.mean()), 3), "missed": int(missed.sum())}
    facts |= _reliability(utility, error, halves, labels, subsets)
    return UtilityEstimate(utility.astype(np.float32), error.astype(np.float32), number.astype(np.int32), facts)


def _reliability(utility: Array, error: Array, halves: Array, labels: Array, subsets: int) -> dict[str, Any]:
    """Standard error, reliability, and the number of subsets missing for TARGET; None for what is unknown."""
    known = np.isfinite(error)
    if known.sum() < 2:
        return {"standard_error": None, "reliability": None, "split_half": None, "more_subsets": None}
    noise, total = float((error[known] ** 2).mean()), float(_centred(utility, labels, known).var())
    reliability = max(0.0, 1 - noise / total) if total > 0 else 0.0
    times = times_needed(reliability)
    both, split_half = np.isfinite(halves[0]) & np.isfinite(halves[1]), None
    if both.sum() >= 3:
        first, second = (_centred(half, labels, both) for half in halves)
        if first.std() and second.std():
            agreement = float(np.corrcoef(first, second)[0, 1])
            split_half = round(spearman_brown(agreement, 2), 4) if agreement > -1 else -1.0
    more = None if math.isinf(times) else max(0, math.ceil(subsets * (times - 1)))
    facts = {"standard_error": round(float(error[known].mean()), 6), "reliability": round(reliability, 4)}
    return {**facts, "split_half": split_half, "more_subsets": more}


def _centred(values: Array, labels: Array, which: Array) -> Array:
    """Some of the values minus the mean of their class."""
    chosen, of = values[which], labels[which]
    sums, sizes = np.bincount(of, chosen), np.bincount(of)
    return chosen - (sums / np.maximum(sizes, 1))[of]


def summary(facts: dict[str, Any]) -> list[str]:
    """The lines that the command prints."""
    lines = []
    if facts["standard_error"] is not None:
        half = "" if facts["split_half"] is None else f" (two halves: {facts['split_half']:.2f})"
        lines.append(
            f"  Monte Carlo: {facts['subsets']:,} subsets, each sample in {facts['held']:.1f} of them; standard error "
            f"{facts['standard_error']:.4f}, reliability {facts['reliability']:.2f}{half}"
        )
        more = facts["more_subsets"]
        if more is None:
            lines.append(f"  no signal above the noise yet: cannot estimate how many subsets reach {TARGET:g}")
        elif more:
            lines.append(f"  about {more:,} more subsets would reach a reliability of {TARGET:g}")
    if facts["missed"]:
        lines.append(f"  {facts['missed']} samples are in no subset and get the mean of their class")
    return lines


def write(path: Path, ids: pa.Array, labels: Array, estimate: UtilityEstimate) -> None:
    """monte_carlo.parquet: sample_id, label, monte_carlo, standard_error and held; the facts under the key monte_carlo."""
    columns = {"sample_id": ids, "label": labels.astype(np.int32), MONTE_CARLO: estimate.utility}
    columns |= {"standard_error": estimate.error, "held": estimate.held}
    table = pa.table(columns).replace_schema_metadata({MONTE_CARLO: json.dumps(estimate.facts, sort_keys=True)})
    with publish(path) as temporary:
        pq.write_table(table, temporary)

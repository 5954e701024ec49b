"""From trained networks to the results of a comparison: `compare.parquet` and `compare.json`.

A row of the table is an entry (a set, or real samples at one budget) with one kind of labels, with or without augmentation,
and one network:

    entry  kind  budget  labels  augment  network  mean  std  n  low  high  images  training_images  bytes
    cost_seconds  teacher_seconds  train_seconds  over_random  over_random_low  over_random_high

mean, low and high are top-1 fractions; low to high is the 95 % t-interval over n networks (null for one). cost_seconds is the
time of scoring, selection (with the search of select: auto) and distillation. teacher_seconds is the time to train the teacher
if its labels are used, train_seconds the mean time of a network. over_random is the difference from as many random samples per
class, with its Welch interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distill_at_scale.config.experiments import CompareSection
from distill_at_scale.core.statistics import Sample, mean_and_std, mean_interval, welch_interval
from distill_at_scale.experiments.compare import scores
from distill_at_scale.experiments.compare.sets import Entry, label_bytes
from distill_at_scale.experiments.compare.units import FULL, RANDOM

TEXTS, COUNTS = {"entry", "kind", "budget", "labels", "network"}, {"n", "images", "training_images", "bytes"}
COLUMNS = (
    "entry", "kind", "budget", "labels", "augment", "network", "mean", "std", "n", "low", "high", "images", "training_images",
    "bytes", "cost_seconds", "teacher_seconds", "train_seconds", "over_random", "over_random_low", "over_random_high",
)  # fmt: skip
TYPES = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(COUNTS, pa.int64()) | {"augment": pa.bool_()}
SCHEMA = pa.schema([(name, TYPES.get(name, pa.float64())) for name in COLUMNS])
Rows = Sequence[Mapping[str, Any]]
Groups = Mapping[tuple[str, int, str, bool, str], Rows]


def group(rows: Rows) -> Groups:
    """The rows of finished jobs by (set, samples per class, labels, augmentation, network)."""
    groups: dict[tuple[str, int, str, bool, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["ipc"], row["labels"], row["augment"], row["network"]), []).append(row)
    return groups


def _sample(rows: Rows) -> Sample:
    return *mean_and_std([row["top1"] for row in rows]), len(rows)


def table(
    entries: Sequence[Entry], groups: Groups, counts: Sequence[int], section: CompareSection, epochs: int, teacher: float
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the table, in the order of the entries.

    `counts` are the training samples per class, `teacher` the seconds of the teacher's training.
    """
    lines = []
    for entry in entries:
        for (name, per_class, labels, augment, network), rows in groups.items():
            if name != entry.name or per_class != entry.per_class.get(labels, 0):
                continue
            mean, std, n = ours = _sample(rows)
            low, high = mean_interval(mean, std, n) or (None, None)
            stored, training = entry.images(labels, counts)
            line = {
                "entry": entry.title, "kind": entry.kind, "budget": entry.budget, "labels": labels, "augment": augment,
                "network": network, "mean": mean, "std": std, "n": n, "low": low, "high": high, "images": stored,
                "training_images": training,
                "bytes": entry.bytes(labels, counts, label_bytes(labels, len(counts), section, epochs)),
                "cost_seconds": entry.cost, "teacher_seconds": teacher if entry.needs_teacher(labels) else 0.0,
                "train_seconds": statistics.fmean(row["seconds"] for row in rows),
            }  # fmt: skip
            ipc = entry.per_class.get(labels) or max(1, entry.stored // len(counts))
            random = groups.get((RANDOM, ipc, labels, augment, network))
            if random and entry.file:  # neither random samples themselves nor the whole training split
                low, high = welch_interval(ours, other := _sample(random)) or (None, None)
                line |= {"over_random": mean - other[0], "over_random_low": low, "over_random_high": high}
            lines.append(line)
    return lines


def robust_scores(
    entries: Sequence[Entry], groups: Groups, classes: int, networks: Sequence[str]
) -> list[dict[str, Any]]:
    """LRS and ARS of each entry and network, except of the whole training split; None where a regime is missing."""

    def means(name: str, per_class: int, network: str) -> dict[scores.Regime, float]:
        return {
            (labels, augment): statistics.fmean(row["top1"] for row in rows)
            for (one, k, labels, augment, other), rows in groups.items() if (one, k, other) == (name, per_class, network)
        }  # fmt: skip

    result = []
    for entry in entries:
        sizes = set(entry.per_class.values()) or {0}
        if entry.kind == "full" or len(sizes) > 1:  # with equal bytes the size may differ by labels
            continue
        for network in networks:
            ours, full = means(entry.name, max(sizes), network), means(FULL, 0, network)
            random = means(RANDOM, max(sizes) or max(1, entry.stored // classes), network)
            result.append({"entry": entry.title, "network": network, **scores.scores(ours, random, full)})
    return result

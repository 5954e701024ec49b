"""From trained networks to the results of a comparison: `compare.parquet` and `compare.json`.

A row of the table is an entry (a set, or real samples at one budget) with one kind of labels, with or without augmentation,
and one network:

    entry  kind  budget  labels  augment  network  mean  std  n  low  high  images  training_images  bytes
    cost_seconds  teacher_seconds  train_seconds  over_random  over_random_low  over_random_high

mean, low and high are top-1 fractions; low to high is the 95 % t-interval over n networks (null for one). cost_seconds is the
time of scoring, selection and distillation, teacher_seconds that of the teacher where its labels are used, train_seconds the
mean time of a network. over_random is the difference from as many random samples per class, with its Welch interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distill_at_scale.config.experiments import CompareSection
from distill_at_scale.core.statistics import mean_and_std, mean_interval, welch_interval
from distill_at_scale.experiments.compare import scores
from distill_at_scale.experiments.compare.sets import Entry, label_bytes
from distill_at_scale.experiments.compare.units import RANDOM

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("entry", "kind", "budget", "labels")]
    + [
        ("augment", pa.bool_()),
        ("network", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("n", pa.int64()),
    ]
    + [(name, pa.float64()) for name in ("low", "high")]
    + [(name, pa.int64()) for name in ("images", "training_images", "bytes")]
    + [(name, pa.float64()) for name in ("cost_seconds", "teacher_seconds", "train_seconds")]
    + [(name, pa.float64()) for name in ("over_random", "over_random_low", "over_random_high")]
)
Groups = Mapping[tuple[str, int, str, bool, str], Sequence[Mapping[str, Any]]]


def group(rows: Sequence[Mapping[str, Any]]) -> Groups:
    """The rows of finished jobs by (set, samples per class, labels, augmentation, network)."""
    groups: dict[tuple[str, int, str, bool, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["ipc"], row["labels"], row["augment"], row["network"]), []).append(row)
    return groups


def table(
    entries: Sequence[Entry],
    groups: Groups,
    counts: Sequence[int],
    section: CompareSection,
    epochs: int,
    teacher_seconds: float,
) -> list[dict[str, Any]]:
    """The rows of the table, in the order of the entries; `counts` are the training samples per class."""
    lines = []
    for entry in entries:
        for (name, per_class, labels, augment, network), rows in groups.items():
            if name != entry.name or per_class != entry.per_class.get(labels, 0):
                continue
            mean, std = mean_and_std([row["top1"] for row in rows])
            low, high = mean_interval(mean, std, len(rows)) or (None, None)
            stored, training = entry.images(labels, counts)
            line = {
                "entry": entry.title, "kind": entry.kind, "budget": entry.budget, "labels": labels, "augment": augment,
                "network": network, "mean": mean, "std": std, "n": len(rows), "low": low, "high": high, "images": stored,
                "training_images": training,
                "bytes": entry.bytes(labels, counts, label_bytes(labels, len(counts), section, epochs)),
                "cost_seconds": entry.cost,
                "teacher_seconds": 0.0 if labels == "hard" or (labels == "soft" and entry.own_soft) else teacher_seconds,
                "train_seconds": statistics.fmean(row["seconds"] for row in rows),
            }  # fmt: skip
            ipc = entry.per_class.get(labels) or max(1, entry.stored // len(counts))
            random = groups.get((RANDOM, ipc, labels, augment, network))
            if random and entry.kind != "full" and entry.name != RANDOM:
                other, spread = mean_and_std([row["top1"] for row in random])
                low, high = welch_interval((mean, std, len(rows)), (other, spread, len(random))) or (None, None)
                line |= {"over_random": mean - other, "over_random_low": low, "over_random_high": high}
            lines.append(line)
    return lines


def robust_scores(
    entries: Sequence[Entry], groups: Groups, classes: int, networks: Sequence[str]
) -> list[dict[str, Any]]:
    """LRS and ARS of each entry and network, except of the whole training split; None where a regime is missing."""

    def means(name: str, per_class: Mapping[str, int] | int, network: str) -> dict[scores.Regime, float]:
        return {
            (labels, augment): statistics.fmean(row["top1"] for row in rows)
            for (one, k, labels, augment, other), rows in groups.items()
            if (one, other) == (name, network)
            and k == (per_class if isinstance(per_class, int) else per_class.get(labels, 0))
        }

    full, result = next((entry.name for entry in entries if entry.kind == "full"), ""), []
    for entry in entries:
        sizes = set(entry.per_class.values()) or {max(1, entry.stored // classes)}
        for network in networks if entry.kind != "full" and len(sizes) == 1 else ():
            ours = means(entry.name, entry.per_class, network)
            random = means(RANDOM, sizes.copy().pop(), network) if sizes else {}
            result.append(
                {"entry": entry.title, "network": network, **scores.scores(ours, random, means(full, 0, network))}
            )
    return result

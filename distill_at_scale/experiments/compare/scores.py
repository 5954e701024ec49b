"""The label- and augmentation-robust scores of DD-Ranking (Li et al. 2025, arXiv 2505.13300); accuracies are fractions."""

from __future__ import annotations

import math
from collections.abc import Mapping

WEIGHT = 0.5  # w and gamma
Regime = tuple[str, bool]  # kind of labels, augmentation


def label_robust(syn_any: float, rnd_any: float, real_hard: float, syn_hard: float) -> float:
    """LRS: what a set gains over random samples with any labels, and what it loses to all real data with hard labels.

    alpha = w (syn_any - rnd_any) - (1 - w) (real_hard - syn_hard); LRS = (e^alpha - e^-1) / (e - e^-1), from 0 to 1.
    """
    return _mapped(WEIGHT * (syn_any - rnd_any) - (1 - WEIGHT) * (real_hard - syn_hard))


def augmentation_robust(syn: float, rnd: float, syn_plain: float, rnd_plain: float) -> float:
    """ARS: what a set gains over random samples with augmentation (syn, rnd) and without (syn_plain, rnd_plain)."""
    return _mapped(WEIGHT * (syn - rnd) + (1 - WEIGHT) * (syn_plain - rnd_plain))


def _mapped(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def scores(
    ours: Mapping[Regime, float], random: Mapping[Regime, float], full: Mapping[Regime, float]
) -> dict[str, float | None]:
    """Both scores of a set from mean accuracies by regime; None where a regime is missing.

    `random` has as many samples per class as the set. `any` is the best regime of the set; random samples are taken in the
    same regime. `hard` is the best regime with hard labels. The augmentation-robust score is for the labels of `any`.
    """
    best, result = max(ours, key=lambda regime: ours[regime]), dict[str, float | None](lrs=None, ars=None)
    hard = [[value for (labels, _), value in by.items() if labels == "hard"] for by in (ours, full)]
    if best in random and all(hard):
        result["lrs"] = label_robust(ours[best], random[best], max(hard[1]), max(hard[0]))
    pair = (best[0], True), (best[0], False)
    if all(regime in by for regime in pair for by in (ours, random)):
        result["ars"] = augmentation_robust(*(by[regime] for regime in pair for by in (ours, random)))
    return result

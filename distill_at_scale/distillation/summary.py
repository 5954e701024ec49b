"""From the rows of an evaluation to its summary and to differences between the distilled set and the others. Loads no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from distill_at_scale.core.statistics import CONFIDENCE, mean_and_std, welch_interval

FEW_TESTED = 50  # below, one test sample is more than two points of top-1
TESTED = {"test": "the test split", "held_out": "the held-out part of the training split"}  # names of evaluate.split


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per set and network: over n seeds the mean and sample standard deviation (None for n = 1) of top-1 and
    top-5, the mean top-1 per class (None for a class without test samples) and the mean seconds of a network.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["network"]), []).append(row)
    summary = []
    for (name, network), members in groups.items():
        line: dict[str, Any] = {"set": name, "network": network, "n": len(members)}
        for key, suffix in (("top1", ""), ("top5", "_top5")):
            line[f"mean{suffix}"], line[f"std{suffix}"] = mean_and_std([member[key] for member in members])
        if all("per_class" in member for member in members):  # not in rows of early versions
            columns = zip(*(member["per_class"] for member in members), strict=True)
            line["per_class"] = [None if None in column else round(statistics.fmean(column), 6) for column in columns]
        if all("seconds" in member for member in members):
            line["seconds"] = round(statistics.fmean(member["seconds"] for member in members), 3)
        summary.append(line)
    return summary


def tested(evaluation: Mapping[str, Any], test_samples: int) -> dict[str, Any]:
    """`split` (as evaluate.split) and `samples`: what an evaluation.json was measured on; early versions do not store it."""
    return evaluation.get("tested") or {"split": "test", "samples": test_samples}


def few_tested(samples: int, split: str = "test") -> str | None:
    """A sentence for a split that is too small for a verdict, else None."""
    if samples >= FEW_TESTED:
        return None
    more = "add test samples, or raise data.holdout" if split == "test" else "raise select.held_out"
    return (
        f"{TESTED[split]} has only {samples} samples, and each is {100 / samples:.0f} points of top-1, so accuracies say "
        f"little; {more}"
    )


def differences(summary: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Top-1 of the distilled set minus that of each other set, per network, as a fraction: mean, and low and high of the
    95 % t-interval by Welch over the evaluation networks (None where a set has a single network).

    One distillation stands behind each distilled set, so the interval does not cover what another one would give.
    """
    lines, result = list(summary), []
    ours = {line["network"]: line for line in lines if line["set"] == "distilled"}
    for theirs in lines:
        if theirs["set"] != "distilled" and (own := ours.get(theirs["network"])):
            samples = [(line["mean"], line["std"], line["n"]) for line in (own, theirs)]
            low, high = welch_interval(*samples) or (None, None)
            result.append({"network": own["network"], "against": theirs["set"], "mean": own["mean"] - theirs["mean"],
                           "low": low, "high": high, "confidence": CONFIDENCE})  # fmt: skip
    return result

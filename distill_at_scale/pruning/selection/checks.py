"""Warnings about a selection, derived from measurements that exist already: agreement, reliability and break point."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.pruning.criteria.factory import MONTE_CARLO
from distill_at_scale.pruning.scoring.reliability import TARGET, times_needed

NOISY_BELOW = 0.5  # agreement or reliability
ROUNDING = 0.005  # of a share: counts per class are whole numbers


@dataclass(frozen=True)
class BreakPoint:
    """Dropped shares at which accuracy was measured: the first that broke it, and the largest below that did not."""

    drop: float
    held: float


def selection_warnings(
    criteria: Iterable[str], table: Mapping[str, Any], kept: float, broke: BreakPoint | None, monte_carlo: Mapping[str, Any]
) -> list[str]:  # fmt: skip
    """What speaks against a selection by some criteria that keeps the share `kept` of all samples, in sentences.

    `table` and `monte_carlo` are the metadata of the score table and of the Monte Carlo table.
    """
    warnings: list[str] = []
    for name in criteria:
        agreement, trials = table.get("agreement"), int(table.get("trials", 0))
        between: Any = agreement.get("trials") if isinstance(agreement, Mapping) else None
        measured = [name] == table.get("criteria", [])[:1] and between is not None  # for the first criterion only
        if name == MONTE_CARLO:
            reliability, missing = monte_carlo.get("reliability"), monte_carlo.get("more_subsets")
            if reliability is None or reliability >= NOISY_BELOW:
                continue
            action = "no agreement was measured at all"
            if missing is not None:
                action = f"about {missing:,} more subsets would reach {TARGET:g}"
            warnings.append(
                f"the scores {name} are noisy: their reliability after {monte_carlo.get('subsets'):,} subsets is "
                f"{reliability:.2f}; {action} (score.monte_carlo.subsets)"
            )
        elif measured and between < NOISY_BELOW and (needed := times_needed(between)) > trials:
            if math.isinf(needed):
                action = "more trials cannot improve this; use another criterion, or train the proxies differently"
            else:
                action = f"{math.ceil(needed - 1e-9)} trials would reach {TARGET:g} (score.trials, now {trials})"
            warnings.append(
                f"the scores {name} are noisy: two trials agree to {between:.2f} only (rank correlation); {action}"
            )
    if broke is not None and kept <= 1 - broke.drop + ROUNDING:
        warnings.append(
            f"{1 - kept:.1%} of the samples are dropped, but on this data accuracy broke at {broke.drop:.1%} and held at "
            f"{broke.held:.1%} (studies/interaction.json); raise select.keep to {1 - broke.held:g}"
        )
    return list(dict.fromkeys(warnings))


def measured_break_point(folders: Iterable[Path]) -> BreakPoint | None:
    """The break point from the first run folder that has the interaction study, or None."""
    for folder in folders:
        try:
            study = json.loads((folder / "studies" / "interaction.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        facts = study.get("facts") if isinstance(study, dict) else None
        if isinstance(facts, dict):
            drop, held = facts.get("break_drop"), facts.get("held_drop", 0.0)
            return None if drop is None else BreakPoint(float(drop), float(held))
    return None


def monte_carlo_facts(path: Path) -> dict[str, Any]:
    """The metadata of the Monte Carlo table; empty if it is missing or unreadable."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return json.loads(metadata.get(MONTE_CARLO.encode(), b"{}"))

"""When a selection should not be trusted: what measurements that are already there say about it, in sentences.

Known are how well the trials behind the scores agree (facts of the score table), how reliable the Monte Carlo estimate is
(facts of its own table) and where accuracy broke when more was dropped (the interaction study). Nothing is measured here.
"""

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

NOISY_BELOW = 0.5  # an agreement below this is said
ROUNDING = 0.005  # of a share: counts per class are whole


@dataclass(frozen=True)
class BreakPoint:
    """Shares dropped at which accuracy was measured: the first that broke it, and the largest before, which did not."""

    drop: float
    held: float


def selection_warnings(
    criteria: Iterable[str], table: Mapping[str, Any], kept: float, broke: BreakPoint | None, monte_carlo: Mapping[str, Any]
) -> list[str]:  # fmt: skip
    """Sentences about a selection by some criteria that keeps a share of all samples; none where all is well or unknown.

    `table` holds the facts of the score table, `monte_carlo` those of the Monte Carlo table.
    """
    found: list[str] = []
    for name in criteria:
        if name == MONTE_CARLO:
            found += _of_subsets(monte_carlo)
        elif [name] == table.get("criteria", [])[:1]:  # the one whose trials' agreement was measured
            found += _of_trials(name, table.get("agreement"), int(table.get("trials", 0)))
    if broke is not None and kept <= 1 - broke.drop + ROUNDING:
        found.append(
            f"{1 - kept:.1%} of the samples are dropped, but on this data accuracy broke at {broke.drop:.1%} and held at "
            f"{broke.held:.1%} (studies/interaction.json); raise select.keep to {1 - broke.held:g}"
        )
    return list(dict.fromkeys(found))


def measured_break_point(folders: Iterable[Path]) -> BreakPoint | None:
    """The measured break point, from the first run folder that has the interaction study; None where there is none."""
    for folder in folders:
        try:
            found = json.loads((folder / "studies" / "interaction.json").read_text())
        except (OSError, ValueError):
            continue
        facts = found.get("facts") if isinstance(found, dict) else None
        if isinstance(facts, dict):
            drop, held = facts.get("break_drop"), facts.get("held_drop", 0.0)
            return None if drop is None else BreakPoint(float(drop), float(held))
    return None


def monte_carlo_facts(path: Path) -> dict[str, Any]:
    """What the Monte Carlo table says of itself; empty where it is not there or cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return json.loads(metadata.get(MONTE_CARLO.encode(), b"{}"))


def _of_trials(name: str, agreement: Any, trials: int) -> list[str]:
    between = agreement.get("trials") if isinstance(agreement, Mapping) else None
    if between is None or between >= NOISY_BELOW:
        return []
    needed = times_needed(between)
    if needed <= trials:
        return []
    if math.isinf(needed):
        action = "no number of trials mends that; take another criterion, or proxies that are trained otherwise"
    else:
        action = f"{math.ceil(needed - 1e-9)} trials would reach {TARGET:g} (score.trials, now {trials})"
    return [
        f"the scores {name} are noisy: two trials agree to {between:.2f} only (rank correlation); {action}"
    ]  # fmt: skip


def _of_subsets(facts: Mapping[str, Any]) -> list[str]:
    reliability = facts.get("reliability")
    if reliability is None or reliability >= NOISY_BELOW:
        return []
    more, subsets = facts.get("more_subsets"), facts.get("subsets")
    action = (
        "no agreement was measured at all" if more is None else f"about {more:,} more subsets would reach {TARGET:g}"
    )
    return [
        f"the scores {MONTE_CARLO} are noisy: their reliability after {subsets:,} subsets is {reliability:.2f}; {action} "
        "(score.monte_carlo.subsets)"
    ]

"""When a selection should not be trusted: what measurements that are already there say about it, in sentences.

Known are how well the trials behind the scores agree (facts of the score table), how reliable the Monte Carlo estimate is
(facts of its own table) and where accuracy broke when more was dropped (the interaction study). Nothing is measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NOISY = 0.5  # an agreement below this is said
WANTED = 0.8  # the reliability that is aimed at
MONTE_CARLO = "monte_carlo"


def spearman_brown(agreement: float, times: float) -> float:
    """The reliability of the mean of `times` as many parallel measurements, of which two agree (correlate) so well."""
    return times * agreement / (1 + (times - 1) * agreement)


def times_needed(agreement: float, wanted: float = WANTED) -> float:
    """How many times as many measurements reach a reliability (Spearman and Brown 1910); infinite where none agree."""
    if agreement <= 0:
        return math.inf
    return wanted / (1 - wanted) * (1 - agreement) / agreement if agreement < 1 else 0.0


def warnings(
    criteria: Iterable[str], table: Mapping[str, Any], kept: float, break_drop: float | None, monte_carlo: Mapping[str, Any]
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
    if break_drop is not None and kept < 1 - break_drop - 1e-9:
        found.append(
            f"{1 - kept:.1%} of the samples are dropped, but on this data accuracy broke when more than {break_drop:.1%} were "
            f"(studies/interaction.json); raise select.keep to {1 - break_drop:g}"
        )
    return list(dict.fromkeys(found))


def break_drop_of(folders: Iterable[Path]) -> float | None:
    """The measured break point, from the first run folder that has the interaction study; None where there is none."""
    for folder in folders:
        try:
            found = json.loads((folder / "studies" / "interaction.json").read_text())
        except (OSError, ValueError):
            continue
        value = found.get("facts", found).get("break_drop") if isinstance(found, dict) else None
        if isinstance(value, int | float):
            return float(value)
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
    if between is None or between >= NOISY:
        return []
    needed = times_needed(between)
    if needed <= trials:
        return []
    if math.isinf(needed):
        action = "no number of trials mends that; take another criterion, or proxies that are trained otherwise"
    else:
        action = f"{math.ceil(needed - 1e-9)} trials would reach {WANTED:g} (score.trials, now {trials})"
    return [
        f"the scores {name} are noisy: two trials agree to {between:.2f} only (rank correlation); {action}"
    ]  # fmt: skip


def _of_subsets(facts: Mapping[str, Any]) -> list[str]:
    reliability = facts.get("reliability")
    if reliability is None or reliability >= NOISY:
        return []
    more, subsets = facts.get("more_subsets"), facts.get("subsets")
    action = (
        "no agreement was measured at all" if more is None else f"about {more:,} more subsets would reach {WANTED:g}"
    )
    return [
        f"the scores {MONTE_CARLO} are noisy: their reliability after {subsets:,} subsets is {reliability:.2f}; {action} "
        "(score.monte_carlo.subsets)"
    ]

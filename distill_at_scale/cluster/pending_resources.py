"""What a stage waits for: where nothing is finished for a while because the cluster lacks room, a line says so now and then.

Ray waits for ever for cores that are busy or lost, and says nothing. Left out: what can never fit, which is refused before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec

import ray
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

EVERY = 30.0  # seconds without anything finished, before each line
ASK = 10  # seconds in which the head must answer
NAMES = {"CPU": "core", "GPU": "GPU"}

P = ParamSpec("P")


@contextmanager
def watched(
    stage: str, say: Callable[[str], None], progress: Callable[P, None], every: float = EVERY
) -> Iterator[Callable[P, None]]:
    """Yields `progress`, whose calls show that the stage gets on; lines are said while they fail to come."""
    moved, over = threading.Event(), threading.Event()

    def noted(*args: P.args, **kwargs: P.kwargs) -> None:
        moved.set()
        progress(*args, **kwargs)

    def look() -> None:
        while not over.wait(every):
            if not moved.is_set() and (line := missing(stage)) and not over.is_set():
                say(f"  {line}")
            moved.clear()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield noted
    finally:
        over.set()


def missing(stage: str) -> str | None:
    """What is asked for and cannot be placed now; None where everything is placed, or the head does not tell."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=ASK)
    except Exception:  # that the head is gone is said elsewhere
        return None
    wanted = demand(status)
    return sentence(stage, wanted, status.total_resources(), status.available_resources()) if wanted else None


def demand(status: ClusterStatus) -> Counter[tuple[tuple[str, float], ...]]:
    """How many of each bundle of resources wait for a place."""
    asked = status.resource_demands
    found: Counter[tuple[tuple[str, float], ...]] = Counter()
    for one in (*asked.ray_task_actor_demand, *asked.placement_group_demand):
        for bundle in one.bundles_by_count:
            if kinds := tuple(sorted((k, v) for k, v in bundle.bundle.items() if k in NAMES and v > 0)):
                found[kinds] += bundle.count
    return found


def sentence(stage: str, wanted: Mapping[Any, int], total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """For example: distill waits for 2 workers with 1 core each; the cluster has 1 core, 0 of them free."""
    asked = " and ".join(
        f"{count} {'worker' if count == 1 else 'workers'} with {_named(kinds)} each" for kinds, count in wanted.items()
    )
    kinds = {kind for bundle in wanted for kind, _ in bundle}
    have = " and ".join(f"{_named([(kind, total.get(kind, 0))])}, {free.get(kind, 0):g} free" for kind in sorted(kinds))
    return f"{stage} waits for {asked}; the cluster has {have}"


def _named(kinds: Any) -> str:
    return " and ".join(f"{count:g} {NAMES[kind]}{'' if count == 1 else 's'}" for kind, count in kinds)

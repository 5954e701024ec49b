"""Says which resources a stage waits for, every 30 s while the cluster lacks room.

Ray waits without end and without a message for cores that are busy or lost. A request that can never fit is refused earlier.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from distill_at_scale.pipeline.report.text import count

INTERVAL = 30.0  # seconds without progress before each line
TIMEOUT = 10  # seconds in which the head must answer
NAMES = {"CPU": "core", "GPU": "GPU"}


@contextmanager
def watched(stage: str, say: Callable[[str], None], interval: float = INTERVAL) -> Iterator[Callable[[], None]]:
    """Yields a function to call on progress; says what the stage waits for while no calls come."""
    progressed, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            if not progressed.is_set() and (line := missing(stage)) and not over.is_set():
                say(f"  {line}")
            progressed.clear()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield progressed.set
    finally:
        over.set()


def missing(stage: str) -> str | None:
    """The resources that were requested and cannot be placed now; None if there are none or the head does not answer."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=TIMEOUT)
    except Exception:  # `head_watchdog` says that the head is gone
        return None
    demands = status.resource_demands
    pending: Counter[tuple[tuple[str, float], ...]] = Counter()  # how many of each bundle of resources
    for request in (*demands.ray_task_actor_demand, *demands.placement_group_demand):
        for bundle in request.bundles_by_count:
            if kinds := tuple(sorted((k, v) for k, v in bundle.bundle.items() if k in NAMES and v > 0)):
                pending[kinds] += bundle.count
    return sentence(stage, pending, status.total_resources(), status.available_resources()) if pending else None


def sentence(stage: str, pending: Mapping[Any, int], total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """For example: distill waits for 2 workers with 1 core each; the cluster has 1 core, 0 of them free."""
    requests = " and ".join(f"{count(many, 'worker')} with {_named(kinds)} each" for kinds, many in pending.items())
    kinds = {kind for bundle in pending for kind, _ in bundle}
    have = " and ".join(f"{_named([(kind, total.get(kind, 0))])}, {free.get(kind, 0):g} free" for kind in sorted(kinds))
    return f"{stage} waits for {requests}; the cluster has {have}"


def _named(kinds: Any) -> str:
    return " and ".join(count(number, NAMES[kind]) for kind, number in kinds)

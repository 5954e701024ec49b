"""A stage reports the resources it waits for, but only while nothing has finished."""

from __future__ import annotations

import threading
import time

import pytest

ray = pytest.importorskip("ray")
from distill_at_scale.cluster import pending_resources  # noqa: E402


def test_a_sentence_names_requested_and_available_resources():
    pending = {(("CPU", 1.0),): 2, (("CPU", 4.0), ("GPU", 0.5)): 1}
    sentence = pending_resources.sentence("distill", pending, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0})
    assert sentence == (
        "distill waits for 2 workers with 1 core each and 1 worker with 4 cores and 0.5 GPUs each; "
        "the cluster has 8 cores, 1 free and 1 GPU, 0 free"
    )


def test_a_task_without_resources_is_reported_and_a_running_one_is_not(ray_session):
    @ray.remote(num_cpus=2)
    class Holder:
        def here(self):
            return True

    @ray.remote(num_cpus=1)
    def late():
        return 7

    holder = Holder.remote()
    assert ray.get(holder.here.remote())
    lines, reported = list[str](), threading.Event()
    result = late.remote()
    with pending_resources.watched(
        "evaluate", lambda line: (lines.append(line), reported.set()), interval=0.5
    ) as progressed:
        assert reported.wait(60), "nothing was reported"
        ray.kill(holder)
        assert ray.get(result) == 7
        progressed()
    assert "evaluate waits for 1 worker with 1 core each; the cluster has 2 cores, 0 free" in lines[0]


def test_nothing_is_reported_if_nothing_waits(ray_session):
    until = time.monotonic() + 60
    while (
        pending_resources.missing("score") is not None
    ):  # the head hears a little later that the last test's tasks are done
        assert time.monotonic() < until, "it is still reported"
        time.sleep(0.2)

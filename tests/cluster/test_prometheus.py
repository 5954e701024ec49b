"""Events as metrics of Ray: which counters change, and once, for real, the text that a Prometheus server scrapes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distill_at_scale.core.events import Event, instant

pytest.importorskip("ray")

from distill_at_scale.cluster import prometheus
from distill_at_scale.cluster.prometheus import PREFIX, PrometheusMetrics


class Noted:
    """In the place of Ray's counters and gauges."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
        self.name, self.keys, self.values = name, tag_keys, []
        assert description

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        assert set(tags) == set(self.keys)
        self.values.append((value, tags["stage"], tags["node"]))

    set = inc


@pytest.fixture
def metrics(monkeypatch) -> PrometheusMetrics:
    monkeypatch.setattr(prometheus, "Counter", Noted)
    monkeypatch.setattr(prometheus, "Gauge", Noted)
    return PrometheusMetrics("mine")


def work(pid: int, **values) -> Event:
    return Event("work", "decode", 10.0, 12.0, "node-1", pid, values, "ingest")


def test_work_is_counted_at_the_node_that_did_it(metrics):
    metrics(work(1, samples=8, rejected=0, read_seconds=0.5, decode_seconds=1.0, write_seconds=0.25))
    assert metrics.busy.values == [(2.0, "ingest", "node-1")]
    assert metrics.counters["samples"].values == [(8, "ingest", "node-1")]
    assert metrics.counters["rejected"].values == []  # none to count
    assert metrics.counters["decode_seconds"].values == [(1.0, "ingest", "node-1")]


def test_losses_are_counted(metrics):
    for stage in ("ingest", "ingest", "distill"):
        metrics(Event("lost", "workers", 0.0, 0.0, "driver", 9, {}, stage))
    assert [stage for _, stage, _ in metrics.lost.values] == ["ingest", "ingest", "distill"]


def test_lines_of_the_log_set_gauges(metrics):
    line = {
        "step": 5,
        "of": 9,
        "loss": 1.5,
        "step_seconds": 0.1,
        "real_share": 0.7,
        "gpu_bytes": 10,
        "gpu_peak_bytes": 20,
    }
    metrics(instant("log", "line", line, "distill"))
    shown = {gauge.name.removeprefix(PREFIX): gauge.values[0][0] for gauge in metrics.gauges.values() if gauge.values}
    assert shown == {
        "step": 5,
        "loss": 1.5,
        "step_seconds": 0.1,
        "real_share_ratio": 0.7,
        "gpu_allocated_bytes": 10,
        "gpu_peak_bytes": 20,
    }


def test_names_are_as_prometheus_wants_them(metrics):
    counters = [*metrics.counters.values(), metrics.busy, metrics.lost, metrics.stages]
    assert all(counter.name.startswith(PREFIX) and counter.name.endswith("_total") for counter in counters)
    assert not any(gauge.name.endswith("_total") for gauge in metrics.gauges.values())
    names = [metric.name for metric in (*counters, *metrics.gauges.values())]
    assert len(set(names)) == len(names)


SCRAPED = """
import socket, sys, time, urllib.request
import ray
from distill_at_scale.cluster.prometheus import PrometheusMetrics
from distill_at_scale.core.events import Event

with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    port = one.getsockname()[1]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=100 * 2**20, _metrics_export_port=port)
metrics = PrometheusMetrics("mine")
metrics(Event("work", "score", 1.0, 2.5, "node-1", 1, {"samples": 64}, "score"))
until = time.monotonic() + 120
while time.monotonic() < until:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_distill_at_scale_samples_total{")]
    if lines:
        print(lines[0])
        sys.exit(0)
    time.sleep(1)
sys.exit("the endpoint never told of it")
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ray")  # its own Ray: not at the same time as the one of other tests
def test_rays_endpoint_tells_prometheus():
    """In its own process: the session's Ray has no metrics port."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    done = subprocess.run([sys.executable, "-c", SCRAPED], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert 'run="mine"' in line
    assert 'stage="score"' in line
    assert 'node="node-1"' in line
    assert line.endswith(" 64.0")

"""A run's events as metrics of Ray (`ray.util.metrics`), which every node's metrics agent offers to Prometheus.

The driver counts what came home, so that work which was lost and done again counts once. Tags: `run` (the run folder's
name), `stage`, and `node`, the host that did the work. Counters are since the command began; a gauge is gone some minutes
after its last line of the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from distill_at_scale.core.events import Event

PREFIX = "distill_at_scale_"
TAGS = ("run", "stage", "node")
COUNTED = {  # count of an event of work -> name and description of the counter
    "samples": ("samples_total", "Samples decoded, scored or ranked"),
    "rejected": ("rejected_samples_total", "Samples set aside at ingest"),
    "read_seconds": ("read_seconds_total", "Seconds of reading, which runs beside the other work of a worker"),
    "decode_seconds": ("decode_seconds_total", "Seconds of decoding, of all workers together"),
    "forward_seconds": ("forward_seconds_total", "Seconds of networks' forward passes while scoring, of all workers"),
    "write_seconds": ("write_seconds_total", "Seconds of writing what was made, of all workers together"),
    "steps": ("worker_steps_total", "Distillation steps, of all workers together"),
    "networks": ("evaluation_networks_total", "Networks trained and tested for evaluation"),
    "subsets": ("subsets_total", "Random subsets of Monte Carlo scoring"),
}
SHOWN = {  # key of a line of the distillation's log -> name and description of the gauge
    "step": ("step", "Steps that the distillation has done"),
    "step_seconds": ("step_seconds", "Mean seconds of a distillation step since the last line of the log"),
    "loss": ("loss", "Distillation loss, mean over the classes"),
    "real_share": ("real_share_ratio", "Share of the real batch that runtime pruning left"),
    "top1": ("top1_ratio", "Top-1 accuracy of one network, on the way"),
    "gpu_bytes": ("gpu_allocated_bytes", "Bytes of tensors on the GPU of the fullest worker"),
    "gpu_peak_bytes": ("gpu_peak_bytes", "The most that they were"),
}


class PrometheusMetrics:
    """Turns events into counters and gauges."""

    name = "Ray's metrics"

    def __init__(self, run: str):
        self.run = run
        self.counters = {key: _make(Counter, *about) for key, about in COUNTED.items()}
        self.busy = _make(Counter, "busy_seconds_total", "Seconds in which workers were at work")
        self.lost = _make(Counter, "restarts_total", "Times that workers were lost and their work was begun again")
        self.stages = _make(Counter, "stage_seconds_total", "Seconds that finished stages took")
        self.gauges = {key: _make(Gauge, *about) for key, about in SHOWN.items()}
        self.seen: set[tuple[str, int]] = set()  # workers that stand in for lost ones

    def __call__(self, event: Event) -> None:
        tags = {"run": self.run, "stage": event.stage, "node": event.host}
        if event.what == "work":
            self._work(event, tags)
        elif event.what == "lost":
            self.lost.inc(1, tags)
        elif event.what == "log":
            for key in self.gauges.keys() & event.values.keys():
                self.gauges[key].set(event.values[key], tags)
        elif event.what == "stage" and event.name == "finished":
            _add(self.stages, event.seconds, tags)

    def close(self) -> None:
        pass

    def _work(self, event: Event, tags: Mapping[str, str]) -> None:
        _add(self.busy, event.seconds, tags)
        for key in self.counters.keys() & event.values.keys():
            _add(self.counters[key], event.values[key], tags)
        if "restarted" in event.values and (event.host, event.pid) not in self.seen:
            self.seen.add((event.host, event.pid))
            self.lost.inc(1, dict(tags))


def _make(kind: Any, name: str, description: str) -> Any:
    return kind(PREFIX + name, description, tag_keys=TAGS)


def _add(counter: Any, value: float, tags: Mapping[str, str]) -> None:
    if value > 0:  # Ray refuses to count nothing
        counter.inc(value, dict(tags))

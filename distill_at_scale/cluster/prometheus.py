"""A run's events as Ray metrics (`ray.util.metrics`), which every node's metrics agent exposes to Prometheus.

The driver counts delivered results, so work that was lost and repeated counts once. Tags: `run` (the run folder's name),
`stage`, and `node` (the host that did the work). Counters start with the command; a gauge disappears some minutes after its
last log line.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from distill_at_scale.core.events import Event

PREFIX = "distill_at_scale_"
TAGS = ("run", "stage", "node")
COUNTED = {  # value of a work event -> name and description of the counter
    "samples": ("samples_total", "Samples decoded, scored or ranked"),
    "rejected": ("rejected_samples_total", "Samples rejected at ingest"),
    "read_seconds": ("read_seconds_total", "Seconds of reading, in parallel to the other work of a worker"),
    "decode_seconds": ("decode_seconds_total", "Seconds of decoding, summed over workers"),
    "forward_seconds": ("forward_seconds_total", "Seconds of forward passes in scoring, summed over workers"),
    "write_seconds": ("write_seconds_total", "Seconds of writing results, summed over workers"),
    "steps": ("worker_steps_total", "Distillation steps, summed over workers"),
    "networks": ("evaluation_networks_total", "Networks trained and tested for evaluation"),
    "subsets": ("subsets_total", "Random subsets of Monte Carlo scoring"),
}
SHOWN = {  # key of a distillation log line -> name and description of the gauge
    "step": ("step", "Finished distillation steps"),
    "step_seconds": ("step_seconds", "Mean seconds of a distillation step since the last log line"),
    "loss": ("loss", "Distillation loss, mean over the classes"),
    "real_share": ("real_share_ratio", "Share of the real batch after runtime pruning"),
    "top1": ("top1_ratio", "Top-1 accuracy of one network during distillation"),
    "gpu_bytes": ("gpu_allocated_bytes", "Bytes of tensors on the GPU of the fullest worker"),
    "gpu_peak_bytes": ("gpu_peak_bytes", "Peak of these bytes"),
}


class PrometheusMetrics:
    """Turns events into counters and gauges."""

    name = "Ray's metrics"

    def __init__(self, run: str):
        self.run = run
        self.counters = {key: _make(Counter, *names) for key, names in COUNTED.items()}
        self.busy = _make(Counter, "busy_seconds_total", "Seconds in which workers worked")
        self.lost = _make(Counter, "restarts_total", "Restarts after lost workers")
        self.stages = _make(Counter, "stage_seconds_total", "Seconds of finished stages")
        self.gauges = {key: _make(Gauge, *names) for key, names in SHOWN.items()}

    def __call__(self, event: Event) -> None:
        tags = {"run": self.run, "stage": event.stage, "node": event.host}
        if event.what == "work":
            _add(self.busy, event.seconds, tags)
            for key in self.counters.keys() & event.values.keys():
                _add(self.counters[key], event.values[key], tags)
        elif event.what == "lost":
            self.lost.inc(1, tags)
        elif event.what == "log":
            for key in self.gauges.keys() & event.values.keys():
                self.gauges[key].set(event.values[key], tags)
        elif event.what == "stage" and event.name == "finished":
            _add(self.stages, event.seconds, tags)

    def close(self) -> None:
        pass


def _make(kind: Any, name: str, description: str) -> Any:
    return kind(PREFIX + name, description, tag_keys=TAGS)


def _add(counter: Any, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray refuses an increment of zero
        counter.inc(value, tags)

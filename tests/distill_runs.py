"""Start, stop and compare short distillations of the tiny run."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from conftest import tiny_config

from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.distillation.synthetic_set import SyntheticSet

CPU = torch.device("cpu")
LOOPS = {"distill__ipc": 2, "distill__dc__outer": 2, "distill__dc__inner": 2, "distill__dc__network_lr": 0.1}


def start(places: DistillPaths, workers=None, **overrides) -> Distillation:
    return Distillation(tiny_config("unused", **overrides), places, workers or SingleProcess(), CPU)


def elsewhere(places: DistillPaths, name: str) -> DistillPaths:
    return replace(places, work=places.work / name, log=places.log.with_name(f"{name}.jsonl"))


def same(first: SyntheticSet, second: SyntheticSet) -> bool:
    """Bit for bit, the snapshots too."""
    tensors = [(first.images, second.images), (first.labels, second.labels)]
    tensors += [(first.snapshots[k], second.snapshots[k]) for k in first.snapshots]
    return list(first.snapshots) == list(second.snapshots) and all(
        a.numpy().tobytes() == b.numpy().tobytes() for a, b in tensors
    )


def stop_before(distillation: Distillation, step: int) -> None:
    """Have the process end at a step, as if it were killed."""
    original = distillation.method.step

    def step_or_stop(i):
        if i == step:
            raise KeyboardInterrupt
        return original(i)

    distillation.method.step = step_or_stop


def lines(places: DistillPaths) -> list[dict]:
    written = [json.loads(line) for line in places.log.read_text(encoding="utf-8").splitlines()]
    return [line for line in written if line["stage"] == "distill"]

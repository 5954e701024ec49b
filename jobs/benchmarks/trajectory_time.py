"""Loss and gradients of one trajectory: a textbook unroll against ours, in seconds and in bytes kept by autograd.

    python jobs/benchmarks/trajectory_time.py [--steps 10] [--ipc 1] [--width 128] [--repeats 3] [--threads 1]

Synthetic images of CIFAR-10's shape. The textbook slices every parameter out of the flat vector and sends a whole batch
through the network, as published code does; our rows are the three modes of `distillation/methods/shared/unroll.py`. Rows
take turns, round by round; the first round is not counted. Bytes are the peak of tensors saved for backward passes. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from distill_at_scale.core.environment import environment
from distill_at_scale.distillation.augment import AugmentParams
from distill_at_scale.distillation.methods.shared.experts import flat
from distill_at_scale.distillation.methods.shared.unroll import (
    FlatNetwork,
    LossAndGradients,
    StudentStep,
    SyntheticData,
    TrajectorySegment,
    recomputed,
    unrolled,
)
from distill_at_scale.models.spec import NetworkSpec

CLASSES, SHAPE = 10, (3, 32, 32)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = _made_up(options, device)
    ways: dict[str, Callable[[], LossAndGradients]] = {
        "textbook": partial(textbook, *given),
        "unrolled (mtt)": partial(unrolled, *given),
        "recomputed, exact (tesla)": partial(recomputed, *given),
        "recomputed, fixed": partial(recomputed, *given, exact=False),
    }
    seconds = _measure(ways, options.repeats, device)
    base = statistics.fmean(seconds["textbook"])
    rows = {
        name: {"mean": round(statistics.fmean(s), 4), "std": round(statistics.stdev(s), 4) if len(s) > 1 else 0.0,
               "times_faster_than_textbook": round(base / statistics.fmean(s), 2), "saved_bytes": saved_bytes(ways[name])}
        for name, s in seconds.items()
    }  # fmt: skip
    about = environment()
    print(
        json.dumps({**vars(options), "rows": rows, "hardware": about["hardware"], "commit": about["commit"]}, indent=1)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of the student")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _made_up(
    options: argparse.Namespace, device: torch.device
) -> tuple[FlatNetwork, TrajectorySegment, SyntheticData, Tensor]:
    spec, chance, n = (
        NetworkSpec("convnet", SHAPE, CLASSES, options.width),
        torch.Generator().manual_seed(0),
        options.ipc * 10,
    )
    student = FlatNetwork(spec.build(0).to(device), spec.microbatch(device))
    start = flat(spec.build(1))
    target = start + 0.01 * torch.randn(len(start), generator=chance)
    steps = [
        StudentStep(torch.randperm(n, generator=chance), AugmentParams(None, torch.zeros(1, 4)))
        for _ in range(options.steps)
    ]
    images = torch.randn(n, *SHAPE, generator=chance).to(device).requires_grad_(True)
    built = SyntheticData(images, torch.arange(n, device=device) % CLASSES)
    return (
        student,
        TrajectorySegment(start.to(device), target.to(device), steps),
        built,
        torch.tensor(0.02, device=device, requires_grad=True),
    )


def textbook(student: FlatNetwork, task: TrajectorySegment, built: SyntheticData, rate: Tensor) -> LossAndGradients:
    """As in the published code: one slice per parameter, whole batches, autograd through all steps."""
    theta = task.start.clone().requires_grad_(True)
    for step in task.steps:
        views, first = {}, 0
        for name, shape, size in zip(student.names, student.shapes, student.sizes, strict=True):
            views[name] = theta[first : first + size].view(shape)
            first += size
        logits = functional_call(student.network, views, (built.images[step.rows],))
        loss = F.cross_entropy(logits, built.targets[step.rows])
        theta = theta - rate * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = F.mse_loss(theta, task.target, reduction="sum") / F.mse_loss(task.start, task.target, reduction="sum")
    return loss.detach(), list(torch.autograd.grad(loss, [built.images, rate]))


def saved_bytes(way: Callable[[], LossAndGradients]) -> int:
    """The most bytes that autograd keeps at one time; tensors that are saved twice count twice."""
    held = {"now": 0, "peak": 0}

    class Kept:
        def __init__(self, tensor: Tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        way()
    return held["peak"]


def _measure(
    ways: dict[str, Callable[[], LossAndGradients]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()

"""How long one distillation step takes: the textbook implementation against ours, with and without runtime pruning.

    python jobs/benchmarks/step_time.py [--method dc] [--real 256] [--held 500] [--repeats 5] [--threads 2]

One process, made-up pixels in CIFAR-10's shape (10 classes, 3 x 32 x 32), ConvNet-3 of width 128, one image per class.
The textbook step loops over the classes and sends each real batch through the network at once, as the published code does.
Rows are measured in turn, round by round, so that they share whatever else the machine does; the first round is not
counted. Prints one JSON object with mean and standard deviation in seconds, ratios to the textbook, hardware and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from distill_at_scale.backends.base import Setting
from distill_at_scale.backends.gradients import matched_parameters
from distill_at_scale.config import validate
from distill_at_scale.data.pool import Normalization, Pool
from distill_at_scale.distill import backend_class
from distill_at_scale.networks import NetworkSpec
from distill_at_scale.rng import derive
from distill_at_scale.rundir import environment
from distill_at_scale.workers import Solo

CLASSES, SHAPE = 10, (3, 32, 32)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool = _pool(options.held, device)
    rows: dict[str, Callable[[int], object]] = {
        "textbook": _textbook(options, pool, device),
        "ours": _ours(options, pool, device, {"rule": "none"}),
        "ours, drop 0.3, every batch looked at": _ours(
            options, pool, device, {"rule": "loss", "drop": 0.3, "refresh": 1}
        ),
        "ours, drop 0.3, remembered, refresh 10": _ours(
            options, pool, device, {"rule": "loss", "drop": 0.3, "refresh": 10}
        ),
    }
    seconds = _measure(rows, options.repeats, device)
    about = environment()
    print(json.dumps({"method": options.method, "real_batch": min(options.real, options.held), "threads": options.threads,
                      "n": options.repeats, "rows": _summary(seconds), "hardware": about["hardware"],
                      "versions": about["versions"], "commit": about["commit"]}, indent=1))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("dc", "dm"), default="dc")
    parser.add_argument("--real", type=int, default=256, help="real images per class and step")
    parser.add_argument("--held", type=int, default=500, help="real images per class in the pool")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _pool(held: int, device: torch.device) -> Pool:
    generator = torch.Generator().manual_seed(0)
    pixels = {
        c: torch.randint(256, (held, *SHAPE), generator=generator, dtype=torch.uint8).to(device) for c in range(CLASSES)
    }
    return Pool(pixels, Normalization((0.5,) * 3, (0.25,) * 3), seed=0)


def _ours(
    options: argparse.Namespace, pool: Pool, device: torch.device, runtime: dict[str, object]
) -> Callable[[int], object]:
    section = {"real_batch": options.real, "augment": "none"}
    config = validate({"distill": {"method": options.method, options.method: section}, "runtime": runtime})
    spec = NetworkSpec("convnet", SHAPE, CLASSES)
    setting = Setting(config, spec, [str(c) for c in range(CLASSES)], list(range(CLASSES)), Solo(), device, 1000)
    backend = backend_class(config)(setting)
    backend.prepare(pool)
    return backend.step


def _textbook(options: argparse.Namespace, pool: Pool, device: torch.device) -> Callable[[int], object]:
    spec = NetworkSpec("convnet", SHAPE, CLASSES)
    images = torch.randn(CLASSES, 1, *SHAPE, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([images], lr=0.1, momentum=0.5)
    loss_of = _textbook_dc if options.method == "dc" else _textbook_dm

    def step(i: int) -> None:
        network = spec.build(derive(0, "network", i)).to(device)
        loss = torch.zeros((), device=device)
        for label in range(CLASSES):
            real = pool.draw([label], options.real, "real batch", i)[0].images
            loss = loss + loss_of(network, real, images[label], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _textbook_dc(network: torch.nn.Module, real: torch.Tensor, synthetic: torch.Tensor, label: int) -> torch.Tensor:
    parameters = list(network.parameters())
    targets = torch.full((len(real),), label, device=real.device)
    real_gradient = torch.autograd.grad(F.cross_entropy(network(real), targets), parameters)
    targets = torch.full((len(synthetic),), label, device=real.device)
    ours = torch.autograd.grad(F.cross_entropy(network(synthetic), targets), parameters, create_graph=True)
    matched = {id(p) for p in matched_parameters(network)}
    total = torch.zeros((), device=real.device)
    for parameter, a, b in zip(parameters, real_gradient, ours, strict=True):
        if id(parameter) in matched:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)).sum()
    return total


def _textbook_dm(network: torch.nn.Module, real: torch.Tensor, synthetic: torch.Tensor, label: int) -> torch.Tensor:
    embed = network.requires_grad_(False).embed
    with torch.no_grad():
        target = embed(real).mean(0)
    return (target - embed(synthetic).mean(0)).square().sum()


def _measure(rows: dict[str, Callable[[int], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(repeats + 1):
        for name, step in rows.items():
            began = time.perf_counter()
            step(i)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    base = statistics.fmean(seconds["textbook"])
    return {
        name: {
            "mean": round(statistics.fmean(values), 4),
            "std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
            "times_faster_than_textbook": round(base / statistics.fmean(values), 2),
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    main()

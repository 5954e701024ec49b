"""Seconds of one evaluation network: its training on a small set and its test, by precision, against a textbook loop.

    python jobs/benchmarks/students.py [--width 128] [--pixels 32] [--ipc 1 10 50] [--rounds 3]

Random images, DSA's augmentation, one thread, CPU seconds. The textbook sends whole batches through the network in fp32, with
torch's pooling. Ways take turns, round by round; the first round is not counted. Figures are for 300 epochs and a test of
10,000 images, scaled up from `--images` images. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core import rng
from distill_at_scale.core.environment import environment, keep_freed_memory
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.image import FastAvgPool2d
from distill_at_scale.models.spec import NetworkSpec

CPU, EPOCHS, TESTED = torch.device("cpu"), 300, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--images", type=int, default=320, help="images that a round trains on, and tests")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()  # as the workers of a run
    torch.set_num_threads(1)
    spec = NetworkSpec("convnet", (3, options.pixels, options.pixels), 10, options.width)
    chance = torch.Generator().manual_seed(0)
    rows = {}
    for ipc in options.ipc:
        data = TrainingSet(torch.randn(10 * ipc, *spec.shape, generator=chance), torch.arange(10 * ipc) % 10)
        epochs = max(1, options.images // (10 * ipc))
        protocol = TrainingProtocol(epochs, SIAMESE_AUGMENT)
        ways = {p: partial(students.train, spec, data, protocol, 0, CPU, p) for p in ("fp32", "bf16")}
        rows[f"train, ipc {ipc}"] = _seconds(
            {"textbook": partial(textbook, spec, data, protocol)} | ways, options.rounds, EPOCHS / epochs
        )
    pixels = torch.randint(0, 256, (options.images, *spec.shape), dtype=torch.uint8, generator=chance)
    given = pixels, torch.arange(len(pixels)) % 10, Normalization((0.5,) * 3, (0.5,) * 3), CPU, spec.microbatch(CPU)
    tests = {p: partial(students.test, spec.build(0), *given, p) for p in ("fp32", "bf16")}
    textbook_test = partial(with_torchs_pooling, tests["fp32"])
    rows["test"] = _seconds({"textbook": textbook_test} | tests, options.rounds, TESTED / len(pixels))
    about = environment()
    print(
        json.dumps({**vars(options), "rows": rows, "hardware": about["hardware"], "commit": about["commit"]}, indent=1)
    )


def with_torchs_pooling(run: Callable[[], object]) -> None:
    with mock.patch.object(FastAvgPool2d, "forward", nn.AvgPool2d.forward):
        run()


def textbook(spec: NetworkSpec, data: TrainingSet, protocol: TrainingProtocol) -> None:
    def train() -> None:
        network = spec.build(0).train()
        optimizer = torch.optim.SGD(network.parameters(), protocol.lr, protocol.momentum, weight_decay=5e-4)
        for epoch in range(protocol.epochs):
            for images, weighted in students.epoch_batches(
                data, protocol, rng.generator(0, "epoch", epoch), merge=False
            ):
                optimizer.zero_grad()
                F.cross_entropy(network(images), weighted[0][1]).backward()
                optimizer.step()

    with_torchs_pooling(train)


def _seconds(ways: dict[str, Callable[[], object]], rounds: int, scale: float) -> dict[str, list[float]]:
    """Mean and standard deviation of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if i:
                seconds[name].append((time.process_time() - began) * scale)
    return {name: [round(f(s), 2) for f in (statistics.fmean, statistics.stdev)] for name, s in seconds.items()}


if __name__ == "__main__":
    main()

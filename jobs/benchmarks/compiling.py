"""When compiling pays, and whether compiled gradients are as exact as eager ones.

    python jobs/benchmarks/compiling.py rates [--cases 8,32,140 32,32,64 32,128,16 64,128,4]
    python jobs/benchmarks/compiling.py gradients CIFAR10 [--seeds 10] [--images 256] [--smooth]

`rates`: CPU microseconds per sample of a ConvNet on one thread, eager and compiled, in fp32 and bf16, for training and
inference, and the seconds of the first call, which compiles. A case is side, width, batch. `ForwardMode` has its constants
from these figures; set TORCHINDUCTOR_CACHE_DIR to an empty folder to count all of compiling.

`gradients`: the gradient of a real batch, as DC matches it, and the gradient that follows from it in a synthetic image, both
against eager code in float64; relative L2 error and largest error over the largest entry, on images of CIFAR10 (a folder of
Parquet files) and on noise, with one random ConvNet-3 of width 128 per seed. `--smooth` has GELU for ReLU.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distill_at_scale.core.environment import keep_freed_memory
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    cosine_distance,
    gradient_in_parts,
    matched_parameters,
)
from distill_at_scale.models.forward_mode import OPTIONS
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec
from jobs.benchmarks import textbook

CPU = torch.device("cpu")
CODES = (("eager", "fp32"), ("eager", "bf16"), ("compiled", "fp32"), ("compiled", "bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rates", "gradients"])
    parser.add_argument("data", nargs="?", type=Path, help="gradients: a folder of CIFAR-10 in Parquet files")
    parser.add_argument("--cases", nargs="+", default=["8,32,140", "8,64,140", "32,32,64", "32,128,16", "64,128,4"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--smooth", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()  # as the workers of a run
    torch.set_num_threads(1)
    if options.what == "gradients":
        return gradients(options)
    for case in options.cases:
        for train in (True, False):
            for code, precision in CODES:
                print(json.dumps(rate(*map(int, case.split(",")), code, precision, train)), flush=True)


def rate(side: int, width: int, batch: int, code: str, precision: str, train: bool) -> dict[str, Any]:
    spec = NetworkSpec("convnet", (3, side, side), 10, width)
    layout = spec.memory_format("train" if train else "score", CPU, code == "compiled")
    network = layout.network(spec.build(0)).requires_grad_(train)
    images, labels = layout.images(torch.randn(batch, *spec.shape)), torch.randint(10, (batch,))

    def logits(images: Tensor) -> Tensor:
        with autocast(precision, CPU):
            return network(images)

    torch.compiler.reset()
    forward = torch.compile(logits, **OPTIONS) if code == "compiled" else logits

    def step() -> None:
        result = forward(images)
        if train:
            torch.autograd.grad(F.cross_entropy(result, labels), list(network.parameters()))

    began = time.perf_counter()
    step()
    first, times = time.perf_counter() - began, []
    for _ in range(5):
        began, count = time.process_time(), 0
        while time.process_time() - began < 0.4 or count < 2:
            step()
            count += 1
        times.append(1e6 * (time.process_time() - began) / count / batch)
    about = {"side": side, "width": width, "batch": batch, "train": train, "code": code, "precision": precision}
    return {
        **about,
        "us": round(min(times), 1),
        "median": round(statistics.median(times), 1),
        "first_s": round(first, 1),
    }


def gradients(options: argparse.Namespace) -> None:
    spec = NetworkSpec("convnet", (3, 32, 32), 10, 128)
    ours, traced = (smooth(spec.build(0), options.smooth) for _ in range(2))
    compiled = torch.compile(lambda images: traced(images), **OPTIONS)
    errors: dict[str, list[list[float]]] = defaultdict(list)
    for seed in range(options.seeds):
        for network in (ours, traced):
            spec.renew(network, seed)
        exact, label = smooth(textbook.plain(spec.build(seed)), options.smooth).double(), seed % 10
        start = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(seed)).double()
        for kind, real in (("CIFAR-10", photographs(options, label)), ("noise", noise(options, seed))):
            truth, parts = real_gradient(exact, exact, real, label, 32), spec.microbatch(CPU)
            own, theirs = (
                real_gradient(forward, network, real.float(), label, parts)
                for forward, network in ((ours, ours), (compiled, traced))
            )
            for code, found in (("eager", own), ("compiled", theirs)):
                wide = [g.double() for g in found]
                errors[f"{kind}, {code}: real"].append(error(wide, truth))
                pair = [[image_gradient(exact, start, label, g)] for g in (wide, truth)]
                errors[f"{kind}, {code}: image"].append(error(*pair))
    for name, rows in errors.items():
        table = np.array(rows)
        found = {"median": np.median(table, 0), "mean": table.mean(0), "largest": table.max(0)}
        shown = {key: [f"{value:.1e}" for value in values] for key, values in found.items()}
        print(json.dumps({"row": name, "n": len(rows), "relative L2 and largest error": shown}))


def smooth(network: nn.Module, wanted: bool) -> nn.Module:
    for name, module in list(network.named_modules()) if wanted else ():
        if isinstance(module, nn.ReLU):
            network.set_submodule(name, nn.GELU())
    return network


def photographs(options: argparse.Namespace, label: int) -> Tensor:
    table = pq.read_table(next(options.data.glob("train*.parquet"))).slice(0, 30 * options.images)
    rows = np.flatnonzero(table["label"].to_numpy() == label)[: options.images]
    images = [np.asarray(Image.open(io.BytesIO(table["image"][int(row)].as_py()["bytes"]))) for row in rows]
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255 - 0.47) / 0.25


def noise(options: argparse.Namespace, seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(256, (options.images, 3, 32, 32), generator=chance).double() / 255 - 0.5


def real_gradient(forward: Any, network: nn.Module, images: Tensor, label: int, parts: int) -> list[Tensor]:
    targets = torch.full((len(images),), label)
    return gradient_in_parts(forward, matched_parameters(network), images, targets, len(images), parts)


def image_gradient(network: nn.Module, start: Tensor, label: int, real: list[Tensor]) -> Tensor:
    leaf = start.clone().requires_grad_(True)
    loss = F.cross_entropy(network(leaf), torch.tensor([label]))
    own = torch.autograd.grad(loss, matched_parameters(network), create_graph=True)
    return torch.autograd.grad(cosine_distance([g[None] for g in real], [g[None] for g in own]).sum(), leaf)[0]


def error(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    a, b = (torch.cat([g.double().flatten() for g in gradient]) for gradient in (found, truth))
    return [float((a - b).norm() / b.norm()), float((a - b).abs().max() / b.abs().max())]


if __name__ == "__main__":
    main()

"""Scoring on one GPU without Ray: the pass from shards as a fraction of the bare model's rate, and the gain of a shared read.

    python jobs/benchmarks/scoring_gpu.py [--samples 100000] [--samples-224 10000] [--small 16]

Synthetic images. For a ConvNet-4 of width 128 at 64 x 64 (raw shards) and a ResNet-18 at 224 x 224 (JPEG shards): the rate of
the compiled bf16 forward pass on images in device memory, and of the product's scorer from shards. For a small ConvNet (width
`--small`, 64 x 64): ten checkpoints in one read against ten reads with one each. Also runs on a CPU, slowly.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np
import torch
from side_by_side import Row, show

from distill_at_scale.config.load import validate
from distill_at_scale.core import safetensors_io
from distill_at_scale.data.codecs.image import encode
from distill_at_scale.data.prepared.format import (
    group_rows,
    schema,
    to_jpeg_table,
    to_table,
    write_meta,
    write_shards,
)
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import MemoryFormat, NetworkSpec, in_parts
from distill_at_scale.pruning.proxies.train import checkpoint_path
from distill_at_scale.pruning.scoring.scorer import Scorer

MANY, CLASSES, CHUNK = 10, 10, 1024


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, rows = Path(tempfile.mkdtemp(prefix="scoring-gpu-")), []
    try:
        for built in (
            lambda: _share("convnet", 64, 128, options.samples, folder / "convnet", device),
            lambda: _share("resnet18_bn", 224, 64, options.samples_224, folder / "resnet", device),
            lambda: _one_read(options, folder / "small", device),
        ):
            rows += built()
            print(rows[-2:], file=sys.stderr, flush=True)  # so that a run cut short leaves something
    finally:
        shutil.rmtree(folder)
    show(
        f"scoring on {torch.cuda.get_device_name() if device.type == 'cuda' else 'a CPU'}",
        rows,
        {"options": vars(options)},
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--samples-224", type=int, default=10_000)
    parser.add_argument("--small", type=int, default=16, help="width of the small network")
    return parser.parse_args()


def _share(network: str, size: int, width: int, samples: int, folder: Path, device: torch.device) -> list[Row]:
    spec = _prepare(network, size, width, samples, folder, 1)
    alone, ours = _alone(spec, device, samples), samples / _score(spec, folder, 1, device)
    return [(f"{network} at {size} x {size}: the model alone, bf16, compiled", alone, None),
            (f"{network} at {size} x {size}: scored from shards", ours, ours / alone)]  # fmt: skip


def _one_read(options: argparse.Namespace, folder: Path, device: torch.device) -> list[Row]:
    spec = _prepare("convnet", 64, options.small, options.samples, folder, MANY)
    together = options.samples / _score(spec, folder, MANY, device)
    apart = options.samples / (MANY * _score(spec, folder, 1, device))
    return [(f"width {options.small}: ten reads with one checkpoint each", apart, None),
            (f"width {options.small}: ten checkpoints in one read", together, together / apart)]  # fmt: skip


def _prepare(network: str, size: int, width: int, samples: int, folder: Path, checkpoints: int) -> NetworkSpec:
    """Shards of smooth noise, 1024 different images over and over, and random weights."""
    draw, shape = np.random.default_rng(0), (3, size, size)
    coarse = draw.integers(0, 256, (CHUNK, 3, size // 8, size // 8), np.uint8)
    pixels = coarse.repeat(8, 2).repeat(8, 3)
    jpeg = size > 128
    images = [encode(image, 90) for image in pixels] if jpeg else None
    tables = []
    for start in range(0, samples, CHUNK):
        count, label = min(CHUNK, samples - start), start * CLASSES // samples
        ids, labels = [f"{label}/{start + i:09d}" for i in range(count)], [label] * count
        built = to_jpeg_table(ids, labels, images[:count], shape) if images else to_table(ids, labels, pixels[:count])
        tables.append(built)
    write_shards(folder / "prepared" / "train", tables, schema(shape, jpeg), group_rows(shape, jpeg, CHUNK))
    counts = [sum(t.num_rows for t in tables if t["label"][0].as_py() == c) for c in range(CLASSES)]
    write_meta(folder / "prepared", {"class_names": [str(c) for c in range(CLASSES)], "shape": list(shape), "jpeg": jpeg,
               "counts": {"train": counts}, "mean": [0.5] * 3, "std": [0.25] * 3, "chunk": CHUNK}, "benchmark")  # fmt: skip
    spec = NetworkSpec(network, shape, CLASSES, width)
    for epoch in range(checkpoints):
        state = {f"weight.{key}": value for key, value in spec.build(epoch).state_dict().items()}
        safetensors_io.save(checkpoint_path(folder / "proxies", 0, epoch), state)
    return spec


@torch.no_grad()
def _alone(spec: NetworkSpec, device: torch.device, samples: int) -> float:
    network = MemoryFormat(spec, True).network(spec.build(0).to(device)).eval().requires_grad_(False)
    forward, at_once = torch.compile(network, dynamic=False), spec.microbatch(device)
    images = MemoryFormat(spec, True).images(torch.randn(at_once, *spec.shape, device=device))
    with autocast("auto", device):
        in_parts(forward, images, at_once)
        _wait(device)
        began = time.perf_counter()
        for _ in range(rounds := max(1, samples // at_once)):
            forward(images)
        _wait(device)
    return rounds * at_once / (time.perf_counter() - began)


def _score(spec: NetworkSpec, folder: Path, count: int, device: torch.device) -> float:
    """Seconds for the whole split, after a first chunk that is not counted."""
    section: dict[str, Any] = {
        "trials": 1,
        "epochs": count,
        "network": spec.name,
        "width": spec.width,
        "compile": "always",
    }
    scorer = Scorer(validate({"score": section}), folder / "prepared", folder / "proxies", device)
    pieces = Path(tempfile.mkdtemp(dir=folder))
    units = [(chunk, pieces / f"{chunk.index}.parquet") for chunk in scorer.prepared.chunks()]
    list(scorer.score(units[:1]))
    _wait(device)
    began = time.perf_counter()
    done = sum(scorer.score(units[1:]))
    _wait(device)
    return (time.perf_counter() - began) * sum(chunk.rows for chunk, _ in units) / max(done, 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

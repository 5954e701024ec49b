"""Scoring from shards against the hardware's limit and against common practice, in samples per second.

    python jobs/benchmarks/scoring.py --path IMAGEFOLDER [--size 64] [--width 32] [--samples 600000] [--rows roof,ours,...]

The images of IMAGEFOLDER (`train/<class>/*`) are decoded once and scored repeatedly. A ConvNet scores them with 1 and with 10
checkpoints; every row runs for about a minute. `roof`: one plain process per core with the compiled forward pass, normalised
floats in memory. `ours`: the product's scoring pass on Ray, one actor per core, in steady state. `loader`: a plain DataLoader
over the JPEGs and an eager loop. `naive`: ray.data.read_images().map_batches(actor) in steady state with one actor, because
reading needs the other core. Compare rows of one run only; with several checkpoints a sample counts once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from side_by_side import Clock, Row, image_options, roof, show
from torch import Tensor, nn

from distill_at_scale.config.load import validate
from distill_at_scale.core import safetensors_io
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import group_rows, schema, to_table, write_meta, write_shards
from distill_at_scale.models import precision
from distill_at_scale.models.spec import MemoryFormat, NetworkSpec, in_parts
from distill_at_scale.pruning.proxies.train import checkpoint_path

ROWS = ("roof", "ours", "one actor", "loader", "naive")
MANY = 10
SLOW = 80_000  # samples that the slow rows are offered at most
HELD = 80_000  # samples in the shards (1 GB), which are read again and again: the disk is not what is measured
LONG = 60  # seconds after which the slow rows stop


def main() -> None:
    options = _options()
    wanted = options.rows.split(",")
    folder = Path(tempfile.mkdtemp(prefix="scoring-"))
    try:
        files, prepared = _prepare(options, folder)
        result: dict[str, dict[int, float]] = {}
        for count in (1, MANY):
            for row in wanted:
                if row not in ("one actor", "naive") or count == 1:
                    rate = _measure(row, count, options, folder, prepared, files)
                    result.setdefault(row, {})[count] = rate
                    print(f"{row}, {count} checkpoint(s): {rate:.1f} samples/s", flush=True)
        show(
            f"ConvNet width {options.width}, {options.size} x {options.size}", _rows(result), {"options": vars(options)}
        )
    finally:
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = image_options(__doc__)
    parser.set_defaults(network="convnet")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=600_000, help="with one checkpoint; a tenth with ten")
    parser.add_argument("--rows", default=",".join(ROWS))
    return parser.parse_args()


def _rows(result: dict[str, dict[int, float]]) -> list[Row]:
    names = {
        "roof": "roof: compiled forward alone, plain processes",
        "ours": "ours: from shards, one actor per core",
        "one actor": "ours: one actor on one core (ratio: all actors against it)",
        "loader": "DataLoader over the JPEGs, eager loop (ratio: ours against it)",
        "naive": "naive Ray Data over the JPEGs (ratio: ours against it)",
    }
    rows: list[Row] = []
    for row, rates in result.items():
        for count, rate in rates.items():
            ours, best = result.get("ours", {}).get(count), result.get("roof", {}).get(count)
            ratio = (
                rate / best if row == "ours" and best else ours / rate if row not in ("ours", "roof") and ours else None
            )
            rows.append((f"{names[row]}, {count} checkpoint{'s' * (count > 1)}", round(rate, 1), ratio))
    return rows


def _prepare(options: argparse.Namespace, folder: Path) -> tuple[list[str], Path]:
    """The files, shards with as many samples as are asked for, and random weights as checkpoints."""
    files = sorted(str(path) for path in Path(options.path, "train").rglob("*.*"))
    names = sorted({Path(file).parent.name for file in files})
    labels = np.array([names.index(Path(file).parent.name) for file in files])
    decoder = ImageDecoder(options.size)
    pixels = np.stack([decoder(Path(file).read_bytes()) for file in files])
    copies = -(-HELD // len(files))
    tables = []
    for label in range(len(names)):
        rows = np.flatnonzero(labels == label)
        ids = [[f"{label:03d}/{copy:04d}-{row:06d}" for row in rows] for copy in range(copies)]
        tables += [to_table(some, labels[rows].tolist(), pixels[rows]) for some in ids]
    prepared = folder / "prepared"
    kind = schema(decoder.shape)
    write_shards(prepared / "train", tables, kind, group_rows(decoder.shape, False, 1024))
    counts = (np.bincount(labels) * copies).tolist()
    write_meta(prepared, {"class_names": names, "shape": list(decoder.shape), "counts": {"train": counts},
                          "mean": [0.45] * 3, "std": [0.25] * 3, "chunk": 1024}, "benchmark")  # fmt: skip
    write_checkpoints(folder / "proxies", NetworkSpec("convnet", decoder.shape, len(names), options.width))
    return files, prepared


def write_checkpoints(folder: Path, spec: NetworkSpec) -> None:
    """Random weights as the checkpoints of one trial."""
    for epoch in range(MANY):
        state = {f"weight.{key}": value for key, value in spec.build(epoch).state_dict().items()}
        safetensors_io.save(checkpoint_path(folder, 0, epoch), state)


def _measure(
    row: str, count: int, options: argparse.Namespace, folder: Path, prepared: Path, files: list[str]
) -> float:
    samples = options.samples // count
    if row == "roof":
        return roof(
            forward_alone,
            options.cores,
            str(prepared),
            str(folder / "proxies"),
            options.network,
            options.width,
            count,
            samples,
        )
    if row in ("ours", "one actor"):
        actors = options.cores if row == "ours" else 1
        return ours(options, folder, prepared, count, samples // (1 if row == "ours" else 2), actors)
    spec = NetworkSpec(
        "convnet", PreparedDataset(prepared).shape, len(PreparedDataset(prepared).class_names), options.width
    )
    states = [_weights(folder / "proxies", epoch) for epoch in range(count)]
    measure = _loader if row == "loader" else _naive
    return measure(spec, states, files, options, min(samples, SLOW))


def _weights(folder: Path, epoch: int) -> dict[str, Tensor]:
    result = safetensors_io.load(checkpoint_path(folder, 0, epoch))
    return {key.removeprefix("weight."): value for key, value in result.items()}


@torch.no_grad()
def forward_alone(
    core: int,
    cores: int,
    ready: Callable[[], None],
    prepared: str,
    proxies: str,
    network: str,
    width: int,
    count: int,
    samples: int,
) -> int:
    """The fastest forward passes that we know of: compiled, channels last, bf16 where the cores have it, one thread."""
    torch.set_num_threads(1)
    data = PreparedDataset(prepared)
    spec = NetworkSpec(network, data.shape, len(data.class_names), width)
    pixels = torch.from_numpy(np.array(data.pixels(data.read(data.chunks()[core]))))
    at_once = spec.microbatch(torch.device("cpu"))
    images = ((pixels.float() / 255 - 0.45) / 0.25)[: len(pixels) // at_once * at_once]
    images = MemoryFormat(spec, True).images(images)
    model = MemoryFormat(spec, True).network(spec.build(0).eval().requires_grad_(False))
    states, forward = [_weights(Path(proxies), epoch) for epoch in range(count)], torch.compile(model, dynamic=False)
    with precision.autocast(precision.resolve("auto", False), torch.device("cpu")):  # as ours
        forward(images[:at_once])
        done = 0
        ready()
        while done < samples // cores:
            for state in states:
                model.load_state_dict(state)
                in_parts(forward, images, at_once)
            done += len(images)
    return done


def ours(options: argparse.Namespace, folder: Path, prepared: Path, count: int, samples: int, actors: int) -> float:
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.pipeline.executors import tasks

    config = validate({"score": {"trials": 1, "epochs": count, "network": options.network, "width": options.width,
                                 "compile": "always"},
                       "cluster": {"actors": actors}})  # fmt: skip
    held = PreparedDataset(prepared).chunks()
    chunks = [replace(held[i % len(held)], index=i) for i in range(-(-samples // held[0].rows))]  # again and again
    pieces = folder / f"pieces-{count}-{actors}"
    pieces.mkdir()
    executor, clock = RayExecutor(config, lambda text: None), Clock(warm=2 * actors)
    try:
        tasks.score(executor, config, prepared, folder / "proxies", chunks, pieces, clock)
    finally:
        executor.close()
    print(f"  steady state of {clock.seconds:.0f} s")
    return clock.rate


class Jpegs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """What a plain script does: Pillow, torchvision's transforms, one file at a time."""

    def __init__(self, files: list[str], size: int, samples: int):
        from torchvision import transforms

        self.files, self.samples = files, samples
        self.transform = transforms.Compose([
            transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize([0.45] * 3, [0.25] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.open(self.files[i % len(self.files)]).convert("RGB")), 0


@torch.no_grad()
def _loader(spec: NetworkSpec, states: list[Any], files: list[str], options: argparse.Namespace, samples: int) -> float:
    torch.set_num_threads(options.cores)
    networks = [_loaded(spec, state) for state in states]
    data = torch.utils.data.DataLoader(Jpegs(files, options.size, samples), 256, num_workers=options.cores)
    clock = Clock(warm=2)
    for images, labels in data:
        for network in networks:
            F.cross_entropy(network(images), labels, reduction="none")
        clock(len(labels))
        if clock.seconds > LONG:
            break
    print(f"  steady state of {clock.seconds:.0f} s")
    return clock.rate


def _loaded(spec: NetworkSpec, state: dict[str, Tensor]) -> nn.Module:
    network = spec.build(0).eval().requires_grad_(False)
    network.load_state_dict(state)
    return network


class Naive:
    """The actor of a first attempt: all checkpoints, eager, on the decoded images that come in the blocks."""

    def __init__(self, spec: NetworkSpec, states: list[dict[str, Tensor]]):
        self.networks = [_loaded(spec, state) for state in states]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = (torch.from_numpy(np.stack(batch["image"])).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25
        labels = torch.zeros(len(images), dtype=torch.long)
        losses = [F.cross_entropy(network(images), labels, reduction="none") for network in self.networks]
        return {"loss": torch.stack(losses, 1).mean(1).numpy()}


def _naive(spec: NetworkSpec, states: list[Any], files: list[str], options: argparse.Namespace, samples: int) -> float:
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=2 * 2**30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    many = (files * -(-samples // len(files)))[:samples]
    data = ray.data.read_images(many, size=(options.size, options.size), mode="RGB")
    scored = data.map_batches(Naive, batch_size=256, concurrency=1, num_cpus=1,
                              fn_constructor_kwargs={"spec": spec, "states": states})  # fmt: skip
    clock = Clock(warm=2)
    for batch in scored.iter_batches(batch_size=256, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        clock(batch.num_rows)
        if clock.seconds > LONG:
            break
    ray.shutdown()
    time.sleep(2)
    print(f"  steady state of {clock.seconds:.0f} s")
    return clock.rate


if __name__ == "__main__":
    main()

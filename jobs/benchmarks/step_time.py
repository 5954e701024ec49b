"""Seconds of one image update: a textbook implementation against ours, with and without runtime pruning.

    python jobs/benchmarks/step_time.py [--method dc idc] [--ipc 1 10] [--classes 10] [--clips] [--real 256] [--threads 2]

One process, synthetic pixels: images of CIFAR-10's shape with ConvNet-3, or clips of 8 frames with ConvNet3D, width 128. One
update of all classes' images under one new network, without augmentation and without training that network. Rows take turns,
round by round, so that they share the machine's other load; the first round is not counted and compares the gradients of the
images with the textbook's. Prints one JSON object with mean and standard deviation in seconds, ratios to the textbook,
hardware and commit; a row that cannot run gives the reason. `trajectory_time.py` measures trajectory methods (mtt, tesla).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from distill_at_scale.config.load import validate
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.environment import environment, keep_freed_memory
from distill_at_scale.core.rng import derive
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.engine import method_class
from distill_at_scale.distillation.methods.base import ImageMethod
from distill_at_scale.distillation.methods.contract import MethodContext
from distill_at_scale.models.spec import NetworkSpec
from jobs.benchmarks import textbook

METHODS = tuple(textbook.LOSSES)
RULES = {
    "ours": {"rule": "none"},
    "ours, bf16": {"rule": "none"},
    "ours, loss, every batch looked at": {"rule": "loss", "drop": 0.3, "refresh": 1},
    "ours, loss, refresh 10": {"rule": "loss", "drop": 0.3, "refresh": 10},
    "ours, ite, every batch looked at": {"rule": "ite", "drop": 0.3, "refresh": 1},
    "ours, ite, refresh 10": {"rule": "ite", "drop": 0.3, "refresh": 10},
}
ROWS = ["textbook", "textbook, loss", *RULES]
Row = Callable[[int], torch.Tensor]  # a step -> the gradient of the images


def main() -> None:
    options = _options()
    keep_freed_memory()  # as the workers of a run
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = {}
    for method in options.method:
        for ipc in options.ipc:
            torch.compiler.reset()  # so that the rows of all tables do not count as recompilations of one function
            rows = rows_of(options, method, ipc, device)
            tables[name := f"{method}, ipc {ipc}"] = _summary(*_measure(rows, options.repeats, device))
            print(
                json.dumps({name: tables[name]}), file=sys.stderr, flush=True
            )  # so that a run cut short leaves something
    about = environment()
    asked = {key: getattr(options, key) for key in ("classes", "clips", "size", "width", "real", "threads")}
    facts = {key: about[key] for key in ("hardware", "versions", "commit")}
    print(json.dumps({**asked, "n": options.repeats, "tables": tables, **facts}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["dc"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--clips", action="store_true", help="clips of 8 frames in the place of images")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--width", type=int, default=128, help="channels of the network")
    parser.add_argument("--real", type=int, default=256, help="real images per class and step")
    parser.add_argument("--held", type=int, default=500, help="real images per class in the pool")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="all rows, unless named")
    parser.add_argument("--precision", default="fp32", help="distill.precision of the rows that do not name theirs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def rows_of(options: argparse.Namespace, method: str, ipc: int, device: torch.device) -> dict[str, Row]:
    pool, start = _pool(options, device), _backend(options, method, ipc, device, "ours")
    start.prepare(pool)
    images = start.images.detach().clone()
    rows = {
        "textbook": _textbook(options, method, pool, images, 0.0),
        "textbook, loss": _textbook(options, method, pool, images, 0.3),
    }
    for name in RULES:
        if name in options.rows:
            backend = _backend(options, method, ipc, device, name)
            backend.prepare(pool)
            rows[name] = _ours(backend, images)
    return {name: row for name, row in rows.items() if name in options.rows}


def _shape(options: argparse.Namespace) -> tuple[int, ...]:
    return (*((8,) if options.clips else ()), 3, options.size, options.size)


def _spec(options: argparse.Namespace) -> NetworkSpec:
    return NetworkSpec("convnet3d" if options.clips else "convnet", _shape(options), options.classes, options.width)


def _pool(options: argparse.Namespace, device: torch.device) -> ClassSampler:
    chance, shape = torch.Generator().manual_seed(0), (max(options.real, options.held), *_shape(options))
    pixels = {
        c: torch.randint(256, shape, generator=chance, dtype=torch.uint8).to(device) for c in range(options.classes)
    }
    return ClassSampler(pixels, Normalization((0.5,) * 3, (1.0,) * 3), seed=0)  # so that IDC's rate needs no scale


def _backend(options: argparse.Namespace, method: str, ipc: int, device: torch.device, row: str) -> ImageMethod:
    loops: dict[str, dict[str, object]] = {"dc": {"outer": 1}, "dsa": {"outer": 1}, "idc": {"inner": 1}, "dm": {}}
    section = {"real_batch": options.real, "augment": "none", "image_lr": 1e-30, "init": "noise", **loops[method]}
    section |= {"synthetic_batch": 10_000} if method == "idc" else {}
    precision = "bf16" if "bf16" in row else options.precision
    distill = {"method": method, "ipc": ipc, "precision": precision, method: section}
    config = validate({"distill": distill, "runtime": RULES[row]})
    classes = list(range(options.classes))
    setting = MethodContext(config, _spec(options), [str(c) for c in classes], classes, SingleProcess(), device, 1000)
    built = method_class(config)(setting)
    assert isinstance(built, ImageMethod)
    return built


def _ours(backend: ImageMethod, images: torch.Tensor) -> Row:
    def step(i: int) -> torch.Tensor:
        with torch.no_grad():
            backend.images.copy_(images)
        backend.step(i)
        assert backend.images.grad is not None
        return backend.images.grad

    return step


def _textbook(options: argparse.Namespace, method: str, pool: ClassSampler, images: torch.Tensor, drop: float) -> Row:
    spec = _spec(options)

    def step(i: int) -> torch.Tensor:
        network = textbook.plain(spec.build(derive(0, "network", i))).to(images.device)
        index = (i,) if method == "dm" else (i, 0)
        real = [pool.draw([c], options.real, "real batch", *index)[0].images for c in range(options.classes)]
        return textbook.image_gradient(method, network, real, images, drop)

    return step


def _measure(rows: dict[str, Row], repeats: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each row, and what the first round says of it."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    notes: dict[str, str] = {}
    gradients: dict[str, torch.Tensor] = {}
    for i in range(repeats + 1):
        for name, step in rows.items():
            if name not in seconds:
                continue
            began = time.perf_counter()
            try:
                gradient = step(i)
            except NotImplementedError:
                del seconds[name]
                notes[name] = "not there yet"
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
            else:
                gradients[name] = gradient.clone()
    twins = {"ours": "textbook", "ours, bf16": "textbook", "ours, loss, every batch looked at": "textbook, loss"}
    for name, twin in twins.items():
        if name not in gradients or twin not in gradients:
            continue
        off = float((gradients[name] - gradients[twin]).abs().max() / gradients[twin].abs().max())
        notes[name] = f"gradients differ from the textbook's by {off:.1e} of the largest"
    return seconds, notes


def _summary(seconds: dict[str, list[float]], notes: dict[str, str]) -> dict[str, dict[str, object]]:
    base = statistics.fmean(seconds["textbook"])
    table: dict[str, dict[str, object]] = {}
    for name, values in seconds.items():
        mean = statistics.fmean(values)
        spread = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
        table[name] = {"mean": round(mean, 4), "std": spread, "times_faster_than_textbook": round(base / mean, 2)}
    for name, note in notes.items():
        table.setdefault(name, {})["note"] = note
    return table


if __name__ == "__main__":
    main()

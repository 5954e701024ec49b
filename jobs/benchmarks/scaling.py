"""Strong and weak scaling of scoring and of distillation from one real core to two, against plain processes.

    python jobs/benchmarks/scaling.py [--repeats 3] [--parts scoring,dm,dc] [--samples 16384] [--steps 40]

Strong: the same work (samples; classes) for two actors or workers as for one. Weak: twice the work for two. Scoring runs in
the product's actor pool with a ConvNet of width 32 at 32 x 32 and four checkpoints; distillation in Ray Train workers of one
thread each, DM (no communication) and DC (one all-reduce per inner batch). Plain: the same functions in one or two processes
without Ray, each pinned to a core with its own part of the work and no waiting, which shows the machine's own limit. Rates
are of the steady state; the start of actors or workers is a separate column. The cases take turns, `--repeats` times. Prints
tables with mean and standard deviation, and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import dummy_data
import ray
import torch
from side_by_side import Clock, columns, roof

from distill_at_scale.config.load import Config, validate
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.environment import environment
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.pruning.scoring.scorer import Scorer

SHAPE, CHUNK, EPOCHS = (3, 32, 32), 512, 4
CLASSES, HELD, REAL, WIDTH = 32, 64, 32, 32  # of the distilled set: classes for one worker, samples of each, in a batch
STORE_MB = 200
CPU = torch.device("cpu")


@dataclass
class Case:
    """One kind of measurement; `run` returns units of work per second and the seconds of its start."""

    name: str
    run: Callable[[Path], tuple[float, float]]
    rates: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)


def main() -> None:
    options = _options()
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=options.folder) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                 object_store_memory=STORE_MB * 2**20)  # fmt: skip
        try:
            for part in options.parts.split(","):
                cases = scoring(options, Path(folder)) if part == "scoring" else distilling(options, part, Path(folder))
                tables[part] = _rows(_in_turn(cases, options.repeats, Path(folder) / part))
                print(columns(f"{part}, {UNITS[part]} per s, n = {options.repeats}", tables[part]), flush=True)
        finally:
            ray.shutdown()
    about = environment()
    print(json.dumps({"tables": tables, "options": vars(options), "hardware": about["hardware"],
                      "versions": about["versions"], "commit": about["commit"]}))  # fmt: skip


UNITS = {"scoring": "samples", "dm": "classes x steps", "dc": "classes x steps"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="scoring,dm,dc")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16_384, help="scored by one actor; a multiple of 1024")
    parser.add_argument("--steps", type=int, default=40, help="of DM; a fourth of DC, whose steps take longer")
    parser.add_argument("--folder", help="folder for sets and results")
    return parser.parse_args()


def _in_turn(cases: list[Case], repeats: int, folder: Path) -> list[Case]:
    """Every case once, then all again, so that they share what else the machine does."""
    for repeat in range(repeats):
        for number, case in enumerate(cases):
            place = folder / f"{repeat}-{number}"
            place.mkdir(parents=True)
            rate, start = case.run(place)
            case.rates.append(rate)
            case.starts.append(start)
            print(f"{case.name}: {rate:.1f} per s, started in {start:.1f} s", flush=True)
    return cases


def _rows(cases: list[Case]) -> list[dict[str, Any]]:
    """`of one`: against the first case of the same kind, the efficiency of two against twice one."""
    base = {case.name.partition(",")[0]: statistics.fmean(case.rates) for case in cases if ", 1 " in case.name}
    result = []
    for case in cases:
        mean, kind = statistics.fmean(case.rates), case.name.partition(",")[0]
        spread = statistics.stdev(case.rates) if len(case.rates) > 1 else 0.0
        one = base["plain" if kind == "plain" else "Ray"]
        result.append({"case": case.name, "rate": round(mean, 1), "std": round(spread, 1), "of one": round(mean / one, 2),
                      "start s": round(statistics.fmean(case.starts), 1)})  # fmt: skip
    return result


def scoring(options: argparse.Namespace, folder: Path) -> list[Case]:
    facts = _facts(range(1))
    built = dummy_data.write(folder / "scored", facts, [0], CHUNK, CHUNK)
    dummy_data.write_checkpoints(folder / "proxies", NetworkSpec("convnet", SHAPE, 1, WIDTH), EPOCHS)
    one = PreparedDataset(built.prepared).chunks()[0]

    def by_actors(actors: int, samples: int) -> Callable[[Path], tuple[float, float]]:
        return lambda place: _score(actors, built.prepared, folder / "proxies", _chunks(one, samples), place)

    def by_processes(count: int) -> Callable[[Path], tuple[float, float]]:
        samples = options.samples
        return lambda place: (
            roof(plain_scoring, count, str(built.prepared), str(folder / "proxies"), samples, str(place)),
            0.0,
        )

    return [
        Case("plain, 1 process", by_processes(1)),
        Case("Ray, 1 actor", by_actors(1, options.samples)),
        Case("plain, 2 processes", by_processes(2)),
        Case("Ray strong, 2 actors", by_actors(2, options.samples)),
        Case("Ray weak, 2 actors", by_actors(2, 2 * options.samples)),
    ]


def _chunks(one: Chunk, samples: int) -> list[Chunk]:
    """The same chunk again and again, as chunks of their own."""
    return [replace(one, index=i) for i in range(samples // CHUNK)]


def _scores(actors: int) -> Config:
    score = {"trials": 1, "epochs": EPOCHS, "width": WIDTH, "compile": "never"}
    return validate({"score": score, "cluster": {"actors": actors}})


def _score(actors: int, prepared: Path, proxies: Path, chunks: list[Chunk], place: Path) -> tuple[float, float]:
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.pipeline.executors import tasks

    config, clock, began = _scores(actors), Clock(warm=actors), time.perf_counter()
    tasks.score(RayExecutor(config, lambda text: None), config, prepared, proxies, chunks, place, clock)
    return clock.rate, clock.began - began


def plain_scoring(
    core: int, cores: int, ready: Callable[[], None], prepared: str, proxies: str, samples: int, place: str
) -> int:
    """The scorer of an actor, without Ray, on one core."""
    _pin(core)
    work, scorer = Path(place) / str(core), Scorer(_scores(1), Path(prepared), Path(proxies), CPU)
    work.mkdir()
    chunks = _chunks(PreparedDataset(prepared).chunks()[0], samples + CHUNK)
    scored = scorer.score([(chunk, work / f"{chunk.index}.parquet") for chunk in chunks])
    next(scored)
    ready()
    return sum(scored)


def distilling(options: argparse.Namespace, method: str, folder: Path) -> list[Case]:
    steps = options.steps if method == "dm" else max(4, options.steps // 4)
    sets = {n: dummy_data.write(folder / f"{method}-{n}", _facts(range(n)), list(range(n)), HELD) for n in _sizes()}

    def by_workers(workers: int, classes: int) -> Callable[[Path], tuple[float, float]]:
        return lambda place: _distill(workers, _distils(method, workers, steps), sets[classes], classes, place)

    def by_processes(count: int) -> Callable[[Path], tuple[float, float]]:
        places = {n: (str(built.prepared), str(built.manifest)) for n, built in sets.items()}
        return lambda place: (roof(plain_distillation, count, method, steps, places[CLASSES // count], str(place)), 0.0)

    return [
        Case("plain, 1 process", by_processes(1)),
        Case("Ray, 1 worker", by_workers(1, CLASSES)),
        Case("plain, 2 processes", by_processes(2)),
        Case("Ray strong, 2 workers", by_workers(2, CLASSES)),
        Case("Ray weak, 2 workers", by_workers(2, 2 * CLASSES)),
    ]


def _sizes() -> tuple[int, ...]:
    return CLASSES // 2, CLASSES, 2 * CLASSES


def _distils(method: str, workers: int, steps: int) -> Config:
    loops: dict[str, Any] = {"real_batch": REAL, "augment": "none"} | (
        {"outer": 3, "inner": 5} if method == "dc" else {}
    )
    section = {
        "method": method,
        "steps": steps,
        "width": WIDTH,
        "workers": workers,
        "checkpoint_every": 10**6,
        method: loops,
    }
    return validate({"distill": section})


def _distill(
    workers: int, config: Config, built: dummy_data.DummySet, classes: int, place: Path
) -> tuple[float, float]:
    """Classes x steps per second from the third line of the log to the last; the start is all before the first step."""
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.pipeline.executors import tasks

    lines: list[dict[str, Any]] = []
    places, began = DistillPaths(built.prepared, built.manifest, place, place / "metrics.jsonl"), time.perf_counter()
    executor = RayExecutor(config, lambda text: None, sharing=2 // workers)  # so that a worker has one core
    tasks.distill(executor, config, places, lines.append)
    whole = time.perf_counter() - began
    timed = [line for line in lines if "seconds" in line]
    first, last = timed[2], timed[-1]
    return classes * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"]), whole - last["seconds"]


def plain_distillation(
    core: int, cores: int, ready: Callable[[], None], method: str, steps: int, folders: tuple[str, str], place: str
) -> int:
    """The steps of a worker that owns all classes of its set, without Ray, on one core."""
    _pin(core)
    work = Path(place) / str(core)
    work.mkdir()
    places = DistillPaths(Path(folders[0]), Path(folders[1]), work, work / "metrics.jsonl")
    built = Distillation(_distils(method, 1, steps), places, SingleProcess(), CPU)
    for i in range(3):
        built.method.step(i)
    ready()
    for i in range(3, steps):
        built.method.step(i)
    return (steps - 3) * len(built.context.labels)


def _pin(core: int) -> None:
    """One thread, on the core of this number among those that the process may use."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def _facts(classes: range) -> PlannedDataset:
    names = [f"class {label:04d}" for label in classes]
    counts = [HELD] * len(names)
    return PlannedDataset(SHAPE, names, names, counts, 0, "images", counts)


if __name__ == "__main__":
    main()

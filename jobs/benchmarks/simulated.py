"""What saturates first on a large cluster: simulated actors behind the real driver, and the work that is done once.

    python jobs/benchmarks/simulated.py [--actors 8 64 256] [--parts actors,hand-out,once] [--rate 30000] [--merged 60000]

actors: scoring of ImageNet-1K with 25 checkpoints through the product's own actor pool (`cluster/actor_pool.py`), by actors
that sleep as long as a GPU would take (`--rate`, images/s per checkpoint, an assumption) and then publish a real part file of
scores. Steady state, with the CPU time of the driver and of Ray's services per unit of work: a part saturates where it fills
a core, independent of the other cores' load. hand-out: the same with actors that do nothing, so only the driver works. once:
`driver_parts.py`. The last table has, per part, the images per second it can handle, and the number of GPUs (scoring) or
cores (decoding) that reach this limit.

A simulated actor is a real process without torch (about 0.15 GB; on two cores it starts in some seconds, two at a time). The
script refuses to start more than fit free memory and swap. Prints tables and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import driver_parts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from peaks import family, kind_of
from side_by_side import columns

from distill_at_scale.cluster import actor_pool
from distill_at_scale.cluster.actor_pool import UNITS_AT_ONCE
from distill_at_scale.cluster.session import quieten
from distill_at_scale.config.load import Config, validate
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.environment import environment
from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.executors.base import Task, Unit, Worker

# of ImageNet-1K at 64 x 64: samples of a chunk, chunks of all, proxies' epochs
CHUNK, CHUNKS, CHECKPOINTS = 1024, 1310, 25
EACH = 16  # chunks that every simulated actor gets at most
ACTOR_MB, SPARE_MB, STORE_MB = 180, 2048, 200
IDLE_ACTORS = 4  # of hand-out


class Sleeper(Worker):
    """A scoring actor without a model; `work` is (seconds to sleep, whether to publish)."""

    name, event, stages, uses_torch = "score", "score", (), False

    def load(self) -> None:
        losses = pa.array(np.random.default_rng(0).gamma(2.0, 1.0, CHUNK * CHECKPOINTS).astype(np.float32))
        ids = [f"train/n{1440764 + i % 2:08d}/n01440764_{i:08d}.JPEG" for i in range(CHUNK)]
        lists = pa.FixedSizeListArray.from_arrays(losses, CHECKPOINTS)
        self.piece = pa.table({"sample_id": ids, "label": pa.array([0] * CHUNK, pa.int32()), "loss": lists})

    def run(self, units: Sequence[Unit]) -> Iterator[dict[str, int]]:
        for unit in units:
            seconds, publishes = unit.work
            time.sleep(seconds)
            if publishes:
                with publish(unit.outputs[0]) as temporary:
                    pq.write_table(self.piece, temporary)
            yield {"samples": CHUNK}


def main() -> None:
    options = _options()
    parts, result = options.parts.split(","), {}
    with tempfile.TemporaryDirectory(prefix="simulated-", dir=options.folder) as folder:
        if {"actors", "hand-out"} & set(parts):
            result = _on_ray(options, parts, Path(folder))
        if "once" in parts:
            result["once"] = driver_parts.measure(Path(folder), options.merged)
    print(columns("where each part is the limit", limits(result, options)))
    about = environment()
    print(json.dumps({**result, "options": vars(options), "hardware": about["hardware"], "commit": about["commit"]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--parts", default="actors,hand-out,once")
    parser.add_argument(
        "--rate", type=float, default=30_000, help="images/s of a GPU under one checkpoint: an assumption"
    )
    parser.add_argument(
        "--decode-rate", type=float, default=2200, help="images/s of a core, 500 x 375 to 64 x 64: decode.py"
    )
    parser.add_argument("--merged", type=int, default=60_000, help="images that go through the merge")
    parser.add_argument("--folder", help="folder for part files and shards")
    return parser.parse_args()


def _on_ray(options: argparse.Namespace, parts: list[str], folder: Path) -> dict[str, Any]:
    """The passes with actors, one after the other on one Ray."""
    passes = [(count, options.rate) for count in sorted(options.actors) if "actors" in parts]
    passes += [(IDLE_ACTORS, None)] if "hand-out" in parts else []
    most = max(count for count, _ in passes)
    _check_memory(most)
    ray.init(address="local", num_cpus=most + 1, include_dashboard=False, log_to_driver=False,
             object_store_memory=STORE_MB * 2**20, _system_config={"enable_worker_prestart": False})  # fmt: skip
    quieten()
    result: dict[str, Any] = {"actors": [], "hand-out": []}
    try:
        for count, rate in passes:
            row = _measured(count, rate, folder / f"pieces-{count}-{rate}")
            result["actors" if rate else "hand-out"].append(row)
            print(columns("sleeping actors" if rate else "actors that do nothing", [row]), flush=True)
    finally:
        ray.shutdown()
    return result


def _check_memory(actors: int) -> None:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = sum(int(line.split()[1]) // 1024 for line in lines if line.startswith(("MemAvailable", "SwapFree")))
    if actors * ACTOR_MB + SPARE_MB > free:
        raise SystemExit(
            f"{actors} actors need about {actors * ACTOR_MB + SPARE_MB} MB, {free} MB are free; ask for fewer"
        )


def _measured(actors: int, rate: float | None, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    seconds = CHUNK * CHECKPOINTS / rate if rate else 0.0
    config: Config = validate({"cluster": {"actors": actors}})
    chunks = [
        Unit((seconds, bool(rate)), (folder / f"chunk-{i:06d}.parquet",))
        for i in range(min(CHUNKS, EACH * actors) if rate else CHUNKS)
    ]
    actor_pool.UNITS_AT_ONCE = UNITS_AT_ONCE if rate else 1
    units = actor_pool.grouped(chunks, actors)
    began, warm, done, rows, store = time.perf_counter(), 2 * actors, 0, 0, 0.0
    marks: list[tuple[float, int, Counter[str]]] = []

    def note(event: Event) -> None:
        nonlocal done, rows, store
        done, rows = done + 1, rows + event.values["samples"]
        if done in (1, warm, len(units)):
            marks.append((time.perf_counter(), rows, _cpu_seconds()))
            store = max(store, _store_used())

    actor_pool.run(Task(Sleeper, config, {}, chunks), lambda result: None, 1, note, print)
    (first, *_), (start, before, used), (end, after, spent) = marks
    per = (len(units) - warm) / 1000  # of CPU seconds, milliseconds a unit
    busy = {kind: round(value / per, 2) for kind, value in (spent - used).items()}
    results = {
        "actors": actors,
        "units": len(units),
        "chunks": len(chunks),
        "images/s": round((after - before) / (end - start)),
    }
    if rate:
        whole = end - began - (first - began)
        results |= {"of ideal": round(results["images/s"] / (actors * rate / CHECKPOINTS), 3), "pass s": round(whole, 1),
                  "ideal s": round(len(chunks) * seconds / actors, 1)}  # fmt: skip
    else:
        results |= {"units/s": round((len(units) - warm) / (end - start))}
    services = sum(busy.get(kind, 0) for kind in ("raylet", "gcs server"))
    return results | {"start s": round(first - began, 1), "driver ms/unit": busy.get("driver", 0.0),
                    "services ms/unit": round(services, 2), "store MB": round(store, 1)}  # fmt: skip


def _cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process and all that it started, by kind."""
    result, ticks = Counter[str](), os.sysconf("SC_CLK_TCK")
    for pid in family(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        result[kind_of(pid, os.getpid())] += (int(fields[11]) + int(fields[12])) / ticks
    return result


def _store_used() -> float:
    total, free = ray.cluster_resources(), ray.available_resources()
    return (total["object_store_memory"] - free.get("object_store_memory", 0.0)) / 2**20


def limits(result: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts by the images per second that they bear; a GPU scores rate / 25 of them, a core decodes `decode_rate`."""
    rates = dict(result.get("once", {}))
    for row in [*result.get("hand-out", []), *result.get("actors", [])[-1:]]:
        each = CHUNK * row["chunks"] / row["units"]
        for part in ("driver", "services"):
            if row[f"{part} ms/unit"]:
                what = "idle actors" if "units/s" in row else f"{row['actors']} sleeping actors"
                rates[f"{part}, {each:.0f} images a unit, {what}"] = 1000 * each / row[f"{part} ms/unit"]
    ordered = sorted(rates.items(), key=lambda item: item[1])
    return [{"part": part, "images/s": round(rate), "GPUs scoring": round(rate * CHECKPOINTS / options.rate),
             "cores decoding": round(rate / options.decode_rate), "s for ImageNet-1K": round(1_281_167 / rate, 1)}
            for part, rate in ordered]  # fmt: skip


if __name__ == "__main__":
    main()

"""What saturates first on a large cluster: simulated actors behind the real driver, and the work that is done once.

    python jobs/benchmarks/simulated.py [--actors 8 64] [--many 1000] [--parts data,actors,many,hand-out,once] [--rate 30000]

All parts score ImageNet-1K with 25 checkpoints. data: real processes behind Ray Data, as on a running cluster
(`cluster/data_pool.py`). They sleep as long as a GPU would take (`--rate`, images/s per checkpoint, an assumption) and then
publish a real part file of scores. actors: the same behind the pool of a Ray that the command starts
(`cluster/actor_pool.py`). many: more actors of that pool than fit this machine: each is a lock in one of HOSTS real Ray
actors, which sleeps alike and publishes nothing, so the driver and Ray do all they do for as many processes. hand-out: actors
of that pool that do nothing, and calls of one chunk, so only the driver works. In steady state, with the CPU time of the
driver and of Ray's services per call: a part saturates where it fills a core, independent of the other cores' load. once:
`driver_parts.py`. The last table has, per part, the images per second it can handle, and the number of GPUs (scoring) or
cores (decoding) that reach this limit.

A simulated actor of `data` or `actors` is a process without torch (about 0.15 GB; on two cores it starts in some seconds, two
at a time). The script refuses to start more than fit free memory and swap. Prints tables and one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import driver_parts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from peaks import family, kind_of
from side_by_side import columns

from distill_at_scale.cluster import actor_pool, data_pool
from distill_at_scale.cluster.actor_pool import ActorPool
from distill_at_scale.cluster.session import quieten
from distill_at_scale.config.load import Config, validate
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.environment import environment
from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.executors.base import Task, Unit, Worker

# of ImageNet-1K at 64 x 64: samples of a chunk, chunks of all, proxies' epochs
CHUNK, CHUNKS, CHECKPOINTS = 1024, 1310, 25
EACH, EACH_OF_MANY = 16, 40  # chunks that every simulated actor gets at most
ACTOR_MB, SPARE_MB, STORE_MB = 180, 2048, 200
IDLE_ACTORS, HOSTS = 4, 4  # of hand-out; processes of many


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


class Host:
    """A process that holds many simulated actors; each works on one call at a time."""

    def __init__(self) -> None:
        self.locks = defaultdict[int, asyncio.Lock](asyncio.Lock)

    async def call(self, number: int, units: list[Unit]) -> tuple[list[dict[str, int]], Event]:
        async with self.locks[number]:
            began = time.time()
            await asyncio.sleep(sum(unit.work[0] for unit in units))
        values = {"units": len(units), "samples": CHUNK * len(units)}
        return [{"samples": CHUNK} for _ in units], Event("work", "score", began, time.time(), values=values)


class Lodger:
    """The handle of one of the actors in a `Host`."""

    def __init__(self, host: Any, number: int):
        self.run = SimpleNamespace(remote=lambda units: host.call.remote(number, units))
        self.ready = SimpleNamespace(remote=lambda: host.call.remote(number, []))
        self.begin = SimpleNamespace(remote=lambda job: None)


class ManyActors(ActorPool):
    def __init__(self, hosts: list[Any]):
        super().__init__()
        self.hosts = hosts

    def start(self) -> Any:
        return Lodger(self.hosts[len(self._actors) % len(self.hosts)], len(self._actors))

    def close(self) -> None:
        for host in self.hosts:
            ray.kill(host)


def main() -> None:
    options = _options()
    parts, result = options.parts.split(","), {}
    with tempfile.TemporaryDirectory(prefix="simulated-", dir=options.folder) as folder:
        if {"data", "actors", "many", "hand-out"} & set(parts):
            result = _on_ray(options, parts, Path(folder))
        if "once" in parts:
            result["once"] = driver_parts.measure(Path(folder), options.merged)
    print(columns("where each part is the limit", limits(result, options)))
    about = environment()
    print(json.dumps({**result, "options": vars(options), "hardware": about["hardware"], "commit": about["commit"]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--many", type=int, nargs="+", default=[1000])
    parser.add_argument("--parts", default="data,actors,many,hand-out,once")
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
    passes = [
        (part, count, options.rate) for part in ("data", "actors") for count in sorted(options.actors) if part in parts
    ]
    passes += [("many", count, options.rate) for count in sorted(options.many) if "many" in parts]
    passes += [("hand-out", IDLE_ACTORS, None)] if "hand-out" in parts else []
    most = max([HOSTS, *(count for part, count, _ in passes if part != "many")])
    _check_memory(most)
    ray.init(address="local", num_cpus=most + 1, include_dashboard=False, log_to_driver=False,
             object_store_memory=STORE_MB * 2**20, _system_config={"enable_worker_prestart": False})  # fmt: skip
    quieten()
    result: dict[str, Any] = {"data": [], "actors": [], "many": [], "hand-out": []}
    try:
        for part, count, rate in passes:
            row = _measured(part, count, rate, folder / f"pieces-{part}-{count}")
            result[part].append(row)
            print(columns(part, [row]), flush=True)
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


def _measured(part: str, actors: int, rate: float | None, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    seconds, each = CHUNK * CHECKPOINTS / rate if rate else 0.0, EACH_OF_MANY if part == "many" else EACH
    config: Config = validate({"cluster": {"actors": actors}})
    total = each * actors if part == "many" else min(CHUNKS, each * actors) if rate else CHUNKS
    chunks = [Unit((seconds, part in ("data", "actors")), (folder / f"chunk-{i:06d}.parquet",)) for i in range(total)]
    most, actor_pool.MOST_UNITS = actor_pool.MOST_UNITS, actor_pool.MOST_UNITS if rate else 1
    pool = ActorPool()
    if part == "many":
        host = ray.remote(num_cpus=1, max_concurrency=2 * actors)(Host)
        pool = ManyActors([host.remote() for _ in range(HOSTS)])
    began, calls, units = time.perf_counter(), 0, 0
    marks: list[tuple[float, int, int, Counter[str]]] = []  # at the first call, in steady state, and before the end

    def note(event: Event) -> None:
        nonlocal calls, units
        calls, units = calls + 1, units + event.values["units"]
        if calls == 1 or (len(marks) == 1 and units >= total / 4) or (len(marks) == 2 and units >= 0.75 * total):
            marks.append((time.perf_counter(), calls, units, _cpu_seconds()))

    try:
        task = Task(Sleeper, config, {}, chunks)
        if part == "data":
            data_pool.run(task, lambda result: None, 1, note, print)
        else:
            pool.run(task, actors, lambda result: None, note, print)
    finally:
        pool.close()
        actor_pool.MOST_UNITS = most
    ended, (first, *_), (start, before, some, used), (end, after, more, spent) = time.perf_counter(), *marks
    busy = {kind: value / (after - before) * 1000 for kind, value in (spent - used).items()}  # ms a call
    services = sum(busy.get(kind, 0) for kind in ("raylet", "gcs server"))
    row = {"actors": actors, "chunks": total, "calls": calls, "images/s": round(CHUNK * (more - some) / (end - start)),
           "calls/s": round((after - before) / (end - start), 1)}  # fmt: skip
    if rate:
        row |= {"of ideal": round(row["images/s"] / (actors * rate / CHECKPOINTS), 3), "pass s": round(ended - first, 1),
                "ideal s": round(total * seconds / actors, 1)}  # fmt: skip
    driver = busy.get("driver", 0.0)
    return row | {"start s": round(first - began, 1), "driver ms/call": round(driver, 2),
                  "driver's core": round(driver * (after - before) / (end - start) / 1000, 3),
                  "services ms/call": round(services, 2), "store MB": round(_store_used(), 1)}  # fmt: skip


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
    for part in ("data", "actors", "many", "hand-out"):
        for row in result.get(part, [])[-1:]:
            each = CHUNK * row["chunks"] / row["calls"]
            for what in ("driver", "services"):
                if row[f"{what} ms/call"]:
                    rates[f"{what}, {each:.0f} images a call, {part} {row['actors']}"] = (
                        1000 * each / row[f"{what} ms/call"]
                    )
    ordered = sorted(rates.items(), key=lambda item: item[1])
    return [{"part": part, "images/s": round(rate), "GPUs scoring": round(rate * CHECKPOINTS / options.rate),
             "cores decoding": round(rate / options.decode_rate), "s for ImageNet-1K": round(1_281_167 / rate, 1)}
            for part, rate in ordered]  # fmt: skip


if __name__ == "__main__":
    main()

"""Shared parts of the throughput benchmarks: plain parallel processes as a yardstick, rates in steady state, tables.

A yardstick ("roof") is the rate of plain processes, one per core, that do only the work itself on the same inputs. A rate
counts from the first finished unit to the last one, without start-up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

from distill_at_scale.core.environment import environment

Row = tuple[str, float, float | None]  # what, per second, and as a share of the yardstick


class Clock:
    """Counts finished samples; the rate leaves out everything before the first of them was finished by every worker."""

    def __init__(self, warm: int = 1):
        self.warm, self.calls, self.samples = warm, 0, 0
        self.began = self.last = 0.0

    def __call__(self, samples: int) -> None:
        self.calls += 1
        self.last = time.perf_counter()
        if self.calls <= self.warm:
            self.began = self.last
        else:
            self.samples += samples

    @property
    def seconds(self) -> float:
        return self.last - self.began

    @property
    def rate(self) -> float:
        return self.samples / max(self.seconds, 1e-9)


def image_options(doc: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that reads an ImageFolder."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--path", required=True, help="an ImageFolder with train/<class>/*")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    return parser


def roof(work: Callable[..., int], cores: int, *arguments: Any) -> float:
    """Samples per second of `work(core, cores, ready, *arguments)` in one plain process per core, started together.

    `work` prepares itself, calls `ready()` and returns how many samples it worked on after that.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    running = [
        context.Process(target=_one, args=(work, core, cores, barrier, results, arguments)) for core in range(cores)
    ]
    for process in running:
        process.start()
    result = [results.get() for _ in running]
    for process in running:
        process.join()
    return sum(samples / seconds for samples, seconds in result)


def _one(work: Any, core: int, cores: int, barrier: Any, results: Any, arguments: tuple[Any, ...]) -> None:
    began: list[float] = []

    def ready() -> None:
        barrier.wait()
        began.append(time.perf_counter())

    samples = work(core, cores, ready, *arguments)
    results.put((samples, time.perf_counter() - began[0]))


def columns(title: str, rows: list[dict[str, Any]]) -> str:
    """A table of rows with the same keys, the first column to the left."""
    heads = list(rows[0])
    cells = [heads, *([str(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
             for line in cells]  # fmt: skip
    return "\n".join([f"\n{title}", *lines])


def show(title: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """The table for people, and one JSON object with the hardware."""
    print(f"\n{title:<78}{'per s':>10}{'ratio':>9}")
    for what, rate, ratio in rows:
        print(f"{what:<78}{rate:>10.1f}{'' if ratio is None else f'{ratio:>9.2f}'}")
    about = environment()
    print(json.dumps({"rows": rows, **facts, "hardware": about["hardware"], "versions": about["versions"],
                      "commit": about["commit"]}))  # fmt: skip

"""The faults: each strikes a running command, its hosts or their disk once, and ends after a while.

A lasting fault is lifted after a given number of seconds, or when the command has ended. `Bench.mend` brings lost hosts back.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.faults.bench import Bench
from jobs.faults.hosts import LIMIT, Command, kill

# actors and tasks of ours; not Ray's own agents
WORKING = re.compile(r"ray::(MapWorker|PoolActor|RayTrainWorker|ImplicitFunc|_)")
BLOCKS = (2**20, 2**12)  # bytes; the ballast is laid in large blocks, and the rest in small ones


@dataclass(frozen=True)
class Fault:
    """`strike` and `lift` are called with the bench and the command."""

    title: str
    strike: Callable[[Bench, Command], None]
    lift: Callable[[Bench, Command], None] | None = None
    seconds: float = 0


def working(bench: Bench) -> list[int]:
    """Pids of the processes on the workers that are at work for Ray."""
    lines = (pair for host in bench.workers for pair in host.processes().items())
    return sorted(pid for pid, line in lines if WORKING.match(line))


def _actor(bench: Bench, command: Command) -> None:
    until = time.monotonic() + LIMIT
    while not (result := working(bench)):
        if time.monotonic() > until:
            raise RuntimeError("no worker process was at work")
        time.sleep(0.02)
    kill(result[0])


def _node(bench: Bench, command: Command) -> None:
    bench.lose(bench.workers[-1])


def _another_node(bench: Bench, command: Command) -> None:
    bench.replace()


def _driver(bench: Bench, command: Command) -> None:
    command.kill()


def _head(bench: Bench, command: Command) -> None:
    bench.kill_head(command)


def _new_head(bench: Bench, command: Command) -> None:
    bench.start("head")


def _cut(bench: Bench, command: Command) -> None:
    bench.workers[-1].cut(True)


def _join(bench: Bench, command: Command) -> None:
    bench.workers[-1].cut(False)


def _refuse(bench: Bench, command: Command) -> None:
    for host in bench.hosts.values():
        host.refuse_writes(True)


def _accept(bench: Bench, command: Command) -> None:
    for host in bench.hosts.values():
        host.refuse_writes(False)


def _fill(bench: Bench, command: Command) -> None:
    with open(bench.switch.seen / "ballast", "wb", buffering=0) as ballast:
        for size in BLOCKS:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)) == size:
                    pass


def _free(bench: Bench, command: Command) -> None:
    (bench.switch.seen / "ballast").unlink()


FAULTS = {
    "actor": Fault("actor killed", _actor),
    "node": Fault("worker node killed", _node, _another_node, 10),
    "driver": Fault("driver killed", _driver),
    "head": Fault("head killed and restarted", _head, _new_head, 5),
    "network": Fault("a worker's network cut for 30 s", _cut, _join, 30),
    "storage": Fault("storage refuses writes", _refuse, _accept, 60),
    "disk": Fault("disk full", _fill, _free, 60),
}

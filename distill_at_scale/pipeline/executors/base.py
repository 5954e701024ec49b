"""The contract between a stage and the place where its work runs.

A stage describes its work as a `Task` of independent units or as a `Group` of processes that work together (`tasks.py` has
all of them). `local.py` runs both in this process, `cluster/executor.py` runs them on Ray, and `synced.py` exchanges their
files with an object store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import keep_freed_memory
from distill_at_scale.core.events import Emit, TimeSpent
from distill_at_scale.pipeline.monitoring.observers import Observer

if TYPE_CHECKING:
    import torch  # not at run time: workers without networks start faster

Advance = Callable[[int], None]  # called with the number of units that were finished
Report = Callable[[dict[str, Any]], None]
Result = dict[str, Any]
Poll = Callable[[], bool]  # reads progress from the run folder; returns whether there was any


def no_poll() -> bool:
    return False


@dataclass(frozen=True)
class Unit:
    """One independent unit of work."""

    work: Any  # picklable, without paths
    outputs: tuple[Path, ...] = ()  # files or folders that the worker publishes, in this order
    inputs: tuple[Path, ...] = ()  # unfinished files of the run folder that the worker reads
    size: int = 1  # its samples, subsets, ...: see `Worker.counted`

    def at(self, place: Callable[[Path], Path]) -> Unit:
        """The same unit with its paths as another machine sees them."""
        return replace(self, outputs=tuple(map(place, self.outputs)), inputs=tuple(map(place, self.inputs)))


class Worker:
    """One kind of work. An instance is what a process loads once; the class attributes say how it is placed."""

    name: ClassVar[str]  # of the work, in messages
    event: ClassVar[str]  # of a finished unit
    counted: ClassVar[str] = "units"  # what progress is measured in, a key of its results
    stages: ClassVar[tuple[str, ...]] = ("ingest",)  # whose output it reads
    fetches: ClassVar[tuple[str, ...]] = ()  # names of the other paths that it reads
    # False: many short units, on one core and one thread each. True: a few long ones, which share all cores of the cluster.
    long: ClassVar[bool] = False
    resumes: ClassVar[bool] = False  # a unit resumes from what an earlier attempt left at its outputs
    uses_torch: ClassVar[bool] = True  # False: without threads of torch and without a GPU

    def __init__(self, config: Config, paths: Mapping[str, Path], device: torch.device, spent: TimeSpent):
        """`spent` takes the seconds of reading, decoding and so on."""
        self.config, self.paths, self.device, self.spent = config, paths, device, spent
        keep_freed_memory()
        self.poll: Poll = no_poll  # to call after partial progress, where the driver is this process
        self.load()

    def load(self) -> None:
        """Load what all units need."""

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        """Work through units; yields one result for each, when its outputs are published."""
        raise NotImplementedError

    def counts(self, result: Result) -> dict[str, Any]:
        """The values of the event of a finished unit."""
        return result


@dataclass(frozen=True)
class Task:
    """Independent units of one kind of work."""

    worker: type[Worker]
    config: Config
    paths: Mapping[str, Path]  # what the worker's constructor gets, by name
    units: Sequence[Unit]  # those that are not finished
    folder: Path | None = None  # where units publish; None if they only return results
    total: int = 0  # all long units, finished ones too: their cores follow from it, so a resumed task ends the same

    @property
    def gpus(self) -> float:
        """GPUs of one worker on a cluster."""
        return self.config.cluster.gpus_per_worker if self.worker.uses_torch else 0


@dataclass(frozen=True)
class Group:
    """Work of several processes in one torch process group, which restarts from the last checkpoint after a loss."""

    stage: str  # in messages and in the key `<stage>.workers`
    body: Callable[[Config, Mapping[str, Path], torch.device, Report], None]  # one worker's part
    config: Config
    paths: Mapping[str, Path]
    workers: int | Sequence[int]  # their number, or the fewest and the most
    work: Path  # folder for notes between driver and workers
    stages: tuple[str, ...]  # whose output the workers read
    fetches: tuple[str, ...]  # names of the other paths that all workers read
    publishes: tuple[str, ...]  # names of paths that rank 0 writes
    results: tuple[Path, ...]  # what the driver reads
    poll: Poll  # called meanwhile, where the workers are not this process
    saved: Callable[[], int]  # steps that a restarted group would not repeat
    renews: tuple[str, ...] = ()  # names of paths that rank 0 resumes from: exactly what an earlier rank 0 stored
    report: Report | None = None  # takes what the body reports, where that is this process
    resumed: Callable[[], str] | None = None  # what to say after a restart


class Executor(Protocol):
    emit: Emit  # takes an event for each finished unit, wait and loss

    def observers(self, config: Config) -> list[Observer]:
        """Further observers of a run on this executor."""

    def run(self, task: Task, done: Callable[[Result], None], poll: Poll = no_poll) -> None:
        """Run all units, in any order. Calls `done` once for each, and `poll` meanwhile."""

    def train(self, group: Group) -> None:
        """Run the processes of a group to their end."""

    def release(self) -> None:
        """End processes that wait for more work."""

    def close(self) -> None:
        """Release what the executor holds."""

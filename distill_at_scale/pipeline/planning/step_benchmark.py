"""Times a few steps of the configured method on a slice of its classes and scales them up to a whole distillation.

A worker's step takes time in proportion to its classes, plus a part that is the same for any number of classes (a new network,
the batches of its inner loop); two slices give both. Inner and outer loops are measured short and scaled by their counts; steps
that score their real batch are measured apart from steps that use remembered values. For a `replicate` method the data set
itself is cut to fewer classes. Not covered: waiting for other workers, except for the bytes they exchange.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.planning import dummy_data, micro_benchmarks
from distill_at_scale.pipeline.planning.dummy_data import DummySet
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.memory import peak
from distill_at_scale.pipeline.planning.micro_benchmarks import repeated, timed
from distill_at_scale.pruning.scoring.scorer import score_part_path

SHORT = {"experts": 1, "expert_epochs": 1, "max_start": 0, "target_epochs": 1, "teacher_epochs": 1, "label_epochs": 1}
DRAWN = ("real_batch", "candidates")  # keys of methods: real samples of a class that a step may use
OUTER, INNER = ("outer",), ("inner", "student_steps")  # keys of methods: loops within a step
NEVER = 10**9  # runtime.refresh: only the first step scores its batch
LATENCY, BANDWIDTH = 3e-4, 1e9  # seconds of a small all-reduce and bytes per second, with gloo on one machine
MAX_SLICE = 64  # classes


class Slice(SingleProcess):
    """A worker that owns a slice of the classes, without the other workers; counts the data it would exchange."""

    def __init__(self, size: int):
        self.size, self.calls, self.bytes = size, 0, 0  # type: ignore[misc]

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        self.calls += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and the all-reduce calls and bytes of a worker in it."""

    seconds: float
    calls: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class StepTimes:
    """The measurements of one worker."""

    step: float  # seconds of a step
    prepare: float  # seconds before the first step
    activations: int  # peak bytes of new tensors in a step
    read: float  # seconds to read one more kept sample
    held: int  # samples per class that were measured
    slice: int  # classes that were measured
    own: int  # classes that the worker owns
    loops: dict[str, int] = field(default_factory=dict)  # real lengths of loops that were measured short

    def notes(self) -> list[str]:
        lines = []
        if self.slice < self.own:
            lines.append(f"measured on {self.slice} of a worker's {self.own} classes and scaled up")
        if lengths := ", ".join(f"{key} {length}" for key, length in self.loops.items()):
            lines.append(f"loops measured short and scaled to {lengths}")
        return lines


class StepBenchmark:
    """Measures the first worker of `workers`; dummy sets lie in `folder`."""

    def __init__(self, config: Config, facts: Facts, device: torch.device, workers: int, folder: Path):
        self.config, self.facts, self.device, self.workers, self.folder = config, facts, device, workers, folder
        self.method = engine.method_class(config)
        self.by_class = self.method.parallel == "classes"
        self.own = -(-facts.classes // workers) if self.by_class else facts.classes
        self.section: Any = getattr(config.distill, config.distill.method, None)
        self.prepare: dict[int, float] = {}
        self.sets: dict[int, DummySet] = {}
        self.steps: dict[tuple[int, int, int, bool], Step] = {}
        self.loops: dict[str, int] = {}  # real lengths of the loops within a step
        method = self._start(1, 0, 0, refresh=False).method if self.section is not None else None
        for name, keys in (("outer", OUTER), ("inner", INNER)):
            for key in keys:
                if hasattr(self.section, key):
                    self.loops[name] = int(getattr(method, key, None) or getattr(self.section, key) or 1)

    def measure(self) -> StepTimes:
        affordable = max(1, min(self.own, MAX_SLICE, int(micro_benchmarks.SECONDS / max(self._step(1).seconds, 1e-6))))
        sizes = sorted({1, affordable, min(self.own, 2)})[-2:]
        steps = {len(self._labels(n)): self._typical(n) for n in sizes}
        peaks = {len(self._labels(n)): float(self._peak(n)) for n in sizes}
        loops = {key: length for key, length in self.loops.items() if length > 2}
        step, prepare, memory = (scaled(values, self.own) for values in (steps, self.prepare, peaks))
        prepared = PreparedDataset(self._dummy(sizes[-1]).prepared)
        read = timed(lambda: prepared.load("train"), self.device) / sum(prepared.counts())
        return StepTimes(step, prepare, int(memory), read, self._per_class, max(steps), self.own, loops)

    def _typical(self, classes: int) -> float:
        """Seconds of a step with loops of real length: the mean of steps that score their batch and steps that do not."""
        quick, runtime = self._looped(classes), self.config.runtime
        if runtime.rule == "none" or self.method.no_runtime or not runtime.drop:
            return quick
        ratio = self._step(classes, refresh=True).seconds / max(self._step(classes).seconds, 1e-9)
        return quick * (1 + (max(1.0, ratio) - 1) / runtime.refresh)

    def _looped(self, classes: int) -> float:
        """t(outer, inner) from loops of length one and two: what an outer round adds, and within it an inner one."""
        outer, inner = self.loops.get("outer", 1), self.loops.get("inner", 1)
        first = self._cost(classes, 1, 1)
        if "outer" not in self.loops:
            return first + (inner - 1) * (max(0.0, self._cost(classes, 1, 2) - first) if inner > 1 else 0.0)
        second = self._cost(classes, 2, 1) if outer > 1 else first
        deeper = self._cost(classes, 2, 2) if outer > 1 and inner > 1 else second
        return first + (outer - 1) * (max(0.0, second - first) + (inner - 1) * max(0.0, deeper - second))

    def _cost(self, classes: int, outer: int, inner: int) -> float:
        """Seconds of a step including the all-reduces between the workers."""
        step, share = self._step(classes, outer, inner), 2 * (self.workers - 1) / self.workers
        return step.seconds + (step.calls * LATENCY + step.bytes / BANDWIDTH) * share

    def _step(self, classes: int, outer: int = 1, inner: int = 1, refresh: bool = False) -> Step:
        """A step after a warm-up step; each kind is measured once."""
        key = classes, outer, inner, refresh
        if key not in self.steps:
            distillation = self._start(*key)
            workers = distillation.workers
            assert isinstance(workers, Slice)
            _run(distillation, 1)
            calls, sent = workers.calls, workers.bytes
            _run(distillation, 2)
            calls, sent = workers.calls - calls, workers.bytes - sent
            seconds = repeated(lambda: _run(distillation, 3), self.device, micro_benchmarks.SECONDS / 4, most=8)
            self.steps[key] = Step(seconds, calls, sent)
        return self.steps[key]

    def _peak(self, classes: int) -> int:
        distillation = self._start(classes, 1, 1, refresh=True)
        _run(distillation, 1)
        return peak(lambda: _run(distillation, 2), self.device)

    def _start(self, classes: int, outer: int, inner: int, refresh: bool) -> Distillation:
        """A distillation of dummy data in which this process owns about `classes` classes."""
        distill, dummy = self.config.distill, self._dummy(classes)
        if self.section is not None:  # loops of these lengths (0: unchanged), and networks that are quick to make
            update: dict[str, Any] = {key: value for key, value in SHORT.items() if hasattr(self.section, key)}
            for keys, length in ((OUTER, outer), (INNER, inner)):
                update |= {key: length for key in keys if length and hasattr(self.section, key)}
            distill = distill.model_copy(update={distill.method: self.section.model_copy(update=update)})
        runtime = self.config.runtime.model_copy(update={"refresh": 1 if refresh else NEVER})
        config = self.config.model_copy(update={"distill": distill, "runtime": runtime})
        work, log, networks = (dummy.folder / name for name in ("work", "log", "networks"))
        paths = DistillPaths(dummy.prepared, dummy.manifest, work, log, networks)
        for name in engine.missing_networks(config, paths):
            paths.networks.mkdir(exist_ok=True)
            engine.make_network(config, paths, name, self.device, self._labels(classes))
        table = patch_ranking.table_path(paths.networks, config)
        if self.method.ranks_patches and not table.exists():  # the pipeline ranks patches before the first step
            parts = patch_ranking.parts_folder(paths.networks, config)
            parts.mkdir(parents=True)
            candidates = patch_ranking.draw_candidates(paths.manifest, config, parts)
            chunks = PreparedDataset(paths.prepared).chunks("train")
            units = [(chunk, score_part_path(parts, chunk)) for chunk in chunks]
            list(patch_ranking.PatchRanker(config, paths.prepared, paths.networks, self.device).rank(units))
            patch_ranking.merge([path for _, path in units], candidates, config.distill.rded.crops, table)
        started: list[Distillation] = []
        workers = Slice(self._size(classes) if self.by_class else 1)
        seconds = timed(lambda: started.append(Distillation(config, paths, workers, self.device)), self.device)
        owned = len(self._labels(classes))
        self.prepare[owned] = min(seconds, self.prepare.get(owned, seconds))  # the first start also loads code
        return started[0]

    def _dummy(self, classes: int) -> DummySet:
        if classes not in self.sets:
            names = None if self.by_class else classes
            folder, labels = self.folder / f"{classes}", self._labels(classes)
            self.sets[classes] = dummy_data.write(folder, self.facts, labels, self._per_class, names=names)
        return self.sets[classes]

    @property
    def _per_class(self) -> int:
        """Dummy samples per class: at most as many real samples as a step may use."""
        drawn = 256
        if self.section is not None:
            batches = [value for key in DRAWN if (value := getattr(self.section, key, None))]
            network_batch = getattr(self.section, "network_samples", 0) // self.facts.classes
            drawn = max(*batches, network_batch, self.config.distill.ipc * getattr(self.section, "factor", 1) ** 2, 0)
        return max(1, min(max(self.facts.kept), drawn))

    def _labels(self, classes: int) -> range:
        """The classes that a dummy set has samples of."""
        return range(0, self.facts.classes, self._size(classes)) if self.by_class else range(classes)

    def _size(self, classes: int) -> int:
        """The number of workers with which each owns `classes` classes."""
        return max(1, self.facts.classes // classes)


def _run(distillation: Distillation, step: int) -> None:
    distillation.sampler.schedule(distillation.method.draws(step))
    with contextlib.suppress(DistillationDiverged):  # dummy data may diverge; the time is the same
        distillation.method.step(step)


def scaled(values: dict[int, float], own: int) -> float:
    """From the values of one or two slices to the value for `own` classes, on a line that never falls."""
    (small, low), (large, high) = min(values.items()), max(values.items())
    if small == large:
        return low * own / small
    return max(low, high + max((high - low) / (large - small), 0.0) * (own - large))

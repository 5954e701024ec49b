"""A few steps of the configured method itself, on a slice of its classes, scaled up to a whole distillation.

A worker's step takes time in proportion to the classes that it owns, plus what is the same for any number (a new
network, its inner loop's batches): two slices give both. Inner and outer loops are measured short and scaled by their
counts, and steps that look at every real sample apart from those that decide from memory. Of a `replicate` method the
data set itself is cut to fewer classes. Left out: waiting for other workers, beyond the bytes that they exchange.
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
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.planning import dummy_data
from distill_at_scale.pipeline.planning.dummy_data import MadeUp
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.memory import peak
from distill_at_scale.pipeline.planning.micro_benchmarks import SECONDS, repeated, timed
from distill_at_scale.pruning.scoring.scorer import score_part_path

SHORT = {"experts": 1, "expert_epochs": 1, "max_start": 0, "target_epochs": 1, "teacher_epochs": 1, "label_epochs": 1}
DRAWN = ("real_batch", "candidates")  # keys of methods: real samples of a class that a step may see
OUTER, INNER = ("outer",), ("inner", "student_steps")  # keys of methods: loops within a step
NEVER = 10**9  # runtime.refresh: after the first step nothing is looked at
LATENCY, BANDWIDTH = 3e-4, 1e9  # seconds of one all-reduce of a few numbers, and bytes a second, by gloo on one machine
LARGEST_SLICE = 64  # classes


class Slice(SingleProcess):
    """One of many workers that owns a slice of the classes, alone here; counts what it would have exchanged."""

    def __init__(self, size: int):
        self.size, self.calls, self.bytes = size, 0, 0  # type: ignore[misc]

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        self.calls += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Step:
    """Seconds of a step with one kind of loops, and what a worker exchanges in it (calls, bytes)."""

    seconds: float
    calls: float = 0
    bytes: float = 0

    def with_exchange(self, workers: int) -> float:
        """Seconds, with the all-reduces between so many workers."""
        share = 2 * (workers - 1) / workers
        return self.seconds + (self.calls * LATENCY + self.bytes / BANDWIDTH) * share


@dataclass(frozen=True)
class Distilled:
    """A worker's part: seconds of a step and before the first one, bytes of new tensors at the peak of a step."""

    step: float
    prepare: float
    activations: int
    read: float  # seconds to read one more kept sample than was measured
    held: int  # samples of a class that were measured
    slice: int  # classes that were measured, of
    own: int  # classes that the worker owns
    loops: dict[str, int] = field(default_factory=dict)  # their real lengths, where they were measured short


class Stopwatch:
    """Measures the first worker of `workers`; made-up sets lie in `folder`."""

    def __init__(self, config: Config, facts: Facts, device: torch.device, workers: int, folder: Path):
        self.config, self.facts, self.device, self.workers, self.folder = config, facts, device, workers, folder
        self.kind = distill.method_class(config)
        self.shared = self.kind.parallel == "classes"
        self.own = -(-facts.classes // workers) if self.shared else facts.classes
        self.section: Any = getattr(config.distill, config.distill.method, None)
        self.prepare: dict[int, float] = {}
        self.sets: dict[int, MadeUp] = {}
        self.known: dict[tuple[int, int, int, bool], Step] = {}
        self.loops = self._loops()

    def measure(self) -> Distilled:
        first = self._step(1)
        few = max(1, min(self.own, LARGEST_SLICE, int(SECONDS / max(first.seconds, 1e-6))))
        sizes = sorted({1, few, min(self.own, 2)})[-2:]
        steps = {self._owned(n): self._typical(n) for n in sizes}
        peaks = {self._owned(n): float(self._peak(n)) for n in sizes}
        loops = {key: length for key, length in self.loops.items() if length > 2}
        step, prepare, held = (scaled(found, self.own) for found in (steps, self.prepare, peaks))
        return Distilled(step, prepare, int(held), self._reading(sizes[-1]), self._each, max(steps), self.own, loops)

    @property
    def _each(self) -> int:
        """Made-up samples of a class."""
        return max(1, min(max(self.facts.kept), self._drawn()))

    def _reading(self, classes: int) -> float:
        prepared = PreparedDataset(self._made(classes).prepared)
        return timed(lambda: prepared.load("train"), self.device) / sum(prepared.counts())

    def _typical(self, classes: int) -> float:
        """A step with its loops as long as they are; the mean of those that look at everything and those that do not."""
        quick, runtime = self._looped(classes), self.config.runtime
        if runtime.rule == "none" or self.kind.no_runtime or not runtime.drop:
            return quick
        ratio = self._step(classes, looks=True).seconds / max(self._step(classes).seconds, 1e-9)
        return quick * (1 + (max(1.0, ratio) - 1) / runtime.refresh)

    def _looped(self, classes: int) -> float:
        """t(outer, inner) from single and double loops: what an outer round adds, and within it an inner one."""
        outer, inner = self.loops.get("outer", 1), self.loops.get("inner", 1)
        first = self._cost(classes, 1, 1)
        if "outer" not in self.loops:
            return first + (inner - 1) * (max(0.0, self._cost(classes, 1, 2) - first) if inner > 1 else 0.0)
        second = self._cost(classes, 2, 1) if outer > 1 else first
        deeper = self._cost(classes, 2, 2) if outer > 1 and inner > 1 else second
        return first + (outer - 1) * (max(0.0, second - first) + (inner - 1) * max(0.0, deeper - second))

    def _cost(self, classes: int, outer: int, inner: int) -> float:
        return self._step(classes, outer, inner).with_exchange(self.workers)

    def _step(self, classes: int, outer: int = 1, inner: int = 1, looks: bool = False) -> Step:
        """A step after a warm-up; each is measured once."""
        key = classes, outer, inner, looks
        if key not in self.known:
            self.known[key] = self._measured(*key)
        return self.known[key]

    def _measured(self, classes: int, outer: int, inner: int, looks: bool) -> Step:
        running = self._start(classes, outer, inner, looks)
        workers = running.workers
        assert isinstance(workers, Slice)
        _once(running, 1)
        before = workers.calls, workers.bytes
        _once(running, 2)
        exchanged = workers.calls - before[0], workers.bytes - before[1]
        return Step(repeated(lambda: _once(running, 3), self.device, SECONDS / 4, most=8), *exchanged)

    def _peak(self, classes: int) -> int:
        running = self._start(classes, 1, 1, looks=True)
        _once(running, 1)
        return peak(lambda: _once(running, 2), self.device)

    def _start(self, classes: int, outer: int, inner: int, looks: bool) -> Distillation:
        """A distillation of made-up data in which this process owns about so many classes."""
        made = self._made(classes)
        config = self._shortened(outer, inner, looks)
        places = DistillPaths(
            made.prepared, made.manifest, made.folder / "work", made.folder / "log", made.folder / "networks"
        )
        for name in distill.missing_networks(config, places):
            places.networks.mkdir(exist_ok=True)
            distill.make_network(config, places, name, self.device, self._labels(classes))
        if self.kind.ranks_patches:
            _rank(config, places, self.device)
        found: list[Distillation] = []
        workers = Slice(self._size(classes) if self.shared else 1)
        took = timed(lambda: found.append(Distillation(config, places, workers, self.device)), self.device)
        owned = self._owned(classes)
        self.prepare[owned] = min(took, self.prepare.get(owned, took))  # the first one loads code
        return found[0]

    def _made(self, classes: int) -> MadeUp:
        if classes not in self.sets:
            names = None if self.shared else classes
            folder, labels = self.folder / f"{classes}", self._labels(classes)
            self.sets[classes] = dummy_data.write(folder, self.facts, labels, self._each, names=names)
        return self.sets[classes]

    def _labels(self, classes: int) -> range:
        """The classes that a made-up set has samples of."""
        return range(0, self.facts.classes, self._size(classes)) if self.shared else range(classes)

    def _drawn(self) -> int:
        """Real samples of a class that a step may see at most."""
        ipc = self.config.distill.ipc
        found = [value for key in DRAWN if (value := getattr(self.section, key, None))]
        together = getattr(self.section, "network_samples", 0) // self.facts.classes
        factor = getattr(self.section, "factor", 1) ** 2
        return max([*found, together, ipc * factor], default=256) if self.section else 256

    def _size(self, classes: int) -> int:
        """Workers among which each would own so many classes."""
        return max(1, self.facts.classes // classes)

    def _owned(self, classes: int) -> int:
        return len(range(0, self.facts.classes, self._size(classes))) if self.shared else classes

    def _loops(self) -> dict[str, int]:
        """The loops of a step that are measured short: their real lengths."""
        if self.section is None:
            return {}
        backend = self._start(1, 0, 0, looks=False).backend
        found = {}
        for name, keys in (("outer", OUTER), ("inner", INNER)):
            for key in keys:
                if hasattr(self.section, key):
                    found[name] = int(getattr(backend, key, None) or getattr(self.section, key) or 1)
        return found

    def _shortened(self, outer: int, inner: int, looks: bool) -> Config:
        """The configuration with loops of these lengths (0: as they are), and networks that are quick to make."""
        distilled = self.config.distill
        if self.section is not None:
            update: dict[str, Any] = {key: value for key, value in SHORT.items() if hasattr(self.section, key)}
            for keys, length in ((OUTER, outer), (INNER, inner)):
                update |= {key: length for key in keys if length and hasattr(self.section, key)}
            section = self.section.model_copy(update=update)
            distilled = distilled.model_copy(update={distilled.method: section})
        runtime = self.config.runtime.model_copy(update={"refresh": 1 if looks else NEVER})
        return self.config.model_copy(update={"distill": distilled, "runtime": runtime})


def _rank(config: Config, places: DistillPaths, device: torch.device) -> None:
    """The table of ranked patches, which the pipeline has made before the first step."""
    target, pieces = (make(places.networks, config) for make in (patch_ranking.table_path, patch_ranking.parts_folder))
    if target.exists():
        return
    pieces.mkdir(parents=True)
    candidates = patch_ranking.draw_candidates(places.manifest, config, pieces)
    units = [(chunk, score_part_path(pieces, chunk)) for chunk in PreparedDataset(places.prepared).chunks("train")]
    list(patch_ranking.PatchRanker(config, places.prepared, places.networks, device).rank(units))
    patch_ranking.merge([path for _, path in units], candidates, config.distill.rded.crops, target)


def _once(running: Distillation, step: int) -> None:
    with contextlib.suppress(DistillationDiverged):  # made-up data may; what it costs is the same
        running.backend.step(step)


def scaled(found: dict[int, float], own: int) -> float:
    """From the values of one or two slices to that of `own` classes, along a line."""
    (small, low), (large, high) = min(found.items()), max(found.items())
    if small == large:
        return low * own / small
    slope = max((high - low) / (large - small), 0.0)
    return max(low, high + slope * (own - large))

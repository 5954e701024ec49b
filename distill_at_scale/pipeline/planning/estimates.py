"""Expected wall time, memory and disk of every stage, from the measurements of `micro_benchmarks.py` and `step_benchmark.py`.

Counts come from `facts.py`, the spread over cores, GPUs and workers from `machine.py`. The start of Ray and its processes
has fixed figures. Not covered: other load on the machine, and cores that are slower when all of them work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from distill_at_scale.config.load import Config
from distill_at_scale.data.sampling import placement
from distill_at_scale.distillation import engine, evaluate
from distill_at_scale.distillation.methods.base import Cost, Method
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.planning import memory, micro_benchmarks
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout
from distill_at_scale.pipeline.planning.memory import IDS, PROCESS, WITH_TORCH
from distill_at_scale.pipeline.planning.step_benchmark import StepBenchmark, StepTimes
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.pruning.criteria.factory import build_criteria, needed_epochs
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.selection.ranking import RANDOM

T = TypeVar("T")
RAY, POOL, TASKS, TRAIN = 12.0, 4.0, 5.0, 12.0  # seconds: Ray's start, an actor pool's, a first task's, a Train group's
SELECT_EACH, SELECT_ONCE, REPORT = 2e-6, 0.005, 1.0  # seconds: select per sample, select, report


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will take."""

    stage: str
    parts: dict[str, float]  # seconds by part
    processes: int = 1  # of the largest kind, side by side
    host: int = 0  # bytes of one of these processes
    device: int = 0  # bytes of GPU memory of one of these processes
    disk: int = 0  # bytes that the stage leaves on the disk
    at_peak: int = 0  # temporary bytes on the disk
    machines: int = 1  # to pay for
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def cost(self, price: float | None) -> float | None:
        """`price` is per machine and hour."""
        return None if price is None else self.seconds / 3600 * price * self.machines


@dataclass(frozen=True)
class Planner:
    """Estimates of the stages of one configuration.

    Planners of configurations that differ in counts only (trials, epochs, steps, seeds) may share `measured`, so that each
    kind of work is measured once.
    """

    config: Config
    facts: Facts
    layout: ClusterLayout
    measured: dict[tuple[object, ...], Any] = field(default_factory=dict)

    @property
    def method(self) -> type[Method]:
        return engine.method_class(self.config)

    def ingest(self) -> StageEstimate:
        facts, spread = self.facts, self.layout.actors(gpu=False)
        assert facts.listing is not None
        listing, size = facts.listing, (facts.shape, self.config.data.resize)
        decoding = self._once(("decode", size), lambda: micro_benchmarks.decode(self.config, listing))
        writing = self._once(("write", size), lambda: micro_benchmarks.write(facts))
        side = max(1, min(spread.side_by_side, -(-facts.samples // self.config.data.chunk)))
        parts = {"decode": decoding.once + facts.samples * decoding.each / side, "sort": facts.samples * writing.each}
        disk = facts.samples * (facts.stored + IDS)
        host = max(memory.of_ingest(self.config, facts), PROCESS)
        return StageEstimate("ingest", self._started(parts, POOL), side, host, disk=disk, at_peak=disk,
                        machines=self.layout.machines(side))  # fmt: skip

    def score(self) -> StageEstimate:
        facts, score, device = self.facts, self.config.score, self.layout.device
        spec = proxy.network_spec(score, facts.shape, facts.classes, facts.kind)
        trials, epochs = score.checkpoint_counts
        parts, sizes = dict[str, float](), []
        criteria = build_criteria(score)
        if not criteria:
            notes = ["the cost of scores without proxies is not estimated"] if set(score.criteria) != {RANDOM} else []
            parts = {"write": facts.train * SELECT_EACH}
            return StageEstimate("score", parts, host=WITH_TORCH, disk=facts.train * IDS, notes=notes)
        checkpoints = trials * len(needed_epochs(criteria.values(), epochs))  # that the pass uses
        if score.weights is None:
            spread = self.layout.workers(score.workers) if score.workers > 1 else self.layout.tasks(trials)
            waves = trials if score.workers > 1 else spread.waves(trials)
            key = "proxy", str(spec), score.batch, spread.threads
            each = self._once(key, lambda: micro_benchmarks.proxy_training(self.config, facts, device, spread.threads))
            share = score.share / (spread.side_by_side if score.workers > 1 else 1)
            parts["train"] = waves * (each.once + epochs * facts.train * share * each.each)
            parts |= self._started({}, TRAIN if score.workers > 1 else TASKS)
            sizes.append((memory.of_proxy(self.config, spec, facts, device), spread.side_by_side))
        one = self._once(("scoring", str(spec)), lambda: micro_benchmarks.scoring(self.config, facts, device))
        side = max(1, min(self.layout.actors().side_by_side, -(-facts.train // self.config.data.chunk)))
        parts["score"] = one.once + facts.train * checkpoints * one.each / side
        sizes.append((memory.of_scorer(self.config, spec, facts, device), side))
        (host, on_device), side = max(sizes, key=lambda size: sum(size[0]) * size[1])
        kept = 0 if score.weights else trials * epochs * memory.parameters(spec) * (2 if score.momentum else 1)
        disk = facts.train * (IDS + 4 * len(criteria) * (1 + checkpoints)) + kept
        notes = []
        if others := [name for name in score.criteria if name not in ("loss", RANDOM)]:
            notes.append(f"estimated for the criterion loss; the extra cost of {', '.join(others)} is not included")
        return StageEstimate("score", self._started(parts, POOL), side, host, on_device, disk, disk - kept,
                        self.layout.machines(side), notes)  # fmt: skip

    def select(self) -> StageEstimate:
        parts = {"select": SELECT_ONCE + self.facts.train * SELECT_EACH}
        return StageEstimate("select", parts, host=WITH_TORCH + 2 * self.facts.train * 8, disk=self.facts.train * IDS)

    def distill(self) -> StageEstimate:
        facts, wanted, device = self.facts, self.config.distill, self.layout.device
        spread = self.layout.elastic_workers(wanted.min_workers, wanted.max_workers)
        workers = spread.side_by_side

        def measure() -> StepTimes:
            with tempfile.TemporaryDirectory() as folder:
                return StepBenchmark(self.config, facts, device, workers, Path(folder)).measure()

        per_step = wanted.model_copy(update={"steps": None, "checkpoint_every": 1, "evaluate_every": 0})
        measured = self._once(("distill", str(per_step), str(self.config.runtime), tuple(facts.kept), workers), measure)
        parts = {cost.what: self._seconds(cost) for cost in self.method.costs(self.config)}
        # samples that the dummy classes did not hold are read besides
        unread = sum(max(0, kept - measured.held) for kept in facts.kept) * measured.own / facts.classes
        parts["prepare"] = measured.prepare + unread * measured.read
        parts["steps"] = engine.step_count(self.config) * measured.step
        pool = self._pool(measured.own)
        held, _ = placement.choose(wanted.hold, pool, device, placement.memory_budget(device, spread.side_by_side))
        size = memory.of_distillation(measured.own, wanted.ipc, facts.values, pool, measured.activations, device, held)
        images = 4 * facts.classes * wanted.ipc * facts.values
        section = getattr(wanted, wanted.method, None)
        weights = memory.parameters(self._spec(getattr(section, "teacher_network", wanted.network)))
        states = 1 + getattr(section, "expert_epochs", 0)  # an expert has one state per epoch
        networks = len(self.method.networks(self.config)) * states * weights
        notes = [f"kept samples in {held}, {pool / 2**20:,.0f} MB per worker", *measured.notes()]
        return StageEstimate("distill", self._started(parts, TRAIN), workers, *size, images + networks, 5 * images,
                        self.layout.machines(workers), notes)  # fmt: skip

    def evaluate(self) -> StageEstimate:
        facts, section, device = self.facts, self.config.evaluate, self.layout.device
        distilled = controls.applicable(self.config, sum(facts.kept), facts.train)
        jobs = evaluate.jobs(self.config, distilled)
        spread = self.layout.tasks(len(jobs))
        protocol = self.method.protocol(self.config).overridden(section)
        long = protocol.overridden(section.model_copy(update={"epochs": section.bound_epochs}))
        small = 1 + len(distilled) + (section.control != "none")  # sets as large as the distilled one
        # images, protocol, networks
        sets = [(facts.classes * self.config.distill.ipc, protocol, small * section.seeds)]
        sets += [(sum(facts.kept) if one == "kept" else facts.train, long, section.seeds) for one in section.bounds]
        seconds, sizes = 0.0, [(0, 0)]
        for name in section.networks:
            spec = self._spec(name)
            for images, protocol, networks in sets:
                each = self._training(spec, protocol, images, spread.threads)
                seconds += networks * each * images * protocol.epochs
                sizes.append(memory.of_evaluation(spec, images, facts.values, facts.tests, protocol.batch, device))
            test = self._testing(spec, facts.tests, spread.threads)
            seconds += len(jobs) / len(section.networks) * test * facts.tests
        parts = {"train and test": seconds / len(jobs) * spread.waves(len(jobs))}
        for name in distilled:
            kept = replace(facts, kept=facts.counts) if name == evaluate.UNPRUNED else facts
            control = replace(self, config=controls.control_config(self.config, name), facts=kept).distill()
            parts[f"distil {name}"] = control.seconds
            sizes.append((control.host, control.device))
        return StageEstimate("evaluate", self._started(parts, TASKS), spread.side_by_side, *max(sizes), 0, 0,
                        self.layout.machines(spread.side_by_side))  # fmt: skip

    def report(self) -> StageEstimate:
        return StageEstimate("report", {"report": REPORT}, host=WITH_TORCH, disk=2 * 2**20)

    def _started(self, parts: dict[str, float], seconds: float) -> dict[str, float]:
        """Add the start of processes, if Ray starts them."""
        return parts if self.layout.local else parts | {"start": parts.get("start", 0.0) + seconds}

    def _spec(self, name: str) -> NetworkSpec:
        wanted = self.config.distill
        return NetworkSpec(name, self.facts.shape, self.facts.classes, wanted.width, wanted.depth, self.facts.kind)

    def _seconds(self, cost: Cost) -> float:
        """Seconds of work outside the method's steps."""
        count = sum(self.facts.kept) if cost.images == "kept" else self.facts.classes * self.config.distill.ipc
        names = self.method.networks(self.config)
        spread = self.layout.tasks(len(names)) if cost.backward and names else self.layout.workers(1)
        spec = self._spec(cost.network)
        if not cost.backward:
            return cost.passes * count * self._testing(spec, count, spread.threads)
        each = self._training(spec, TrainingProtocol(1, batch=128), count, spread.threads)
        waves = spread.waves(len(names)) / len(names) if names else 1.0  # tasks run side by side
        return cost.passes * count * each * waves

    def _training(self, spec: NetworkSpec, protocol: TrainingProtocol, count: int, cores: int) -> float:
        """Seconds of one image of an epoch of training on `count` images."""
        key = "training", str(spec), str(replace(protocol, epochs=1)), count, cores
        return self._once(key, lambda: micro_benchmarks.training(spec, protocol, count, self.layout.device, cores)).each

    def _testing(self, spec: NetworkSpec, count: int, cores: int) -> float:
        """Seconds of one image of a test."""
        key = "testing", str(spec), cores
        return self._once(key, lambda: micro_benchmarks.testing(spec, count, self.layout.device, cores)).each

    def _once(self, key: tuple[object, ...], measure: Callable[[], T]) -> T:
        """A measurement, made once by all planners that share `measured`."""
        if key not in self.measured:
            self.measured[key] = measure()
        return self.measured[key]

    def _pool(self, own: int) -> int:
        """Bytes of the kept samples of a worker's `own` largest classes."""
        return sum(sorted(self.facts.kept, reverse=True)[:own]) * self.facts.held

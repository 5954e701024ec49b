"""A dry run: the bodies of the stages on a few real samples, stopped after a few seconds, with the time that each unit takes.

Everything runs as in a run: the configuration, batches, threads, compiled code. What a first unit takes more (compiling,
loading) is kept apart from the steady state. Where the executor works side by side, other processes do the same meanwhile.
"""

from __future__ import annotations

import contextlib
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from distill_at_scale.config.load import Config
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors import helpers
from distill_at_scale.pipeline.executors.base import Result, Task, Unit, Worker
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pipeline.planning.memory import peak
from distill_at_scale.pruning.criteria.factory import build_criteria, needed_epochs
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.scorer import Scorer, forward_mode, score_part_path

SECONDS = 3.0  # of steady state per measurement
LEAST, MOST = 3, 500  # units of steady state
REFRESH = 3  # steps from one scored real batch to the next
SHORT = {"experts": 1, "expert_epochs": 1, "max_start": 0, "target_epochs": 1, "teacher_epochs": 1, "label_epochs": 1}
LOOPS = {"outer": "outer", "inner": "inner", "student_steps": "inner"}  # keys of methods: loops within a step


@dataclass(frozen=True)
class Rate:
    """Seconds of a unit in the steady state: the mean, and those of the fastest and the slowest part of the measurement."""

    each: float
    low: float
    high: float
    once: float = 0.0  # what the first units took more
    cold: float = 0.0  # what they took more when nothing was compiled before

    @classmethod
    def fixed(cls, seconds: float) -> Rate:
        return cls(seconds, seconds, seconds)

    def times(self, factor: float) -> Rate:
        return replace(self, each=self.each * factor, low=self.low * factor, high=self.high * factor)


class Enough(Exception):
    """Ends a dry run."""


def rate(stamps: Sequence[float], first: int = 2) -> Rate:
    """From the times of a start and of the ends of units. The `first` units, and later ones that compile, are kept apart."""
    units = [after - before for before, after in pairwise(stamps)]
    first = min(first, len(units) - 1)
    steady = units[first:]
    typical = statistics.median(steady)
    usual = [seconds for seconds in steady if seconds <= 5 * typical + 0.3]
    each = statistics.fmean(usual)
    size = max(1, len(usual) // 5)
    parts = [statistics.fmean(usual[k : k + size]) for k in range(0, len(usual) - size + 1, size)]
    return Rate(each, min(parts), max(parts), max(0.0, sum(units) - each * len(units)))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ticking(times: list[float], seconds: float | None) -> Callable[..., None]:
    """A callback for the end of a unit: raises Enough after `seconds` of steady state; 0: after two units; None: never."""

    def tick(*_: object) -> None:
        times.append(now())
        steady, least = len(times) - 3, LEAST if seconds else 0
        if seconds is not None and (steady >= MOST or (steady >= least and times[-1] - times[2] >= seconds)):
            raise Enough

    return tick


def optimizer_steps(body: Callable[[], object], seconds: float | None) -> list[float]:
    """The times of the start of a call, and of each step of an optimizer in it."""
    times = [now()]
    hook = register_optimizer_step_post_hook(ticking(times, seconds))
    try:
        with contextlib.suppress(Enough, DistillationDiverged):  # another learning rate takes as long
            body()
    finally:
        hook.remove()
    return times


class Slice(SingleProcess):
    """A worker of several, without the others."""

    def __init__(self, size: int):
        self.size = size  # type: ignore[misc]


class DryRun(Worker):
    """Measures; `work` is a name below, the threads, and arguments. Paths: the folder of `dry_data`."""

    name, event, long = "dry run", "dry run", True

    def load(self) -> None:
        self.prepared, self.manifest = self.paths["folder"] / "prepared", self.paths["folder"] / "manifest.parquet"
        self.data = PreparedDataset(self.prepared)
        self.work = Path(tempfile.mkdtemp(dir=self.paths["folder"]))

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            name, count, self.seconds, arguments = unit.work
            with threads(count):
                yield {"rate": getattr(self, name)(**arguments)}

    def _twice(self, measure: Callable[[float], Rate]) -> Rate:
        """Measured again, as the first time may compile for a machine that never did; its code then lies on the disk."""
        first = measure(0.0)
        again = measure(self.seconds)
        return replace(again, cold=max(0.0, first.once - again.once))

    def start(self) -> Rate:
        return Rate.fixed(0.0)

    def proxies(self, samples: int) -> Rate:
        """A batch of a proxy that is trained on `samples` samples, on the dry set."""
        score = self.config.score
        epochs = max(1, round(score.epochs * samples / sum(self.data.counts())))
        section = score.model_copy(update={"epochs": epochs, "share": 1.0, "weights": None})

        def measure(seconds: float) -> Rate:
            folder = Path(tempfile.mkdtemp(dir=self.work))
            trial = proxy.ProxyTrial(self.data, section, 0, self.config.run.seed, folder, self.device)
            return rate(optimizer_steps(trial.run, seconds))

        return self._twice(measure)

    def score(self, samples: int) -> Rate:
        """A sample under one checkpoint, of all checkpoints of a trial."""
        score, data = self.config.score, self.data
        spec = proxy.network_spec(score, data.shape, len(data.class_names), data.kind)
        trials, epochs = score.checkpoint_counts
        needed = needed_epochs(build_criteria(score).values(), epochs)
        passes, on_gpu = samples * trials * len(needed), self.device.type == "cuda"
        mode = forward_mode(spec, score, passes, on_gpu)
        update: dict[str, Any] = {"compile": "always" if mode.compiled else "never"}
        if score.weights is None:
            weights = {f"weight.{key}": value for key, value in spec.build(0).state_dict().items()}
            for epoch in needed:
                safetensors_io.save(proxy.checkpoint_path(self.work / "proxies", 0, epoch), weights, {})
            update["trials"] = 1
        config = self.config.model_copy(update={"score": score.model_copy(update=update)})
        times, chunks = [now()], data.chunks()
        scorer = Scorer(config, self.prepared, self.work / "proxies", self.device)
        parts = [Path(tempfile.mkdtemp(dir=self.work)) for _ in range(MOST * 2 // len(chunks) + 1)]
        tick = ticking(times, self.seconds)
        with contextlib.suppress(Enough):
            for _ in scorer.score([(chunk, score_part_path(part, chunk)) for part in parts for chunk in chunks]):
                tick()
        rows = statistics.fmean(chunk.rows for chunk in chunks)
        return rate(times).times(1 / (rows * len(scorer.checkpoints)))

    def networks(self) -> Rate:
        """An image of one pass of an expert's or a teacher's training; makes the networks that the steps need."""
        config, paths, seen = self._short(1, 1), self._paths("set"), Rate.fixed(0.0)
        images = sum(manifest.facts(paths.manifest)["kept_per_class"])
        paths.networks.mkdir(exist_ok=True)
        for name in engine.missing_networks(config, paths):
            times = optimizer_steps(partial(engine.make_network, config, paths, name, self.device), None)
            if len(times) > 2:
                seen = rate(times).times((len(times) - 1) / images)
        table = patch_ranking.table_path(paths.networks, config)
        if engine.method_class(config).ranks_patches and not table.exists():  # before the first step
            parts = patch_ranking.parts_folder(paths.networks, config)
            parts.mkdir(parents=True)
            candidates = patch_ranking.draw_candidates(paths.manifest, config, parts)
            units = [(chunk, score_part_path(parts, chunk)) for chunk in self.data.chunks()]
            list(patch_ranking.PatchRanker(config, paths.prepared, paths.networks, self.device).rank(units))
            patch_ranking.merge([path for _, path in units], candidates, config.distill.rded.crops, table)
        return seen

    def synthetic(self) -> Rate:
        """A whole distillation of one step, whose set is evaluated; `each` is its peak of memory in bytes."""
        config = self._short(1, 1)
        config = config.model_copy(update={"distill": config.distill.model_copy(update={"steps": 1})})
        distillation = Distillation(config, self._paths("set"), SingleProcess(), self.device)

        def run() -> None:
            made = distillation.run()
            assert made is not None
            made.save(self.work / "synthetic")

        bytes_ = peak(run, self.device)
        return Rate.fixed(bytes_)

    def steps(self, workers: int, prune: bool, kept: int) -> Rate:
        """A step of one of `workers` workers; `once` has the seconds before the first one."""
        config = self._short(0, 0, prune)
        method = self._start(config, workers).method
        lengths = {loop: int(getattr(method, key, 0) or getattr(self._section, key)) for key, loop in LOOPS.items()
                   if hasattr(self._section, key)}  # fmt: skip
        outer, inner = lengths.get("outer", 1), lengths.get("inner", 1)
        if max(outer, inner) <= 2:
            return self._steps(config, workers, self.seconds)
        # t(outer, inner) from loops of length one and two: what an outer round adds, and within it an inner one
        first = self._steps(self._short(1, 1, prune), workers, self.seconds / 3)
        second = self._steps(self._short(2, 1, prune), workers, self.seconds / 3) if outer > 1 else first
        deeper = self._steps(self._short(min(outer, 2), 2, prune), workers, self.seconds / 3) if inner > 1 else second
        rounds = outer - 1 if "outer" in lengths else 1
        added = rounds * (max(0.0, second.each - first.each) + (inner - 1) * max(0.0, deeper.each - second.each))
        return replace(first.times((first.each + added) / first.each), cold=first.cold)

    def _steps(self, config: Config, workers: int, seconds: float) -> Rate:
        times = [now()]
        distillation = self._start(config, workers)
        tick, step = ticking(times, seconds), distillation.method.step

        def timed(i: int) -> dict[str, float]:
            try:
                metrics = step(i)
            except DistillationDiverged:  # another learning rate takes as long
                metrics = {}
            tick()
            return metrics

        distillation.method.step = timed  # type: ignore[method-assign]
        with contextlib.suppress(Enough):
            distillation.run()
        seen = rate(times)
        if not engine.prunes(config) or self.config.runtime.refresh <= REFRESH or len(times) < 2 + REFRESH:
            return seen
        units = [after - before for before, after in pairwise(times)]
        scored = statistics.fmean(units[REFRESH::REFRESH])
        others = statistics.fmean(seconds for i, seconds in enumerate(units) if i >= 2 and i % REFRESH)
        return seen.times((others + max(0.0, scored - others) / self.config.runtime.refresh) / seen.each)

    def _start(self, config: Config, workers: int) -> Distillation:
        by_class = engine.method_class(config).parallel == "classes"
        group = Slice(workers if by_class else 1)
        return Distillation(config, self._paths(tempfile.mkdtemp(dir=self.work)), group, self.device)

    def train(self, network: str, of: str, scale: float) -> Rate:
        """A step of a network on a set; `scale`: how much larger the real set is."""
        section = self.config.evaluate
        bound = max(1, round(section.bound_epochs * scale))
        config = self.config.model_copy(update={"evaluate": section.model_copy(update={"bound_epochs": bound})})
        evaluator, job = self._evaluator(config), EvaluationJob(of, network, 0)
        return self._twice(lambda seconds: rate(optimizer_steps(lambda: evaluator.run(job), seconds)))

    def test(self, network: str) -> Rate:
        """A tested image."""
        section = self.config.evaluate.model_copy(update={"epochs": 1})
        evaluator, seen = self._evaluator(self.config.model_copy(update={"evaluate": section})), []
        for seed in range(3):
            job = EvaluationJob("distilled", network, seed)
            seen.append(-optimizer_steps(partial(evaluator.run, job), None)[-1] + now())
        count = len(evaluator.test[1])
        return Rate(statistics.fmean(seen[1:]) / count, min(seen) / count, max(seen[1:]) / count)

    def _evaluator(self, config: Config) -> Evaluator:
        return Evaluator(config, self.prepared, self.work / "synthetic", self.manifest, self.device)

    def _paths(self, name: str) -> DistillPaths:
        work = self.work / name
        work.mkdir(exist_ok=True)
        return DistillPaths(self.prepared, self.manifest, work, work / "metrics.jsonl", self.work / "networks")

    @property
    def _section(self) -> Any:
        return getattr(self.config.distill, self.config.distill.method, None)

    def _short(self, outer: int, inner: int, prune: bool = True) -> Config:
        """The configuration with networks that are quick to make, and loops of these lengths (0: unchanged)."""
        distill, section, lengths = self.config.distill, self._section, {"outer": outer, "inner": inner}
        update: dict[str, Any] = {"evaluate_every": 0}
        if section is not None:
            keys = {key: value for key, value in SHORT.items() if hasattr(section, key)}
            keys |= {key: lengths[loop] for key, loop in LOOPS.items() if lengths[loop] and hasattr(section, key)}
            update[distill.method] = section.model_copy(update=keys)
        runtime = self.config.runtime
        rule = runtime.rule if prune else "none"
        runtime = runtime.model_copy(update={"refresh": min(runtime.refresh, REFRESH), "rule": rule})
        return self.config.model_copy(update={"distill": distill.model_copy(update=update), "runtime": runtime})


def image_seconds(spec: NetworkSpec, device: torch.device) -> float:
    """Approximate seconds of one image forward and backward, to choose how much to measure."""
    network, images = spec.build(0).to(device).train(), torch.zeros(4, *spec.shape, device=device)
    targets, took = torch.zeros(4, dtype=torch.int64, device=device), 0.0
    for _ in range(2):
        began = now()
        F.cross_entropy(network(images), targets).backward()
        took = now() - began
    return max(1e-7, took / 4)


def first_step() -> float:
    """Seconds of the first step of an optimizer in this process, for which torch loads parts of itself."""
    began, weight = time.perf_counter(), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    weight.sum().backward()
    optimizer.step()
    return time.perf_counter() - began


class Crew:
    """This process, and others that do the same at the same time."""

    def __init__(self, config: Config, folder: Path, device: torch.device, others: int):
        began = time.perf_counter()
        self.task = Task(DryRun, config, {"folder": folder}, ())
        self.processes = [helpers.start(self.task, 1) for _ in range(others)]
        self.worker = DryRun(config, self.task.paths, device, TimeSpent())
        self._ask(("start", 1, 0.0, {}), others)
        self._answers(others)
        self.start_seconds = time.perf_counter() - began  # of a process

    def measure(self, name: str, side: int, count: int, seconds: float, **arguments: Any) -> Rate:
        """One of `side` processes with `count` threads each."""
        work, others = (name, count, seconds, arguments), min(side - 1, len(self.processes))
        self._ask(work, others)
        (result,) = self.worker.run([Unit(work)])
        return [result["rate"], *self._answers(others)][0]

    def _ask(self, work: tuple[Any, ...], others: int) -> None:
        for process in self.processes[:others]:
            assert process.stdin is not None
            pickle.dump(Unit(work), process.stdin)
            process.stdin.flush()

    def _answers(self, others: int) -> list[Rate]:
        answers = []
        for process in self.processes[:others]:
            assert process.stdout is not None
            answer = pickle.load(process.stdout)
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer[0]["rate"])
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

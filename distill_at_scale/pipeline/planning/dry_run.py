"""A dry run: the real stages on a few real samples in temporary run folders, with the time that each unit of their work takes.

Each stage runs twice, short and then for some seconds: what compiles, or is loaded once, falls into the first run. What the
first units take more is kept apart from the steady state. Where the executor works side by side, other processes do the same
meanwhile, in a group where the workers are one. The samples are repeated so that classes are large enough for full batches.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import current_workers, joined
from distill_at_scale.core.environment import most_memory
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.events import Event, TimeSpent
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest.plan import IngestPlan
from distill_at_scale.data.prepared import excerpt
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors import helpers
from distill_at_scale.pipeline.executors.base import Result, Task, Unit, Worker
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.executors.layout import Layout, Spread
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pipeline.stages import distill, evaluate, ingest, score, select
from distill_at_scale.pipeline.stages.context import RunContext
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.pruning.criteria.factory import build_criteria, needed_epochs
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.storage.stage_record import StageInputs

SECONDS = 3.0  # of steady state per measurement
FIRST, LEAST, MOST = 2, 4, 500  # first units; units of steady state
PROCESSES = 8  # side by side, at most
EACH = 16  # samples of a class that are ingested at first
CLASSES, SAMPLES, TESTS, BYTES = 20, 2048, 1000, 2**28  # limits of the dry set
STEP, BATCH, TEST = 10.0, 4.0, 3.0  # seconds: a step and a batch at most, a test about
# steps from one full measurement of runtime pruning to the next, at most: later ones count as if they came then
REFRESH = 10
DRAWN = ("real_batch", "candidates")  # keys of methods: real samples of a class that a step may use
SHORT = {"experts": 1, "expert_epochs": 1, "max_start": 0, "target_epochs": 1, "teacher_epochs": 1, "label_epochs": 1}
STAGES: dict[str, Any] = {"score": score, "select": select, "distill": distill, "evaluate": evaluate}
LOOPS = {"outer": "outer", "inner": "inner", "student_steps": "inner"}  # keys of methods: loops within a step


@dataclass(frozen=True)
class Rate:
    """Seconds of a unit in the steady state: the mean, and those of the fastest and the slowest part of the measurement."""

    each: float
    low: float
    high: float
    once: float = 0.0  # seconds that the first units took more
    last: float = 0.0  # seconds after the last unit
    units: int = 1  # that were measured
    host: int = 0  # bytes of memory that the process has needed so far
    device: int = 0  # and of a GPU's

    @classmethod
    def fixed(cls, seconds: float) -> Rate:
        return cls(seconds, seconds, seconds)

    @classmethod
    def of(cls, stamps: Sequence[float], end: float | None = None) -> Rate:
        """From the times of a start and of the ends of units. First units, and later ones that compile, are kept apart."""
        units = np.diff(stamps)
        if not len(units):
            return cls(0.0, 0.0, 0.0)
        steady = units[min(FIRST, len(units) - 1) :]
        usual = steady[steady <= 5 * np.median(steady) + 0.3]
        parts = [float(part.mean()) for part in np.array_split(usual, min(5, len(usual)))]
        each, last = float(usual.mean()), 0.0 if end is None else end - stamps[-1]
        return cls(each, min(parts), max(parts), max(0.0, float(units.sum()) - each * len(units)), last, len(units))

    def times(self, factor: float) -> Rate:
        return replace(self, each=self.each * factor, low=self.low * factor, high=self.high * factor)


class Enough(Exception):
    """Ends a distillation."""


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with other values of some sections, which are not validated."""
    return config.model_copy(update={name: getattr(config, name).model_copy(update=v) for name, v in sections.items()})


def looping(config: Config, outer: int, inner: int) -> Config:
    """A configuration with loops of these lengths within a step."""
    distill, lengths = config.distill, {"outer": outer, "inner": inner}
    section: Any = getattr(distill, distill.method, None)
    keys = {key: lengths[loop] for key, loop in LOOPS.items() if hasattr(section, key)}
    return changed(config, distill={distill.method: section.model_copy(update=keys)}) if keys else config


def now() -> float:
    """Unix seconds, as those of events."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


class Rehearsal(Worker):
    """Measures in one process, and observes the events of the stages. Paths: the folder of the dry set. `work`: the name of a
    method below; number, rank and size of its group of processes; threads; and arguments.
    """

    name, event, long = "dry run", "dry run", True

    def load(self) -> None:
        self.events, self.context, self.rest = list[Event](), self._context(self.config), dict[str, float]()
        os.symlink(self.paths["folder"] / "prepared", self.context.dir / "prepared")

    def _context(self, config: Config) -> RunContext:
        folder = tempfile.mkdtemp(dir=self.paths["folder"])
        context = RunContext(changed(config, run={"dir": folder, "reuse": None}), LocalExecutor, Display.silent())
        context.observers.all = [self]  # type: ignore[list-item]
        context.dir.create()
        return context

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            name, (number, *group), count, arguments = unit.work
            self.inputs = StageInputs({"number": number}, {})
            with threads(count), joined(f"file://{self.paths['folder']}/group-{number}", *group):
                rates = getattr(self, name)(**arguments)
            device = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
            yield {"rates": {name: replace(rate, host=most_memory(), device=device) for name, rate in rates.items()}}

    def load_torch(self) -> dict[str, Rate]:
        """The first step of an optimizer in this process, for which torch loads parts of itself."""
        began, weight = time.time(), torch.zeros(1, requires_grad=True)
        weight.sum().backward()
        torch.optim.SGD([weight]).step()
        return {"load": Rate.fixed(time.time() - began)}

    def ingest(self, plan: IngestPlan) -> dict[str, Rate]:
        """The stage on a listing."""
        data, score = {"transform": "none", "whiten": "none"}, {"criterion": "random"}
        context = self._context(changed(self.config, data=data, score=score))
        context.plan, context.warned, self.events, began = plan, True, [], time.time()
        ingest.run(context, StageInputs({}, {}))
        self.ingested = context.dir / "prepared"
        decode = sum(event.seconds for event in self.events if event.what == "work")
        return {"decode": Rate.fixed(decode), "all": Rate.fixed(time.time() - began)}

    def prepare(self, kept: int) -> dict[str, Rate]:
        """Keep samples at random, make the networks that the method needs, and a set by one step: all that others need."""
        select = {"criterion": "random", "keep": 1.0, "per_class": kept, "scope": "class", "order": "useful"}
        config = changed(looping(self.config, 1, 1), score={"criterion": "random"}, select=select, distill={"steps": 1})
        self.context.dir.complete("ingest", self.inputs, [self.context.dir / "prepared" / "dataset.json"], 0.0)
        for name, output in (("score", "scores.parquet"), ("select", "manifest.parquet"), ("distill", "synthetic")):
            rates = self.stage(name, config)
            self.context.dir.complete(name, self.inputs, [self.context.dir / output], 0.0)
        return rates

    def stage(self, stage: str, config: Config) -> dict[str, Rate]:
        """The rates of the units of its work, by name: steps of an optimizer within the long ones, else these themselves; and
        the most seconds that it took besides ("rest").
        """
        self.events, stamps, began = [], list[float](), now()
        self.context.config = changed(config, run={"dir": str(self.context.dir.path), "reuse": None})
        hook = register_optimizer_step_post_hook(lambda *_: stamps.append(now()))
        try:
            STAGES[stage].run(self.context, self.inputs)
        finally:
            hook.remove()
        rates, short, work = dict[str, Rate](), dict[str, list[float]](), [e for e in self.events if e.what == "work"]
        rest = now() - began - sum(event.seconds for event in work)
        self.rest[stage] = max(rest, self.rest.get(stage, 0.0))
        for event in work:
            key = " ".join([event.name, *(event.values[key] for key in ("set", "network") if key in event.values)])
            steps = [stamp for stamp in stamps if event.began < stamp <= event.ended]
            if steps:
                rates[key] = Rate.of([event.began, *steps], event.ended)
            else:
                short.setdefault(key, [event.began]).append(event.ended)
        return rates | {key: Rate.of(ends) for key, ends in short.items()} | {"rest": Rate.fixed(self.rest[stage])}

    def steps(self, config: Config, count: int) -> dict[str, Rate]:
        """The first `count` steps of a distillation, in a group of workers."""
        folder, work = self.context.dir, Path(tempfile.mkdtemp(dir=self.context.dir.path))
        networks = folder / "networks" / distill.network_inputs(config, folder).fingerprint[:16]
        paths = DistillPaths(folder / "prepared", folder / "manifest.parquet", work, work / "log", networks)
        stamps = [now()]
        distillation = Distillation(config, paths, current_workers(self.device), self.device)
        step = distillation.method.step

        def timed(i: int) -> dict[str, float]:
            with contextlib.suppress(DistillationDiverged):  # another learning rate takes as long
                step(i)
            stamps.append(now())
            if len(stamps) > count:
                raise Enough
            return {}

        distillation.method.step = timed  # type: ignore[method-assign]
        with contextlib.suppress(Enough):
            distillation.run() if count else None
        method, section = distillation.method, getattr(config.distill, config.distill.method, None)
        loops = {key: getattr(method, key, 0) or getattr(section, key) for key in LOOPS if hasattr(section, key)}
        return {"steps": Rate.of(stamps), **{key: Rate.fixed(number) for key, number in loops.items()}}


class DryRun:
    """Measures what is asked for, once, in this process and in others that do the same. `close` ends it."""

    def __init__(
        self, config: Config, facts: PlannedDataset, layout: Layout, prepared: PreparedDataset | None = None,
        seconds: float | None = None, most: int | None = None,
    ):  # fmt: skip
        """`prepared` holds the samples; None ingests some of the listing. A measurement lasts about `seconds` and uses at most
        `most` processes.
        """
        self.facts, self.layout, self.prepared, self.device = facts, layout, prepared, layout.device
        self.seconds = SECONDS if seconds is None else seconds
        self.most = 1 if self.device.type == "cuda" else min(layout.machine.cores, most or PROCESSES)
        wanted, section, short = config.distill, getattr(config.distill, config.distill.method, None), self.seconds / 3
        proxies = proxy.network_spec(config.score, facts.shape, facts.classes, facts.kind)
        matched = NetworkSpec(wanted.network, facts.shape, facts.classes, wanted.width, wanted.depth, facts.kind)
        image, trained = (spec.training_seconds(self.device) for spec in (matched, proxies))
        drawn = [value for key in DRAWN if (value := getattr(section, key, None))] or [64]
        trains, patches = getattr(section, "network_samples", 0), getattr(section, "factor", 1)
        self.drawn = max(*drawn, trains // facts.classes, wanted.ipc * patches**2)  # samples of a class for a step
        least = max(2, min(self.most, layout.group(wanted.min_workers, wanted.max_workers).side))
        fit = min(int(short * STEP / (image * self.kept_of(facts))), BYTES // (self.drawn * facts.held))
        self.classes = min(facts.classes, CLASSES, max(least, fit))
        batch = min(config.score.batch, max(4, int(short * BATCH / trained)))
        rows = max(self.drawn, -(-min(facts.train, max(SAMPLES, 8 * batch)) // self.classes))
        first = engine.method_class(config).first_kept(config) or 0
        self.each = max(1, wanted.ipc, first, min(rows, max(facts.counts), BYTES // (self.classes * facts.held)))
        self.trained, self.networks = self.classes * self.each, len(engine.method_class(config).networks(config))
        self.tests = max(self.classes, min(facts.tests, TESTS, max(64, int(short * TEST / image))))
        keys = {key: value for key, value in SHORT.items() if hasattr(section, key)}
        distill = {"steps": engine.step_count(config), "evaluate_every": 0}
        distill |= {wanted.method: section.model_copy(update=keys)} if section is not None else {}
        evaluate = {"controls": [], "control": "none", "seeds": 1, "split": "test", "bound_infobatch": 0.0}
        few = {"trials": 1, "share": 1.0, "batch": batch, "workers": 1, "imported": {}, "weights": None, "infobatch": 0}
        self.config = changed(config, score=few, select={"held_out": 0.0}, distill=distill, evaluate=evaluate)
        self._temporary = tempfile.TemporaryDirectory(prefix="distill_at_scale-")
        self.folder = Path(self._temporary.name)
        self._task = Task(Rehearsal, self.config, {"folder": self.folder}, ())
        self._own = Rehearsal(self.config, self._task.paths, self.device, TimeSpent())
        self._others, self.seen = list[subprocess.Popen[bytes]](), dict[Any, Any]()
        self._numbers, self._kept = itertools.count(), 0
        self.start, self.load = START, self._own.load_torch()["load"].each  # seconds: a process, and a first step in it

    def kept_of(self, facts: PlannedDataset) -> int:
        """Kept samples of a class that a step may use."""
        return max(1, min(self.drawn, round(sum(facts.kept) / facts.classes)))

    def ingest(self, spread: Spread) -> tuple[Rate, Rate, float]:
        """To decode a sample, to sort one, and the seconds of the stage besides."""
        each, most, seen = EACH, max(self.facts.counts), list[tuple[int, float, float]]()
        while "ingest" not in self.seen:
            assert self.facts.listing is not None
            plan = self.facts.listing.excerpt(self.classes, each)
            try:
                rates = self._measure("ingest", spread, plan=plan)
                seen.append((plan.samples, rates["decode"].each, rates["all"].each))
            except UserError:  # perhaps only because the first samples of a class are all broken
                if each >= most:
                    raise
            if len(seen) > 1 and (each >= most or seen[-1][1] >= self.seconds / 2):
                (_, _, cold), few, many = seen[0], seen[1], seen[-1]
                few = few if few[0] < many[0] else (0, 0.0, 0.0)
                decode, every = ((many[k] - few[k]) / (many[0] - few[0]) for k in (1, 2))
                once = max(0.0, many[2] - every * many[0]) + max(0.0, cold - seen[1][2])
                self.seen["ingest"] = Rate.fixed(max(0.0, decode)), Rate.fixed(max(0.0, every - decode)), once
                self.prepared = PreparedDataset(self._own.ingested)
            each *= 8 if len(seen) != 1 else 1
        return self.seen["ingest"]

    def ready(self, kept: int) -> Rate:
        """Of a sample in one pass of the training of an expert or a teacher. Afterwards all processes can run the stages."""
        if self.prepared is None:
            self.ingest(Spread(1, 1))
        assert self.prepared is not None
        if not (self.folder / "prepared").exists():
            excerpt.write(self.folder / "prepared", self.prepared, self.classes, self.each, self.tests)
        if self._kept != kept:
            side = 1 if self.layout.local and self.layout.tasks(99).side == 1 else self.most
            spread = self.layout.tasks(max(1, self.networks))
            rates = self._measure("prepare", spread, kept=kept)
            self._measure("prepare", Spread(side, 1), skip=min(spread.side, self.most), kept=kept)
            trained = [rate.times(rate.units) for name, rate in rates.items() if name.startswith("train a network")]
            self.seen["networks"] = (trained or [Rate.fixed(0.0)])[0].times(1 / (kept * self.classes))
            self._kept = kept
        return self.seen["networks"]

    def stage(self, name: str, spread: Spread, lengths: dict[str, int], **keys: Any) -> dict[str, Rate]:
        """The rates of the work of score or evaluate, with these keys of its section: of an epoch on the dry set where networks
        are trained. It runs for the epochs in `lengths`, then for as many as take some seconds.
        """
        key = name, spread, str(keys)
        if key not in self.seen:
            self.ready(self.kept_of(self.facts))
            for _ in range(2):
                config, epochs = changed(self.config, **{name: keys | lengths}), dict[str, int]()
                rates = self._measure("stage", spread, stage=name, config=config)
                for part, rate in rates.items():
                    which = "bound_epochs" if part.startswith(("evaluate kept", "evaluate full")) else "epochs"
                    if part == "score":  # of a sample, under one checkpoint
                        needed = needed_epochs(build_criteria(config.score).values(), lengths["epochs"])
                        rates[part] = rate.times(rate.units / (self.trained * len(needed)))
                    elif rate.last:
                        rates[part] = trained = rate.times(rate.units / lengths[which])
                        epochs[which] = min(epochs.get(which, MOST), int(self.seconds / max(1e-9, trained.each)))
                lengths = {which: max(least, epochs.get(which, least)) for which, least in lengths.items()}
            self.seen[key] = rates
        return self.seen[key]

    def steps(self, facts: PlannedDataset, spread: Spread, rule: str) -> Rate:
        """Of a step of one of the workers, with the kept samples of `facts`. Loops within a step are measured with one and two
        rounds: what an outer round adds, and within it an inner one.
        """
        kept = self.kept_of(facts)
        looks = {"rule": rule, "refresh": min(self.config.runtime.refresh, REFRESH)}
        key, base = ("steps", spread, rule, kept), changed(self.config, runtime=looks, select={"refresh": None})
        period = base.runtime.refresh if engine.prunes(base) else 1
        if key in self.seen:
            return self.seen[key]
        self.ready(kept)

        def of(config: Config) -> Rate:
            each = self._measure("steps", spread, True, config=config, count=FIRST + max(LEAST, period))["steps"].each
            rounds = max(-(-LEAST // period), min(MOST, int(self.seconds / max(1e-9, each))) // period)
            return self._measure("steps", spread, True, config=config, count=FIRST + rounds * period)["steps"]

        sizes = self._measure("steps", spread, True, config=base, count=0)
        lengths = {loop: round(sizes[key].each) for key, loop in LOOPS.items() if key in sizes}
        outer, inner = lengths.get("outer", 1), lengths.get("inner", 1)
        if max(outer, inner) <= 2:
            step = of(base)
        else:
            step = of(looping(base, 1, 1))
            second = of(looping(base, 2, 1)) if outer > 1 else step
            deeper = of(looping(base, min(outer, 2), 2)) if inner > 1 else second
            rounds = outer - 1 if "outer" in lengths else 1
            added = rounds * (max(0.0, second.each - step.each) + (inner - 1) * max(0.0, deeper.each - second.each))
            step = step.times((step.each + added) / step.each)
        self.seen[key] = step
        return step

    def _measure(self, name: str, spread: Spread, group: bool = False, skip: int = 0, **work: Any) -> dict[str, Rate]:
        """What a method of `Rehearsal` returns in this process, or of `side` processes in those after the first `skip`."""
        side, number = min(spread.side, self.most), next(self._numbers)
        if missing := max(0, side - 1 - len(self._others)):
            began, new = now(), [helpers.start(self._task, 1) for _ in range(missing)]
            self._others += new
            load = self._ask(new, [Unit(("load_torch", (0, 0, 1), 1, {}))] * missing)["load"].each
            self.load, self.start = max(self.load, load), now() - began - load
        groups = [(number, rank, side) if group else (number, 0, 1) for rank in range(side)]
        units = [Unit((name, one, spread.threads, work)) for one in groups]
        return self._ask([None, *self._others][skip:side], units[skip:])

    def _ask(self, processes: Sequence[subprocess.Popen[bytes] | None], units: Sequence[Unit]) -> dict[str, Rate]:
        """Units for some processes, None is this one; the rates of the first. Raises what one of them raised."""
        answers: list[Any] = []
        for process, unit in zip(processes, units, strict=True):
            if process is not None:
                helpers.ask(process, unit)
        for process, unit in zip(processes, units, strict=True):
            try:
                answers.append(helpers.answer(process) if process is not None else [*self._own.run([unit])])
            except UserError as error:
                answers.append(error)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers[0][0]["rates"] if answers else {}

    def close(self) -> None:
        for process in self._others:
            process.kill()
            process.wait()
        self._temporary.cleanup()

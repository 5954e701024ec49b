"""Expected wall time, memory and disk of every stage: the rates of a dry run, scaled up by counts.

Counts come from `facts.py`, the spread over cores, GPUs and workers from `machine.py`. The start of Ray and its processes
has fixed figures. Not covered: the exchange between the workers of a distillation, and the network.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.data.sampling import placement
from distill_at_scale.distillation import engine, evaluate
from distill_at_scale.distillation.methods.base import Method
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.planning import memory
from distill_at_scale.pipeline.planning.dry_run import Rate
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Spread
from distill_at_scale.pipeline.planning.measurements import Measurements
from distill_at_scale.pipeline.planning.memory import IDS, PROCESS, WITH_TORCH
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.pruning.criteria.factory import build_criteria, needed_epochs
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.selection.ranking import RANDOM

RAY = 12.0  # seconds: the start of Ray and of its processes
POOL, TASKS, TRAIN = 4.0, 5.0, 12.0  # seconds, on a running cluster: an actor pool's start, a first task's, a group's
SELECT_EACH, SELECT_ONCE, REPORT = 2e-6, 0.005, 1.0  # seconds: select per sample, select, report
UNSURE = 0.1  # of an estimate, besides the spread of its measurements
Part = tuple[str, float, Rate]  # its name, units, and the seconds of a unit


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will take."""

    stage: str
    parts: dict[str, float]  # seconds by part
    low: float = 0.0  # seconds of the stage, from the spread of the measurements
    high: float = 0.0
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


def later(estimate: StageEstimate, seconds: float, part: str = "start") -> StageEstimate:
    """An estimate with more seconds of a part."""
    parts = {**estimate.parts, part: estimate.parts.get(part, 0.0) + seconds}
    return replace(estimate, parts=parts, low=estimate.low + seconds / 1.5, high=estimate.high + 1.5 * seconds)


def finish(units: Sequence[float], starts: Sequence[float]) -> float:
    """Seconds until processes that begin at `starts` have worked through units, each taking the next one."""
    free, end = sorted(starts), 0.0
    for seconds in units:
        end = max(end, free[0] + seconds)
        heapq.heapreplace(free, free[0] + seconds)
    return end


@dataclass(frozen=True)
class Planner:
    """Estimates of the stages of one configuration, without the load of other programs on `without` cores."""

    config: Config
    facts: Facts
    layout: ClusterLayout
    measured: Measurements
    without: float = 0.0

    @property
    def method(self) -> type[Method]:
        return engine.method_class(self.config)

    def ingest(self) -> StageEstimate:
        facts, spread = self.facts, self.layout.actors(gpu=False)
        decode, sort, once = self.measured.ingest()
        side = max(1, min(spread.side_by_side, -(-facts.samples // self.config.data.chunk)))
        alone = Spread(1, 1)
        parts = [("decode", facts.samples / side, self._now(decode, spread)), ("sort", facts.samples, self._now(sort, alone)),
                 ("open", 1, self._now(Rate.fixed(once), alone)), *self._start(POOL)]  # fmt: skip
        disk = facts.samples * (facts.stored + IDS)
        host = max(memory.of_ingest(self.config, facts), PROCESS)
        whitened = ["whitening is not included"] if self.config.data.whiten != "none" else []
        return self._stage("ingest", parts, processes=side, host=host, disk=disk, at_peak=disk, notes=whitened,
                        machines=self.layout.machines(side))  # fmt: skip

    def score(self) -> StageEstimate:
        facts, score, device = self.facts, self.config.score, self.layout.device
        spec = proxy.network_spec(score, facts.shape, facts.classes, facts.kind)
        (trials, epochs), criteria, parts, sizes = score.checkpoint_counts, build_criteria(score), list[Part](), []
        if not criteria:
            notes = ["the cost of scores without proxies is not estimated"] if set(score.criteria) != {RANDOM} else []
            parts = [("write", facts.train, Rate.fixed(SELECT_EACH))]
            return self._stage("score", parts, host=WITH_TORCH, disk=facts.train * IDS, notes=notes)
        if score.weights is None:
            spread = self.layout.workers(score.workers) if score.workers > 1 else self.layout.tasks(trials)
            samples, workers = int(facts.train * score.share), spread.side_by_side if score.workers > 1 else 1
            batch = self._rate("proxies", spread, samples=samples)
            epoch = max(1, samples // score.batch) * min(samples, score.batch) / self.measured.batch / workers
            parts += self._units("proxies", [(epochs * epoch, batch)] * trials, Spread(1, 1) if workers > 1 else spread)
            sizes.append((spread.side_by_side, *memory.of_proxy(self.config, spec, facts, device)))
        spread = self.layout.actors()
        checkpoints = trials * len(needed_epochs(criteria.values(), epochs))  # that the pass uses
        rate = self._rate("score", spread, samples=facts.train)
        parts += [("score", facts.train * checkpoints / spread.side_by_side, rate), ("score", 1, Rate.fixed(rate.once))]
        sizes.append((spread.side_by_side, *memory.of_scorer(self.config, spec, facts, device)))
        side, host, on_device = max(sizes, key=lambda size: size[0] * (size[1] + size[2]))
        kept = facts.train * IDS + trials * epochs * memory.parameters(spec)
        notes = []
        if others := [name for name in score.criteria if name not in ("loss", RANDOM)]:
            notes.append(f"estimated for the criterion loss; the extra cost of {', '.join(others)} is not included")
        return self._stage("score", [*parts, *self._start(POOL)], processes=side, host=host, device=on_device,
                        disk=kept + facts.train * (4 * checkpoints + IDS), at_peak=facts.train * (4 * checkpoints + IDS),
                        machines=self.layout.machines(side), notes=notes)  # fmt: skip

    def select(self) -> StageEstimate:
        parts = [("select", 1, Rate.fixed(SELECT_ONCE + self.facts.train * SELECT_EACH))]
        host, disk = WITH_TORCH + 2 * self.facts.train * 8, self.facts.train * IDS
        return self._stage("select", parts, host=host, disk=disk)

    def distill(self) -> StageEstimate:
        facts, wanted, device, measured = self.facts, self.config.distill, self.layout.device, self.measured
        spread = self.layout.elastic_workers(wanted.min_workers, wanted.max_workers)
        workers, by_class = spread.side_by_side, self.method.parallel == "classes"
        own = -(-facts.classes // workers) if by_class else facts.classes
        held = -(-measured.classes // workers) if by_class else measured.classes
        prune = engine.prunes(self.config)
        step = self._now(measured.steps(facts, spread, workers, prune), spread).times(max(1.0, own / held))
        parts = list[Part]()
        for cost in self.method.costs(self.config):
            count = sum(facts.kept) if cost.images == "kept" else facts.classes * wanted.ipc
            names = self.method.networks(self.config)
            side = self.layout.tasks(len(names)) if cost.backward and names else self.layout.workers(1)
            rate = measured.made("networks") if cost.backward else self._rate("test", side, network=cost.network)
            waves = side.waves(len(names)) / len(names) if cost.backward and names else 1.0  # tasks run side by side
            parts.append((cost.what, cost.passes * count * waves, self._now(rate, side)))
        parts += [("prepare", 1, Rate.fixed(step.once)), ("steps", engine.step_count(self.config), step)]
        pool = sum(sorted(facts.kept, reverse=True)[:own]) * facts.held
        place, _ = placement.choose(wanted.hold, pool, device, placement.memory_budget(device, workers))
        peak = measured.made("synthetic").each * own / measured.classes
        size = memory.of_distillation(own, wanted.ipc, facts.values, pool, peak, device, place)
        images = 4 * facts.classes * wanted.ipc * facts.values
        section = getattr(wanted, wanted.method, None)
        weights = memory.parameters(self._spec(getattr(section, "teacher_network", wanted.network)))
        states = 1 + getattr(section, "expert_epochs", 0)  # an expert has one state per epoch
        disk = images + len(self.method.networks(self.config)) * states * weights
        notes = [f"kept samples in {place}, {pool / 2**20:,.0f} MB per worker"]
        if held < own:
            notes.append(f"measured on {held} of a worker's {own} classes and scaled up")
        return self._stage("distill", [*parts, *self._start(TRAIN)], processes=workers, host=size[0], device=size[1],
                        disk=disk, at_peak=5 * images, machines=self.layout.machines(workers), notes=notes)  # fmt: skip

    def evaluate(self) -> StageEstimate:
        facts, section, device, measured = self.facts, self.config.evaluate, self.layout.device, self.measured
        distilled = controls.applicable(self.config, sum(facts.kept), facts.train)
        jobs = evaluate.jobs(self.config, distilled)
        spread = self.layout.tasks(len(jobs))
        short = self.method.protocol(self.config).overridden(section)
        long = short.overridden(section.model_copy(update={"epochs": section.bound_epochs}))
        sizes, units = [(0, 0)], list[tuple[float, Rate]]()
        for job in jobs:
            bound, spec = job.set in section.bounds, self._spec(job.network)
            kept = sum(facts.kept) if job.set == "kept" else facts.train
            images, protocol = (kept, long) if bound else (facts.classes * self.config.distill.ipc, short)
            dry = {"kept": measured.kept_of(facts), "full": measured.each}.get(job.set, self.config.distill.ipc)
            dry *= measured.classes
            of = job.set if bound else "distilled"
            step = self._rate("train", spread, network=job.network, of=of, scale=images / dry if bound else 1.0)
            batches = math.ceil(images / protocol.batch) / math.ceil(dry / protocol.batch)
            per_epoch = math.ceil(dry / protocol.batch) * max(
                batches, min(images, protocol.batch) / min(dry, protocol.batch)
            )
            test = self._rate("test", spread, network=job.network)
            units.append((protocol.epochs * per_epoch, replace(step, once=step.once + facts.tests * test.each)))
            sizes.append(memory.of_evaluation(spec, images, facts.values, facts.tests, protocol.batch, device))
        parts = [*self._units("train and test", units, spread), *self._start(TASKS)]
        for name in distilled:
            kept_facts = replace(facts, kept=facts.counts) if name == evaluate.UNPRUNED else facts
            control = replace(self, config=controls.control_config(self.config, name), facts=kept_facts).distill()
            spreading = (control.seconds, control.low / (1 - UNSURE), control.high / (1 + UNSURE))
            parts.append((f"distil {name}", 1, Rate(*spreading)))
            sizes.append((control.host, control.device))
        host, on_device = max(sizes)
        return self._stage("evaluate", parts, processes=spread.side_by_side, host=host, device=on_device,
                        machines=self.layout.machines(spread.side_by_side))  # fmt: skip

    def report(self) -> StageEstimate:
        return self._stage("report", [("report", 1, Rate.fixed(REPORT))], host=WITH_TORCH, disk=2 * 2**20)

    def _stage(self, stage: str, work: Sequence[Part], **values: Any) -> StageEstimate:
        parts = dict[str, float]()
        for name, units, rate in work:
            parts[name] = parts.get(name, 0.0) + units * rate.each
        low = (1 - UNSURE) * sum(units * rate.low for _, units, rate in work)
        high = (1 + UNSURE) * sum(units * rate.high for _, units, rate in work) + max(rate.cold for *_, rate in work)
        return StageEstimate(stage, parts, low, high, **values)

    def _start(self, seconds: float) -> list[Part]:
        """The start of processes: on a running cluster in each stage; on a Ray of its own those of the first stage stay."""
        return [] if self.layout.local or self.layout.stays else [("start", 1, Rate.fixed(seconds))]

    def _units(self, name: str, units: Sequence[tuple[float, Rate]], spread: Spread) -> list[Part]:
        """Long units side by side; without Ray the other processes start later, if the work lasts long enough."""
        seconds = [count * rate.each + rate.once for count, rate in units]
        begin = 0.0 if not self.layout.local else START + self.measured.crew.start_seconds
        late = spread.side_by_side - 1 if self.layout.local is False or sum(seconds[1:]) > 2 * START else 0
        share = finish(seconds, [0.0, *[begin] * late]) / sum(seconds)
        low, high = (sum(count * getattr(rate, end) + rate.once for count, rate in units) for end in ("low", "high"))
        return [(name, share, Rate(sum(seconds), low, high, cold=max(rate.cold for _, rate in units)))]

    def _rate(self, name: str, spread: Spread, **arguments: Any) -> Rate:
        return self._now(self.measured.rate(name, spread, **arguments), spread)

    def _now(self, rate: Rate, spread: Spread) -> Rate:
        """A rate under the present load, or what it would be without."""
        slower = self.layout.slower(spread, self.without)
        return replace(rate.times(1 / slower), once=rate.once / slower)

    def _spec(self, name: str) -> NetworkSpec:
        wanted = self.config.distill
        return NetworkSpec(name, self.facts.shape, self.facts.classes, wanted.width, wanted.depth, self.facts.kind)

"""Expected wall time, memory and disk of every stage: the rates of a dry run, scaled up by counts.

Memory is what a process of the dry run needed, and what grows with the data. Not covered: the network between machines.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distill_at_scale.config.load import Config
from distill_at_scale.data.ingest.chunks import READ_BYTES
from distill_at_scale.data.prepared.format import scoring_chunk
from distill_at_scale.data.sampling import placement
from distill_at_scale.distillation import engine, evaluate
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.executors.layout import Layout, Spread
from distill_at_scale.pipeline.planning.dry_run import FIRST, LEAST, DryRun, Rate
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO, build_criteria, needed_epochs
from distill_at_scale.pruning.infobatch import expected_share
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.proxies.dataloader import WINDOW_BYTES
from distill_at_scale.pruning.scoring import scorer
from distill_at_scale.pruning.selection import portfolio

RAY = 0.5  # starts of a process: the start of Ray and of its processes
POOL, TASKS, TRAIN = 4.0, 5.0, 12.0  # seconds, on a running cluster: an actor pool's start, a first task's, a group's
SELECT_EACH, SELECT_ONCE, REPORT = 2e-6, 0.01, 0.6  # seconds: select per sample, select, report
KMEANS = 1e-8  # seconds per sample, feature and cluster, over all rounds of k-means; measured with CIFAR-10's sizes
UNSURE = 0.1  # of an estimate, besides the spread of its measurements
PROCESS = 450 * 2**20  # bytes of a process that has loaded torch
IDS = 64  # bytes of a sample's id, label and score in a table
Part = tuple[str, float, Rate]  # its name, units, and the seconds of a unit


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will take, and what it took if it has run."""

    stage: str
    parts: dict[str, float]  # seconds by part
    low: float = 0.0  # seconds of the stage, from the spread of the measurements
    high: float = 0.0
    processes: int = 1  # side by side
    host: int = 0  # bytes of one of these processes
    device: int = 0  # bytes of GPU memory of one of these processes
    disk: int = 0  # bytes that the stage leaves on the disk
    at_peak: int = 0  # temporary bytes on the disk
    cost: float | None = None
    actual: float | None = None
    before: bool = True  # whether the prediction was made before the stage ran
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def off(self) -> float | None:
        """predicted / actual - 1."""
        return None if not self.actual else self.seconds / self.actual - 1

    def later(self, seconds: float, part: str) -> StageEstimate:
        """With more seconds of a part, known within a factor of 1.5."""
        parts = {**self.parts, part: self.parts.get(part, 0.0) + seconds}
        return replace(self, parts=parts, low=self.low + seconds / 1.5, high=self.high + 1.5 * seconds)


def finish(units: Sequence[float], starts: Sequence[float]) -> float:
    """Seconds until processes that begin at `starts` have worked through units, each taking the next one."""
    free, end = sorted(starts), 0.0
    for seconds in units:
        end = max(end, free[0] + seconds)
        heapq.heapreplace(free, free[0] + seconds)
    return end


@dataclass(frozen=True)
class Planner:
    """Estimates of the stages of one configuration: its methods `ingest` to `report`."""

    config: Config
    facts: PlannedDataset
    layout: Layout
    measured: DryRun

    def ingest(self) -> StageEstimate:
        facts, spread = self.facts, self.layout.actors(gpu=False)
        side = max(1, min(spread.side, -(-facts.samples // self.config.data.chunk)))
        decode, sort, once = self.measured.ingest(Spread(side, 1))
        parts = [("decode", facts.samples / side, decode), ("sort", facts.samples, sort), ("open", 1, Rate.fixed(once))]
        notes = ["whitening is not included"] if self.config.data.whiten != "none" else []
        return self._stage("ingest", parts, POOL, notes)

    def score(self) -> StageEstimate:
        facts, score, parts, criteria = self.facts, self.config.score, list[Part](), build_criteria(self.config.score)
        notes = ["the criterion monte_carlo is not included"] if MONTE_CARLO in score.criteria else []
        if not criteria:
            return self._stage("score", [("write", facts.train, Rate.fixed(SELECT_EACH))], 0.0, notes)
        spec = proxy.network_spec(score, facts.shape, facts.classes, facts.kind)
        samples, passing = int(facts.train * score.share), self.layout.actors()
        (trials, count), on_gpu = score.checkpoint_counts, self.layout.device.type == "cuda"
        # epochs of the dry run, with one checkpoint each: as few as the criteria accept
        least = max({"forgetting": 2, "cad": score.cad_windows + 2}.get(name, 1) for name in criteria)

        def rates(spread: Spread, mode: ForwardMode) -> dict[str, Rate]:
            keys = {"compile": "always" if mode.compiled else "never", "criterion": list(criteria), "cad_length": None}
            return self.measured.stage("score", spread, {"epochs": least}, checkpoints_per_epoch=1, **keys)

        if score.weights is None:
            together = score.workers > 1 and not self.layout.local
            spread = self.layout.group(score.workers, score.workers) if together else self.layout.tasks(trials)
            rate = rates(spread, proxy.forward_mode(spec, score, samples, on_gpu))["train a proxy"]
            epochs = score.epochs * expected_share(score.infobatch, math.ceil(score.epochs))
            units = epochs * samples / self.measured.trained / (spread.side if together else 1)
            parts += self._units("proxies", [(units, rate)] * trials, Spread(1, 1) if together else spread)
        checkpoints = trials * len(needed_epochs(criteria.values(), count))
        seen = rates(passing, scorer.forward_mode(spec, score, facts.train * checkpoints, on_gpu))
        parts += [("score", facts.train * checkpoints / passing.side, seen["score"])]
        parts += [("score", 1, Rate.fixed(seen["score"].once)), ("write", 1, seen["rest"])]
        if "clusters" in criteria:  # the concatenated features of all trials, in one thread
            products = float(facts.train) * trials * score.features * score.clusters
            parts.append(("cluster", products, Rate(KMEANS, KMEANS / 3, 3 * KMEANS)))
        if trials > 1:  # SciPy is loaded for their agreement, which takes about as long as that part of torch
            parts.append(("write", 1, Rate.fixed(self.measured.load)))
        return self._stage("score", parts, POOL, notes)

    def select(self) -> StageEstimate:
        """With select: auto, with its short distillations, one actor each."""
        config, auto, notes = self.config, self.config.select.auto, list[str]()
        parts = [("select", 1.0, Rate.fixed(SELECT_ONCE + self.facts.train * SELECT_EACH))]
        if config.select.keep == "auto":
            distill, test, steps = self.distill(), self.evaluate(), engine.step_count(config)
            step, rounds = (
                distill.processes * distill.parts["steps"] / steps,
                portfolio.planned(config, self.facts.counts, steps),
            )
            ready = distill.parts["prepare"]
            each = auto.evaluations * test.processes * test.parts["train and test"] / len(self._jobs())
            count = sum(one.points for one in rounds)
            search = (
                sum(one.points * (ready + one.share * each + one.steps * step) for one in rounds)
                / self.layout.actors().side
            )
            search = min(search, 60 * (auto.minutes or math.inf))
            parts.append(("search", 1, Rate(search, search / 1.5, 1.5 * search)))
            then = "later stages are planned as if all samples were kept"
            notes.append(f"select: auto tries {rounds[0].candidates} selections in {count} short distillations; {then}")
        return self._stage("select", parts, 0.0, notes)

    def distill(self) -> StageEstimate:
        facts, wanted, measured, parts = self.facts, self.config.distill, self.measured, list[Part]()
        method, spread = engine.method_class(self.config), self.layout.group(wanted.min_workers, wanted.max_workers)
        names = method.networks(self.config)
        for cost in method.costs(self.config):
            count = cost.passes * (sum(facts.kept) if cost.images == "kept" else facts.classes * wanted.ipc)
            if cost.backward and names:  # side by side
                count *= -(-len(names) // self.layout.tasks(len(names)).side) / len(names)
                parts.append((cost.what, count, measured.ready(measured.kept_of(facts))))
            else:  # labelling takes about as long as testing
                tested = next(iter(self._trainings().values())).last / measured.tests
                parts.append((cost.what, count, Rate.fixed(tested)))
        step, own, held = measured.steps(facts, spread, self.config.runtime.rule), facts.classes, measured.classes
        if method.parallel == "classes":
            own, held = -(-own // spread.side), -(-held // min(spread.side, measured.most))
        if every := self.config.select.refresh:  # rating a sample takes about as long as testing it
            rated = (engine.step_count(self.config) - 1) // every * self.config.select.refresh_pool * facts.train
            tested = next(iter(self._trainings().values())).last / measured.tests
            parts.append(("renew the kept samples", rated / spread.side, Rate.fixed(tested)))
        notes = [f"measured on {held} of a worker's {own} classes and scaled up"] if held < own else []
        parts += [("prepare", 1, Rate.fixed(step.once))]
        parts += [("steps", engine.step_count(self.config), step.times(max(1.0, own / held)))]
        return self._stage("distill", parts, TRAIN, notes)

    def evaluate(self) -> StageEstimate:
        facts, section, measured, units = self.facts, self.config.evaluate, self.measured, list[tuple[float, Rate]]()
        epochs = engine.method_class(self.config).protocol(self.config).overridden(section).epochs
        kept, rates = measured.kept_of(facts) * measured.classes, self._trainings()
        scale = {"kept": sum(facts.kept) / kept, "full": facts.train / measured.trained}
        for job in self._jobs():
            of = job.set if job.set in section.bounds else "distilled"
            rate = rates[f"evaluate {of} {job.network}"]
            share = expected_share(section.bound_infobatch, section.bound_epochs)
            count = section.bound_epochs * share if of != "distilled" else epochs
            once = rate.once + rate.last * facts.tests / measured.tests
            units.append((count * scale.get(of, facts.classes / measured.classes), replace(rate, once=once)))
        parts = [*self._units("train and test", units, self.layout.tasks(len(units))), ("open", 1, rates["rest"])]
        for name in controls.applicable(self.config, sum(facts.kept), facts.train):
            others = replace(facts, kept=facts.counts) if name == evaluate.UNPRUNED else facts
            one = replace(self, config=controls.control_config(self.config, name), facts=others).distill()
            parts.append((f"distil {name}", 1, Rate(one.seconds, one.low / (1 - UNSURE), one.high / (1 + UNSURE))))
        return self._stage("evaluate", parts, TASKS)

    def report(self) -> StageEstimate:
        return self._stage("report", [("report", 1, Rate.fixed(REPORT))])

    def size(self, stage: str) -> StageEstimate:
        """What follows from the sizes of the data alone: processes side by side, their memory, and the disk."""
        facts, config, wanted, side, host, disk, device = self.facts, self.config, self.config.distill, 1, 0, 0, 0
        if stage == "ingest":
            side, disk = self.layout.actors(gpu=False).side, facts.samples * (facts.stored + IDS)
            host = 4 * READ_BYTES + 2 * config.data.chunk * facts.stored
        elif stage == "score":
            side, (trials, epochs) = self.layout.actors().side, config.score.checkpoint_counts
            chunk = min(facts.train, scoring_chunk(facts.shape, config.data.chunk)) * facts.held
            window = min(WINDOW_BYTES, int(facts.train * config.score.share) * facts.stored)
            host = 3 * max(
                chunk, window * self.layout.tasks(trials).side // side
            )  # only proxies in training have a window
            disk = facts.train * (IDS + 4 * trials * epochs)
        elif stage == "select":
            host, disk = 2 * facts.train * IDS, facts.train * IDS
        elif stage == "distill":
            side = self.layout.group(wanted.min_workers, wanted.max_workers).side
            first = engine.method_class(config).first_kept(config)
            own = -(-facts.classes // side) if engine.method_class(config).parallel == "classes" else facts.classes
            pool, disk = (
                sum(sorted(min(n, first or n) for n in facts.kept)[-own:]) * facts.held,
                4 * facts.classes * wanted.ipc * facts.values,
            )
            budget = placement.memory_budget(self.layout.device, side)
            place, _ = placement.choose(wanted.hold, pool, self.layout.device, budget)
            images = 3 * 4 * own * wanted.ipc * facts.values  # with gradient and momentum
            host, device = images + pool * (place == "host"), images + pool * (place == "device")
        elif stage == "evaluate":
            side, real = self.layout.tasks(len(self._jobs())).side, {"kept": sum(facts.kept), "full": facts.train}
            images = max([facts.classes * wanted.ipc, *(real[name] for name in config.evaluate.bounds)])
            host = 2 * (facts.tests + images) * facts.held
        device *= self.layout.device.type == "cuda"
        return StageEstimate(stage, {}, processes=side, host=host, device=device, disk=disk, at_peak=disk)

    def _stage(self, stage: str, work: Sequence[Part], start: float = 0.0, notes: Sequence[str] = ()) -> StageEstimate:
        """`start`: seconds in which processes start on a running cluster; on a Ray of its own those of the first stage stay."""
        if start and not self.layout.local and (self.layout.remote or self.config.cluster.gpus_per_worker):
            work = [*work, ("start", 1, Rate.fixed(start))]
        parts, size = dict[str, float](), self.size(stage)
        for name, units, rate in work:
            parts[name] = parts.get(name, 0.0) + units * rate.each
        low, high = (sum(units * getattr(rate, end) for _, units, rate in work) for end in ("low", "high"))
        host, device = (max(getattr(rate, name) for *_, rate in work) for name in ("host", "device"))
        memory = {"host": size.host + max(PROCESS, host), "device": size.device + device}
        return replace(size, parts=parts, low=(1 - UNSURE) * low, high=(1 + UNSURE) * high, notes=list(notes), **memory)

    def _units(self, name: str, units: Sequence[tuple[float, Rate]], spread: Spread) -> list[Part]:
        """Long units side by side; without Ray the other processes start later, if the work lasts long enough."""
        seconds = [count * rate.each + rate.once for count, rate in units]
        late = spread.side - 1 if not self.layout.local or sum(seconds[1:]) > 2 * START else 0
        starts = [0.0, *[START + self.measured.start if self.layout.local else 0.0] * late]
        low, high = (sum(count * getattr(rate, end) + rate.once for count, rate in units) for end in ("low", "high"))
        return [
            (name, finish(seconds, starts) / sum(seconds), replace(units[0][1], each=sum(seconds), low=low, high=high))
        ]

    def _jobs(self) -> list[EvaluationJob]:
        return evaluate.jobs(self.config, controls.applicable(self.config, sum(self.facts.kept), self.facts.train))

    def _trainings(self) -> dict[str, Rate]:
        """An epoch of each network on each kind of set, and the test after the last one."""
        bounds = {"bound_epochs": 1} if self.config.evaluate.bounds else {}
        return self.measured.stage(
            "evaluate", self.layout.tasks(len(self._jobs())), {"epochs": LEAST + FIRST, **bounds}
        )

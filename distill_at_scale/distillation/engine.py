"""The one loop: a backend's steps, with checkpoints, resume, a log, and a clean stop where a loss is not finite.

It runs the same in one process and in each worker of a group: every worker owns some classes and their synthetic
images. State is gathered to rank 0 only to be saved (`distillation/checkpoint.py`), so all workers resume from the same step.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.core.atomic_files import resolve_parent
from distill_at_scale.core.collectives import Collectives, SingleProcess
from distill_at_scale.core.environment import gpu_memory
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import derive
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.prepared.whitening import whitening_card
from distill_at_scale.data.sampling import placement
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation import checkpoint, evaluate
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.checkpoint import Saved
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import Method, MethodContext, MethodDefaults, too_few_message
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.models.spec import NetworkSpec

BACKEND_CONTRACT = (
    "parallel",
    "default_steps",
    "init_of",
    "protocol",
    "prepare",
    "step",
    "snapshot",
    "state_dict",
    "load_state_dict",
)
SNAPSHOT_CLASSES, SNAPSHOT_IPC = 10, 5
LOG_LINES = 200  # at most so many lines of the log per run, evenly spaced
LATE, DIVERGED = 1, 2  # what a worker may tell the others after a step: save a checkpoint; end

Report = Callable[[dict[str, Any]], None]


def method_class(config: Config) -> type[Method]:
    """The method; what one of the user's own leaves out of the contract it answers as most do."""
    found = resolve("distill.method", config.distill.method, METHODS, BACKEND_CONTRACT)
    return found if issubclass(found, MethodDefaults) else type(found.__name__, (found, MethodDefaults), {})


def runtime_of(config: Config) -> dict[str, Any]:
    """What the card says of runtime pruning; methods without a real matching batch do none, and say why."""
    reason = method_class(config).no_runtime
    if reason and config.runtime.rule != "none":
        return {"rule": "not applicable", "reason": reason}
    return config.runtime.model_dump()


def step_count(config: Config) -> int:
    return config.distill.steps or method_class(config).default_steps


class Classes(evaluate.Splits, Protocol):
    @property
    def class_names(self) -> list[str]: ...


def check(config: Config, prepared: Classes, kept_per_class: list[int]) -> None:
    """What can be known to fail before any worker starts.

    Raises UserError for a class with no kept sample or with fewer than the images to be initialised from real ones, for
    more workers than classes, and for evaluation on the way without a test split.
    """
    names = prepared.class_names
    for name, kept in zip(names, kept_per_class, strict=True):
        if kept == 0:
            raise UserError(
                f"the manifest keeps no sample of the class {name!r}; raise select.keep or select.min_per_class"
            )
        if method_class(config).init_of(config) == "real" and kept < config.distill.ipc:
            raise UserError(too_few_message(name, kept, config.distill.ipc))
    if config.distill.evaluate_every:
        evaluate.need_test_split(prepared)
    if config.distill.max_workers > len(names) and method_class(config).parallel == "classes":
        raise UserError(
            f"distill.workers = {config.distill.workers} is more than the {len(names)} classes; lower it to {len(names)}"
        )


@dataclass(frozen=True)
class DistillPaths:
    """Where the loop reads and writes."""

    prepared: Path
    manifest: Path
    work: Path  # the checkpoint
    log: Path  # metrics.jsonl
    networks: Path = Path()  # the folder of the experts or the teacher that the method needs

    @property
    def state(self) -> Path:
        return self.work / "state.safetensors"

    def located(self) -> DistillPaths:
        return DistillPaths(*(resolve_parent(path) for path in self.as_tuple()))

    def as_tuple(self) -> tuple[Path, ...]:
        return self.prepared, self.manifest, self.work, self.log, self.networks


def setting_of(
    config: Config, prepared: PreparedDataset, places: DistillPaths, workers: Collectives, device: torch.device
) -> MethodContext:
    """What a worker's backend knows; of `classes` methods each worker owns every size-th class."""
    names, section = prepared.class_names, config.distill
    labels = list(range(len(names)))
    if method_class(config).parallel == "classes":
        labels = labels[workers.rank :: workers.size]
    spec = NetworkSpec(section.network, prepared.shape, len(names), section.width, section.depth, prepared.kind)
    return MethodContext(
        config,
        spec,
        names,
        labels,
        workers,
        device,
        step_count(config),
        places.networks,
        tuple(prepared.source_class_names),
    )


def missing_networks(config: Config, places: DistillPaths) -> list[str]:
    """The networks that the method needs and that have not been made yet."""
    return [name for name in method_class(config).networks(config) if not (places.networks / name).exists()]


def make_network(
    config: Config, places: DistillPaths, name: str, device: torch.device, labels: Sequence[int] | None = None
) -> None:
    """Make one of them, from the kept samples alone, of all classes or of some."""
    prepared = PreparedDataset(places.prepared)
    chosen = range(len(prepared.class_names)) if labels is None else labels
    setting = replace(setting_of(config, prepared, places, SingleProcess(), device), labels=list(chosen))
    hold = config.distill.hold
    pool = ClassSampler.load(prepared, places.manifest, setting.labels, config.distill_seed, device, hold)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        method_class(config).make_network(name, setting, pool)


def shared_room(config: Config, workers: Collectives, device: torch.device) -> placement.MemoryBudget:
    """What one worker may fill with samples, where several share a machine; all must call it, and before they load."""
    found = placement.memory_budget(device, share=min(1.0, config.cluster.gpus_per_worker or 1.0))
    host = socket.gethostname()
    every = [free for name, free in workers.gather((host, found.host)) if name == host]
    return replace(found, host=min(every) // len(every))


class Distillation:
    """One worker's share of a distillation."""

    def __init__(
        self,
        config: Config,
        places: DistillPaths,
        workers: Collectives,
        device: torch.device,
        report: Report = lambda _: None,
    ):
        self.config, self.places, self.workers, self.device, self.report = config, places, workers, device, report
        self.prepared = PreparedDataset(places.prepared)
        self.steps = step_count(config)
        self.setting = setting_of(config, self.prepared, places, workers, device)
        hold, free = config.distill.hold, shared_room(config, workers, device)
        pool = ClassSampler.load(
            self.prepared, places.manifest, self.setting.labels, config.distill_seed, device, hold, free
        )
        self.sampler, self.held = pool, pool.held
        self.normalization: Normalization = pool.normalization
        self.backend = method_class(config)(self.setting)
        self.backend.prepare(pool)
        self.snapshots: dict[int, Tensor] = {}
        self.logged = 0, 0.0  # step and seconds of the last line of the log
        self.timer = checkpoint.Timer()

    def run(self) -> SyntheticSet | None:
        """All steps from the last checkpoint on; the set on rank 0, None elsewhere.

        Raises DistillationDiverged on every worker where one diverged, after the last good state was saved.
        """
        start, spent = self._resume()
        everyone = self.workers.gather((socket.gethostname(), os.getpid()))
        if self.workers.rank == 0:
            begins = {"held": self.held, "at": time.time(), "workers": everyone}
            self._write({"stage": "hold", "step": start, "of": self.steps, **begins})
        began = time.perf_counter() - spent
        self.logged = start, spent
        log_every = max(1, self.steps // LOG_LINES)
        self.sampler.schedule(chain.from_iterable(map(self.backend.draws, range(start, self.steps))))
        for i in range(start, self.steps):
            if i in self._snapshot_steps():
                self._snapshot(i)
            metrics, late = self._step(i, began)
            last = i + 1 == self.steps
            if (i + 1) % log_every == 0 or last:
                self._log(i + 1, metrics, time.perf_counter() - began)
            if self.config.distill.evaluate_every and (i + 1) % self.config.distill.evaluate_every == 0:
                self._evaluate(i + 1)  # before the checkpoint, as whoever goes on from that does not come here again
            if (i + 1) % self.config.distill.checkpoint_every == 0 or last or late:
                self._save(i + 1, time.perf_counter() - began)
        self._snapshot(self.steps)
        return self._finish()

    def _step(self, i: int, began: float) -> tuple[dict[str, float], bool]:
        """A step's metrics, and whether a checkpoint is late."""
        problem: DistillationDiverged | None = None
        metrics: dict[str, float] = {}
        try:
            metrics = self.backend.step(i)
        except DistillationDiverged as error:
            problem = error
        late = self.workers.rank == 0 and self.timer.is_due  # it writes the file, so it knows how long that takes
        told = self.workers.all_reduce_max(DIVERGED if problem else LATE if late else 0)
        if told == DIVERGED:
            self._save(i, time.perf_counter() - began)
            visit, message = self.workers.smallest((problem.visit, str(problem)) if problem else None)
            raise DistillationDiverged(message, visit)
        return metrics, told == LATE

    def _snapshot_steps(self) -> set[int]:
        return {int(self.steps * share) for share in (0, 0.01, 0.05, 0.2, 0.5)}

    def _snapshot(self, step: int) -> None:
        """Note, on rank 0, the first images of the first classes as they are before step `step`."""
        images, labels = self._gather()
        if self.workers.rank == 0:
            ipc = self.config.distill.ipc
            shown = (labels < SNAPSHOT_CLASSES) & (torch.arange(len(labels)) % ipc < SNAPSHOT_IPC)
            self.snapshots[step] = self.normalization.stored(images[shown])

    def _gather(self) -> tuple[Tensor, Tensor]:
        """All workers' images and labels, sorted by label."""
        parts = self.workers.gather(self.backend.snapshot())
        if self.backend.parallel == "replicate":
            parts = parts[:1]
        images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        order = torch.argsort(labels, stable=True)
        return images[order], labels[order]

    def _save(self, step: int, seconds: float) -> None:
        began = time.monotonic()
        alone = self.backend.parallel == "replicate"  # everyone has the same
        states = self.workers.gather(self.backend.state_dict() if not alone or self.workers.rank == 0 else {})
        if self.workers.rank == 0:
            state: dict[str, Tensor] = {}
            for part in states:
                state |= part
            state |= {f"snapshot/{k}": v for k, v in self.snapshots.items()}
            checkpoint.save(self.places.state, Saved(state, step, seconds))
        self.timer.saved(began)

    def _resume(self) -> tuple[int, float]:
        """(steps done, seconds spent) of the last checkpoint, which is loaded; (0, 0) without one."""
        here = checkpoint.read(self.places.state) if self.workers.rank == 0 else None
        if self.workers.rank == 0:
            checkpoint.trim_log(self.places.log, here.step if here else 0)
        state, step, seconds = self.workers.broadcast(here or Saved({}, 0, 0.0))
        if state:
            self.backend.load_state_dict(state)
            self.snapshots = {int(k.partition("/")[2]): v for k, v in state.items() if k.startswith("snapshot/")}
        return step, seconds

    def _log(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        every = self.workers.gather((dict(metrics), len(self.setting.labels), gpu_memory(self.device)))
        if self.workers.rank == 0:
            total = sum(weight for _, weight, _ in every)
            mean = {key: sum(m[key] * weight for m, weight, _ in every) / total for key in metrics}
            most = {key: max(memory[key] for *_, memory in every) for key in every[0][2]}
            each = (seconds - self.logged[1]) / max(1, step - self.logged[0])
            took = {"seconds": round(seconds, 3), "step_seconds": round(each, 4)}
            self._write({"step": step, "of": self.steps, **took, **mean, **most})
        self.logged = step, seconds

    def _evaluate(self, step: int) -> None:
        """Train one network on the set as it is, on rank 0, and log its accuracy; the others wait."""
        made = self._set()
        if self.workers.rank != 0:
            return
        evaluate.need_test_split(self.prepared)
        protocol = made.protocol.overridden(self.config.evaluate)
        seed = derive(self.config.distill_seed, "evaluation on the way")
        network = students.train(self.setting.spec, made.training_set(), protocol, seed, self.device)
        pixels, targets = (torch.from_numpy(a) for a in self.prepared.load("test"))
        at_once = self.setting.spec.at_once(self.device)
        top1, top5 = students.test(network, pixels, targets, self.normalization, self.device, at_once)
        self._write({"step": step, "of": self.steps, "top1": top1, "top5": top5})

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.places.log, "a") as log:
            log.write(json.dumps({"stage": "distill", **line}) + "\n")
        self.report(line)

    def _finish(self) -> SyntheticSet | None:
        made = self._set()
        return made if self.workers.rank == 0 else None

    def _set(self) -> SyntheticSet:
        """The set as it is, on every worker; only rank 0 may rely on it."""
        images, labels = self.workers.broadcast(self._gather())
        more = self.backend.finalize(images, labels)
        card = self._card()
        card["protocol"] |= more.protocol
        whitening = self.normalization.whitening
        return SyntheticSet(images, labels, card | dict(more.card), dict(self.snapshots), dict(more.extras), whitening)

    def _card(self) -> dict[str, Any]:
        section, options = self.config.distill, getattr(self.config.distill, self.config.distill.method, None)
        return {
            "class_names": self.prepared.class_names,
            "shape": list(self.prepared.shape),
            "normalization": self.normalization.card(),
            "whitening": whitening_card(self.prepared),
            "method": section.method,
            "method_options": section.options if options is None else options.model_dump(exclude={"teacher_weights"}),
            "images_per_class": section.ipc,
            "steps": self.steps,
            "network": {"name": section.network, "width": section.width, "depth": section.depth},
            "runtime": runtime_of(self.config),
            "protocol": method_class(self.config).protocol(self.config).card(),
            "seed": self.config.distill_seed,
        } | ({"kind": "tensors"} if self.prepared.kind == "tensors" else {})

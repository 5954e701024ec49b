"""The distillation loop: a method's steps with checkpoints, resume, a log and a clean stop when the loss diverges.

It runs the same in one process and in every worker of a group (`distillation/README.md`, "The loop").
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import DRAWN, Order
from distill_at_scale.core.collectives import Collectives, SingleProcess
from distill_at_scale.core.environment import gpu_memory
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Progressed
from distill_at_scale.core.rng import derive
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.whitening import whitening_card
from distill_at_scale.data.sampling import placement
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation import checkpoint, evaluate
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import too_few_message
from distill_at_scale.distillation.methods.contract import Method, MethodContext
from distill_at_scale.distillation.refresh import Refresh
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.models.spec import NetworkSpec

METHOD_CONTRACT = (
    "parallel", "default_steps", "init_of", "protocol", "prepare", "step", "snapshot", "state_dict", "load_state_dict",
)  # fmt: skip
SNAPSHOT_CLASSES, SNAPSHOT_IPC = 10, 5
SNAPSHOT_AT = (0, 0.01, 0.05, 0.2, 0.5)  # shares of the steps; the last snapshot is the finished set
REFRESH_KEYS = ("select.refresh", "select.refresh_pool")  # of `select`, but read by the loop
LOG_LINES = 200  # per run, evenly spaced
LATE, DIVERGED = 1, 2  # signals of a worker to all others after a step: save a checkpoint; stop

Report = Callable[[dict[str, Any]], None]


def method_class(config: Config) -> type[Method]:
    """The configured method; a user's own class gets the defaults for the optional parts of the contract."""
    method = resolve("distill.method", config.distill.method, METHODS, METHOD_CONTRACT)
    return method if issubclass(method, Method) else type(method.__name__, (method, Method), {})


def step_count(config: Config) -> int:
    return config.distill.steps or method_class(config).default_steps


def prunes(config: Config) -> bool:
    """Whether runtime pruning is on and applies to the method."""
    return config.runtime.rule != "none" and not method_class(config).no_runtime


def runtime_card(config: Config) -> dict[str, Any]:
    """The card's entry on runtime pruning; a method without real matching batches gives its reason instead."""
    reason = method_class(config).no_runtime
    if reason and config.runtime.rule != "none":
        return {"rule": "not applicable", "reason": reason}
    return config.runtime.model_dump()


def check_inputs(config: Config, prepared: evaluate.DataSummary, kept_per_class: list[int]) -> None:
    """Find errors before any worker starts.

    Raises:
        UserError: a class keeps no sample, or fewer than the method needs; there are more workers than classes;
            `select.refresh` is set for a method or a `select.order` that does not support it; or `distill.evaluate_every` is
            set without a test split.
    """
    names, section, method = prepared.class_names, config.distill, method_class(config)
    count = len(names)
    for name, kept in zip(names, kept_per_class, strict=True):
        if kept == 0:
            raise UserError(
                f"the manifest keeps no sample of the class {name!r}; raise select.keep or select.min_per_class"
            )
        if method.init_of(config) == "real" and kept < section.ipc:
            raise UserError(too_few_message(name, kept, section.ipc))
        if kept < (first := method.first_kept(config) or 0):
            lower = "distill.ipc" if first == section.ipc else f"distill.ipc or distill.{section.method}.factor"
            raise UserError(
                f"{kept} samples of the class {name!r} are kept, but {section.method} needs {first} of each class; set "
                f"select.per_class={first} or select.min_per_class={first}, or lower {lower}"
            )
    if config.select.refresh and method.judge is Method.judge:
        able = ", ".join(name for name, kind in METHODS.items() if kind.judge is not Method.judge)
        raise UserError(
            f"select.refresh = {config.select.refresh}: the method {section.method} has no network that rates real samples "
            f"between its steps; set select.refresh to null, or take one of the methods {able}"
        )
    if config.select.refresh and config.select.order in DRAWN:
        able = ", ".join(order for order in get_args(Order) if order not in DRAWN)
        raise UserError(
            f"select.refresh = {config.select.refresh}: renewals cannot follow select.order = {config.select.order!r}; "
            f"take one of {able}, or set select.refresh to null"
        )
    if section.evaluate_every:
        evaluate.require_samples_to_test(config, prepared)
    if section.max_workers > count and method.parallel == "classes":
        raise UserError(f"distill.workers = {section.workers} is more than the {count} classes; lower it to {count}")


@dataclass(frozen=True)
class DistillPaths:
    """Where the loop reads and writes."""

    prepared: Path
    manifest: Path
    work: Path  # folder of the checkpoint and of the finished set
    log: Path  # metrics.jsonl
    networks: Path = Path()  # folder of the experts or the teacher that the method needs

    @property
    def state(self) -> Path:
        return self.work / "state.safetensors"


def method_context(
    config: Config, prepared: PreparedDataset, paths: DistillPaths, workers: Collectives, device: torch.device
) -> MethodContext:
    """The context of one worker's method; with `parallel = "classes"` each worker owns every size-th class."""
    names, section = prepared.class_names, config.distill
    labels = list(range(len(names)))
    if method_class(config).parallel == "classes":
        labels = labels[workers.rank :: workers.size]
    spec = NetworkSpec(section.network, prepared.shape, len(names), section.width, section.depth, prepared.kind)
    source = tuple(prepared.source_class_names)
    return MethodContext(
        config, spec, names, labels, workers, device, step_count(config), paths.networks, source, work=paths.work
    )


def missing_networks(config: Config, paths: DistillPaths) -> list[str]:
    """The networks that the method needs and that do not exist yet."""
    return [name for name in method_class(config).networks(config) if not (paths.networks / name).exists()]


def make_network(
    config: Config, paths: DistillPaths, name: str, device: torch.device, labels: Sequence[int] | None = None,
    progressed: Progressed = lambda samples: None,
) -> None:  # fmt: skip
    """Make one such network from the kept samples of all classes, or of `labels`."""
    prepared = PreparedDataset(paths.prepared)
    owned = list(range(len(prepared.class_names)) if labels is None else labels)
    context = method_context(config, prepared, paths, SingleProcess(), device)
    context = replace(context, labels=owned, progressed=progressed)
    pool = ClassSampler.load(prepared, paths.manifest, owned, config.distill_seed, device, config.distill.hold)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        method_class(config).make_network(name, context, pool)


def worker_memory(config: Config, workers: Collectives, device: torch.device) -> placement.MemoryBudget:
    """The memory that one worker may fill with samples; workers on one host share it. All must call it, before they load."""
    budget = placement.memory_budget(device, share=min(1.0, config.cluster.gpus_per_worker or 1.0))
    host = socket.gethostname()
    free = [bytes_ for name, bytes_ in workers.gather((host, budget.host)) if name == host]
    return replace(budget, host=min(free) // len(free))


class Distillation:
    """One worker's share of a distillation; `report` gets the lines of the log, on rank 0."""

    def __init__(
        self, config: Config, paths: DistillPaths, workers: Collectives, device: torch.device,
        report: Report = lambda _: None,
    ):  # fmt: skip
        self.config, self.paths, self.workers, self.device, self.report = config, paths, workers, device, report
        prepared = self.prepared = PreparedDataset(paths.prepared)
        self.context = method_context(config, prepared, paths, workers, device)
        labels, hold, memory = self.context.labels, config.distill.hold, worker_memory(config, workers, device)
        first = method_class(config).first_kept(config)
        self.sampler = ClassSampler.load(
            prepared, paths.manifest, labels, config.distill_seed, device, hold, memory, first
        )
        self.normalization = self.sampler.normalization
        self.method, self.steps = method_class(config)(self.context), self.context.steps
        self.method.prepare(self.sampler)
        self.refresh = Refresh(config, prepared, paths.manifest, self.sampler, self.method)
        self.snapshots: dict[int, Tensor] = {}
        self.timer = checkpoint.Timer()
        self.began = 0.0  # of time.perf_counter(), minus the seconds before the last checkpoint
        self.logged = 0, 0.0  # step and seconds of the last line of the log

    def run(self) -> SyntheticSet | None:
        """All steps after the last checkpoint; the finished set on rank 0, None on other workers.

        Raises DistillationDiverged on every worker if one diverged, after saving the last good state.
        """
        section = self.config.distill
        start, spent = self._resume()
        self.began, self.logged = time.perf_counter() - spent, (start, spent)
        processes = self.workers.gather((socket.gethostname(), os.getpid()))
        placed = {"held": self.sampler.held, "at": time.time(), "workers": processes}
        placed |= {"mode": self.method.forward_mode.note} if self.method.forward_mode else {}
        self._write({"stage": "hold", "step": start, "of": self.steps, **placed})
        self.sampler.schedule(chain.from_iterable(map(self.method.draws, range(start, self.steps))))
        snapshot_steps = {int(self.steps * share) for share in SNAPSHOT_AT}
        for i in range(start, self.steps):
            if i in snapshot_steps:
                self._snapshot(i)
            metrics, checkpoint_is_late = self._step(i)
            done, is_last = i + 1, i + 1 == self.steps
            if self.config.select.refresh:
                if done % self.config.select.refresh == 0 and not is_last:
                    self.refresh.renew(i)
                metrics["renewed"] = self.refresh.share
            if done % max(1, self.steps // LOG_LINES) == 0 or is_last:
                self._log(done, metrics)
            # before the checkpoint: a run that resumes from it does not evaluate this step again
            if section.evaluate_every and done % section.evaluate_every == 0:
                self._evaluate(done)
            if done % section.checkpoint_every == 0 or is_last or checkpoint_is_late:
                self._save(done)
        self._snapshot(self.steps)
        synthetic = self._synthetic_set()
        return synthetic if self.workers.rank == 0 else None

    def _step(self, i: int) -> tuple[dict[str, float], bool]:
        """One step's metrics, and whether a checkpoint is late; all workers stop together if one diverged."""
        error, metrics = None, {}
        try:
            metrics = self.method.step(i)
        except DistillationDiverged as raised:
            error = raised
        if not isinstance(metrics, dict) or not all(isinstance(value, Real) for value in metrics.values()):
            kind = type(self.method).__name__
            raise UserError(f"step of the method {kind} must return a dict of numbers by name, not {metrics!r:.80}")
        late = self.workers.rank == 0 and self.timer.is_due  # rank 0 writes the file and knows how long that takes
        signal = self.workers.all_reduce_max(DIVERGED if error else LATE if late else 0)
        if signal == DIVERGED:
            self._save(i)
            visit, message = self.workers.smallest((error.visit, str(error)) if error else None)
            raise DistillationDiverged(message, visit)
        return metrics, signal == LATE

    def _gather(self) -> tuple[Tensor, Tensor]:
        """All workers' images and labels, sorted by label."""
        parts = self.workers.gather(self.method.snapshot())
        if self.method.parallel == "replicate":
            parts = parts[:1]
        images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        order = torch.argsort(labels, stable=True)
        return images[order], labels[order]

    def _snapshot(self, step: int) -> None:
        """Store, on rank 0, the first images of the first classes as they are before step `step`."""
        images, labels = self._gather()
        if self.workers.rank == 0:
            ipc = self.config.distill.ipc
            chosen = (labels < SNAPSHOT_CLASSES) & (torch.arange(len(labels)) % ipc < SNAPSHOT_IPC)
            self.snapshots[step] = self.normalization.stored(images[chosen])

    def _state(self) -> dict[str, Tensor]:
        return self.method.state_dict() | self.refresh.state_dict()

    def _save(self, step: int) -> None:
        began, seconds = time.monotonic(), time.perf_counter() - self.began
        replicated = self.method.parallel == "replicate"  # all workers have the same state
        states = self.workers.gather({} if replicated and self.workers.rank else self._state())
        if self.workers.rank == 0:
            state = {key: value for part in states for key, value in part.items()}
            state |= {f"snapshot/{k}": v for k, v in self.snapshots.items()}
            checkpoint.save(self.paths.state, checkpoint.DistillCheckpoint(state, step, seconds))
        self.timer.saved(began)

    def _resume(self) -> tuple[int, float]:
        """Load the last checkpoint on all workers; its (steps done, seconds spent), (0, 0) without one."""
        last = None
        if self.workers.rank == 0:
            last = checkpoint.read(self.paths.state)
            checkpoint.trim_log(self.paths.log, last.step if last else 0)
        state, step, seconds = self.workers.broadcast(last or checkpoint.DistillCheckpoint({}, 0, 0.0))
        if state:
            self.method.load_state_dict(state)
            self.refresh.load_state_dict(state)
            self.snapshots = {int(k.partition("/")[2]): v for k, v in state.items() if k.startswith("snapshot/")}
        return step, seconds

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the mean of the workers' metrics, weighted by their classes, and the highest memory use."""
        seconds = time.perf_counter() - self.began
        gathered = self.workers.gather((dict(metrics), len(self.context.labels), gpu_memory(self.device)))
        if self.workers.rank == 0:
            classes = sum(weight for _, weight, _ in gathered)
            means = {key: sum(m[key] * weight for m, weight, _ in gathered) / classes for key in metrics}
            memory = {key: max(used[key] for *_, used in gathered) for key in gathered[0][2]}
            step_seconds = (seconds - self.logged[1]) / max(1, step - self.logged[0])
            times = {"seconds": round(seconds, 3), "step_seconds": round(step_seconds, 4)}
            self._write({"step": step, "of": self.steps, **times, **means, **memory})
        self.logged = step, seconds

    def _evaluate(self, step: int) -> None:
        """Train one network on the current set, on rank 0, and log its accuracy; the other workers wait."""
        synthetic = self._synthetic_set()
        if self.workers.rank != 0:
            return
        spec, protocol = self.context.spec, synthetic.protocol.overridden(self.config.evaluate)
        seed, precision = derive(self.config.distill_seed, "evaluation on the way"), self.config.evaluate.precision
        network = students.train(spec, synthetic.training_set(), protocol, seed, self.device, precision)
        pixels, targets = evaluate.samples_to_test(self.config, self.prepared, self.paths.manifest)
        at_once = spec.microbatch(self.device)
        accuracy = students.test(network, pixels, targets, self.normalization, self.device, at_once, precision)
        self._write({"step": step, "of": self.steps, "top1": accuracy.top1, "top5": accuracy.top5})

    def _write(self, line: dict[str, Any]) -> None:
        if self.workers.rank == 0:
            with open(self.paths.log, "a", encoding="utf-8") as log:
                log.write(json.dumps({"stage": "distill", **line}) + "\n")
            self.report(line)

    def _synthetic_set(self) -> SyntheticSet:
        """The current set, on every worker; only rank 0's has all extras."""
        images, labels = self.workers.broadcast(self._gather())
        final = self.method.finalize(images, labels)
        config, section = self.config, self.config.distill
        options = getattr(section, section.method, None)
        card = {
            "class_names": self.prepared.class_names,
            "shape": list(self.prepared.shape),
            "normalization": self.normalization.card(),
            "whitening": whitening_card(self.prepared),
            **({} if self.prepared.kind == "tensors" else {"resize": config.data.resize}),
            "method": section.method,
            "method_options": section.options if options is None else options.model_dump(exclude={"teacher_weights"}),
            "images_per_class": section.ipc,
            "steps": self.steps,
            "network": {"name": section.network, "width": section.width, "depth": section.depth},
            "runtime": runtime_card(config),
            "protocol": method_class(config).protocol(config).card() | dict(final.protocol),
            "seed": config.distill_seed,
            **({"kind": "tensors"} if self.prepared.kind == "tensors" else {}),
            **final.card,
        }
        extras, whitening = dict(final.extras), self.normalization.whitening
        return SyntheticSet(images, labels, card, dict(self.snapshots), extras, whitening, labels_of_views=final.labels)

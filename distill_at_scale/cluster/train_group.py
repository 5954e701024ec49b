"""Groups of workers on Ray Train, which restart together from the last checkpoint if one is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from distill_at_scale.cluster import warm_group
from distill_at_scale.cluster.actor_pool import LOST, Say, cores, cores_each, lost_too_often
from distill_at_scale.cluster.session import plain_errors
from distill_at_scale.cluster.worker_run_dir import Notes, WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import DistillationDiverged, TrialStopped, Unreachable, UserError, WorkersLost
from distill_at_scale.pipeline.executors.base import Group, Poll
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import FOLLOW, UNFINISHED

DIVERGED, REFUSED = "diverged.txt", "refused.txt"  # notes of the workers to the driver
STOPPED = "given up"  # the text of REFUSED where the driver ends the run
GROUP = "placement_group.txt"  # note with the placement group of the workers
STOP_TIMEOUT = 120  # seconds that the workers of a run may take to end
POLL = 0.3  # seconds between two polls
RESIZE = 60.0  # seconds between two checks for room for more workers


def run(group: Group, sharing: int, say: Say) -> None:
    """Run the processes of a group on Ray Train.

    A fixed number of workers shares the cores of the cluster. An elastic group starts as many as find room, with one core
    each, so that their results depend on their number alone; it shrinks and grows with the cluster. Machines may come and go
    all day: after too many losses another attempt follows if there was progress.

    Raises UserError if the workers cannot be placed, WorkersLost if they were lost too often without progress, and the
    error of a worker if a user can act on it. If `group.poll` raises TrialStopped, the workers end before it is raised.
    """
    while True:
        before = group.saved()
        try:
            return _attempt(group, sharing, say)
        except WorkersLost as error:
            if group.saved() <= before:
                raise
            say(f"  progress was made; resetting the failure count ({str(error).partition(' (')[0]})")


def _attempt(group: Group, sharing: int, say: Say) -> None:
    cluster, workers = group.config.cluster, group.workers if isinstance(group.workers, int) else group.workers[0]
    share, have, key = cluster.gpus_per_worker, ray.cluster_resources().get("GPU", 0), f"{group.stage}.workers"
    if workers > cores() and not cluster.grows:
        raise UserError(f"{key} = {workers} needs as many cores, the cluster has {cores()}; lower {key}")
    if workers * share > have and not cluster.grows:
        raise UserError(f"{workers} workers with cluster.gpus_per_worker = {share:g} do not fit on {have:g} GPUs")
    group.work.mkdir(parents=True, exist_ok=True)
    notes = Notes(group.work, group.config)
    release(notes)
    notes.remove(DIVERGED, REFUSED)

    def restarted() -> None:
        if group.resumed is not None:
            losses = "were lost" if isinstance(group.workers, int) else "were lost or have joined"
            say(f"  workers {losses}; {group.resumed()}")

    try:
        with plain_errors():
            _fit(_trainer(group, sharing), _noticing(notes, group.poll, restarted), notes)
    except Exception as error:
        if notes.read(REFUSED) in (None, STOPPED):
            if lost := _lost(error):
                raise WorkersLost(lost_too_often(group.stage, group.config, lost)) from None
            raise
    if (message := notes.read(DIVERGED)) is not None:
        raise DistillationDiverged(message)
    if (message := notes.read(REFUSED)) is not None:
        raise error_of(message)


def _trainer(group: Group, sharing: int) -> TorchTrainer:
    workers, cluster, folder = group.workers, group.config.cluster, group.work / "ray"
    cpus, gpus = cores_each(workers * sharing) if isinstance(workers, int) else 1, cluster.gpus_per_worker
    loop = warm_group.settings(group) | {"cpus": cpus, "work": str(group.work)}
    scaling: dict[str, Any] = {
        "num_workers": workers if isinstance(workers, int) else tuple(workers), "use_gpu": gpus > 0,
        "resources_per_worker": {"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        "elastic_resize_monitor_interval_s": RESIZE,
    }  # fmt: skip
    storage: dict[str, Any] = {"storage_path": str(folder)}  # a place that all nodes see
    if (remote := RunDir.of(group.config.run).remote) is not None:
        store = remote.sync.store.store
        path = f"{store.root}/{folder.relative_to(remote.path).as_posix()}"
        storage = {"storage_path": path, "storage_filesystem": store.filesystem}
    torch_config = TorchConfig(backend="nccl" if gpus >= 1 else "gloo")  # NCCL refuses two workers on one GPU
    failures = FailureConfig(max_failures=cluster.max_failures)
    return TorchTrainer(
        _worker, train_loop_config=loop, torch_config=torch_config, scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(name=group.stage, failure_config=failures, **storage),
    )  # fmt: skip


def note_of(error: UserError) -> str:
    """An error as a text, from which `error_of` makes an error of the same kind."""
    return f"{Unreachable.__name__ if isinstance(error, Unreachable) else UserError.__name__}: {error}"


def error_of(note: str) -> UserError:
    kind, _, message = note.partition(": ")
    return Unreachable(message) if kind == Unreachable.__name__ else UserError(message)


def _lost(error: BaseException) -> BaseException | None:
    """The loss of a worker behind what Ray Train raises; the others of its group fail with it, with other errors."""
    failures = [error, *(getattr(error, "worker_failures", None) or {}).values()]
    inner = (getattr(failure, "health_check_failure", failure) for failure in failures)
    return next((failure for failure in inner if isinstance(failure, LOST)), None)


def _worker(loop: dict[str, Any]) -> None:
    """One worker.

    All workers agree on a divergence; it is written to a note and ends the run. An error that a user can act on is written to
    a note, too, and ends the run when Ray restarts the workers. After any other exception the workers resume.
    """
    torch.set_num_threads(loop["cpus"])
    space = WorkerRunDir(loop["packed"])
    notes = Notes(space(loop["work"]), space.config)
    first = ray.train.get_context().get_world_rank() == 0
    if first and (placement := get_current_placement_group()) is not None:
        notes.write(GROUP, placement.id.hex())
    if notes.read(REFUSED) is not None:
        return
    try:
        warm_group.work(space, loop, first, ray.train.torch.get_device())
    except DistillationDiverged as error:
        if first:
            notes.write(DIVERGED, str(error))
    except UserError as error:
        notes.write(REFUSED, note_of(error))
        raise


def _noticing(notes: Notes, poll: Poll, restarted: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `poll`, and before it `restarted` if the workers have a new placement group."""
    known, checked = "", 0.0

    def check() -> None:
        nonlocal known, checked
        if notes.remote is None or time.monotonic() - checked > FOLLOW:
            now = ""
            with contextlib.suppress(Unreachable):  # only for a message: the distillation goes on without it
                now = notes.read(GROUP, retry_seconds=0.0) or ""
            checked = time.monotonic()
            if known and now and now != known:
                restarted()
            known = now or known
        poll()

    return check


def release(notes: Notes) -> None:
    """End the workers that an earlier run in this folder may have left, and release their cores.

    Ray Train's own cleaner needs Ray's state API, which the Ray that we start does not have.
    """
    if (placement := notes.read(GROUP)) is not None:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(placement))))
        notes.remove(GROUP)


def release_all(config: Config) -> None:
    """End the workers that earlier runs may have left, for all groups in a run's folder."""
    run = RunDir.of(config.run)
    if run.remote:
        paths = [run / name for name in run.remote.sync.store.listed(UNFINISHED) if name.endswith(f"/{GROUP}")]
    else:
        paths = list(run.path.glob(f"{UNFINISHED}/**/{GROUP}"))
    for note in paths:
        release(Notes(note.parent, config))


def _fit(trainer: TorchTrainer, poll: Callable[[], None], notes: Notes) -> None:
    """trainer.fit() in a thread, while this one polls.

    In the main thread Ray Train would take over Ctrl-C for good and end the process with status 0.
    """
    problem: list[BaseException] = []

    def train() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL)
            poll()
    except TrialStopped:
        notes.write(REFUSED, STOPPED)  # workers that Ray restarts end at once, and the run with them
        release(notes)
        thread.join(STOP_TIMEOUT)
        raise
    if problem:
        raise problem[0]

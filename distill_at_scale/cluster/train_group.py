"""Groups of workers on Ray Train, restarted together from the last checkpoint if one is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from distill_at_scale.cluster.actor_pool import LOST, cores, cores_each, lost_too_often
from distill_at_scale.cluster.session import pack, plain_errors
from distill_at_scale.cluster.worker_run_dir import Notes, WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import DistillationDiverged, TrialStopped, Unreachable, UserError, WorkersLost
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import FOLLOW, UNFINISHED

Body = Callable[[WorkerRunDir, dict[str, Any]], None]
DIVERGED, REFUSED = "diverged.txt", "refused.txt"  # notes of the workers to the driver
LEFT = "given up"  # what the latter says where the driver ends the run
GROUP = "placement_group.txt"  # note of what the workers hold
LEAVING = 120  # seconds that a run which was given up may take to end
POLL = 0.3  # seconds between two looks at the log
RESIZE = 60.0  # seconds between two looks for room for more workers


def getting_on(attempt: Callable[[], None], done: Callable[[], int], say: Callable[[str], None]) -> None:
    """Make an attempt, and another where it lost workers too often but more is done than at its start: machines that come
    and go all day are no reason to end, only losses without progress are.

    Raises WorkersLost for these.
    """
    while True:
        before = done()
        try:
            return attempt()
        except WorkersLost as error:
            if done() <= before:
                raise
            say(f"  more is done than before, so losses are counted anew ({str(error).partition(' (')[0]})")


def fit(
    stage: str,
    body: Body,
    config: Config,
    workers: int | Sequence[int],
    arguments: dict[str, Any],
    work: Path,
    poll: Callable[[], None],
    sharing: int = 1,
    again: Callable[[], None] = lambda: None,
) -> None:
    """Run `body(workspace, arguments)` in a group of workers, which share a torch process group; calls `poll` meanwhile, and
    `again` whenever lost workers were started again.

    `workers` is their number, or the least and the most: then as many as find room start, with one core each, so that what
    they compute depends on their number alone; when nodes are lost or join, fewer or more go on from the body's checkpoint.

    Raises UserError where they cannot be placed, WorkersLost where they were lost too often, and what a user must mend as it
    was raised. Where `poll` raises GivenUp the workers end before that is raised here.
    """
    gpus = config.cluster.gpus_per_worker
    _check_room(stage, workers if isinstance(workers, int) else workers[0], config)
    cpus = cores_each(workers * sharing) if isinstance(workers, int) else 1
    work.mkdir(parents=True, exist_ok=True)
    notes = Notes(work, config)
    release(notes)
    notes.remove(DIVERGED, REFUSED)
    loop = {"packed": pack(config), "cpus": cpus, "body": body, "arguments": arguments, "work": str(work)}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=loop,
        torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),  # NCCL refuses two workers on one GPU
        scaling_config=_scaling(workers, cpus, gpus),
        run_config=RunConfig(
            name=stage,
            **_storage(config, work / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    try:
        with plain_errors():
            _in_a_thread(trainer, _noticing(notes, poll, again), notes)
    except Exception as error:
        if notes.read(REFUSED) in (None, LEFT):
            if lost := _lost(error):
                raise WorkersLost(lost_too_often(stage, config, lost)) from None
            raise
    if (said := notes.read(DIVERGED)) is not None:
        raise DistillationDiverged(said)
    if (said := notes.read(REFUSED)) is not None:
        raise refusal(said)


def noted(error: UserError) -> str:
    """An error as a note, which `refusal` makes an error again."""
    return f"{Unreachable.__name__ if isinstance(error, Unreachable) else UserError.__name__}: {error}"


def refusal(said: str) -> UserError:
    kind, _, message = said.partition(": ")
    return Unreachable(message) if kind == Unreachable.__name__ else UserError(message)


def _lost(error: BaseException) -> BaseException | None:
    """The loss of a worker behind what Ray Train raises; the others of its group then fail too, as they hear no more of it."""
    failures = [error, *(getattr(error, "worker_failures", None) or {}).values()]
    inner = (getattr(failure, "health_check_failure", failure) for failure in failures)
    return next((failure for failure in inner if isinstance(failure, LOST)), None)


def _storage(config: Config, folder: Path) -> dict[str, Any]:
    """Where Ray Train keeps what it notes about a run, as RunConfig takes it: where all nodes see it."""
    remote = RunDir.of(config.run).remote
    if remote is None:
        return {"storage_path": str(folder)}
    store = remote.mirror.bucket.store
    return {
        "storage_path": f"{store.root}/{folder.relative_to(remote.path).as_posix()}",
        "storage_filesystem": store.filesystem,
    }


def _scaling(workers: int | Sequence[int], cpus: int, gpus: float) -> ScalingConfig:
    options: dict[str, Any] = {
        "num_workers": workers if isinstance(workers, int) else tuple(workers),
        "elastic_resize_monitor_interval_s": RESIZE,
        "use_gpu": gpus > 0,
        "resources_per_worker": {"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
    }
    return ScalingConfig(**options)


def _worker(loop: dict[str, Any]) -> None:
    """One worker.

    A divergence, which all workers agree on, is noted and ends the run. What a user must mend is noted and ends it when Ray
    starts the workers again; any other exception is a failure, after which they resume.
    """
    torch.set_num_threads(loop["cpus"])
    space = WorkerRunDir(loop["packed"])
    notes = Notes(space(loop["work"]), space.config)
    if ray.train.get_context().get_world_rank() == 0:
        _note_group(notes)
    if notes.read(REFUSED) is not None:
        return
    try:
        loop["body"](space, loop["arguments"])
    except DistillationDiverged as error:
        if ray.train.get_context().get_world_rank() == 0:
            notes.write(DIVERGED, str(error))
    except UserError as error:
        notes.write(REFUSED, noted(error))
        raise


def _check_room(stage: str, workers: int, config: Config) -> None:
    if config.cluster.grows:
        return
    have, gpus = ray.cluster_resources(), config.cluster.gpus_per_worker
    if workers > cores():
        raise UserError(
            f"{stage}.workers = {workers} needs as many cores, the cluster has {cores()}; lower {stage}.workers"
        )
    if workers * gpus > have.get("GPU", 0):
        raise UserError(
            f"{workers} workers with cluster.gpus_per_worker = {gpus:g} do not fit on {have.get('GPU', 0):g} GPUs"
        )


def _note_group(notes: Notes) -> None:
    group = get_current_placement_group()
    if group is not None:
        notes.write(GROUP, group.id.hex())


def _noticing(notes: Notes, poll: Callable[[], None], again: Callable[[], None]) -> Callable[[], None]:
    """`poll`, and `again` before it where the workers hold another group of cores than before."""
    known, looked = "", 0.0

    def look() -> None:
        nonlocal known, looked
        if notes.remote is None or time.monotonic() - looked > FOLLOW:
            now = ""
            with contextlib.suppress(Unreachable):  # it is only said: the workers need no answer, and the log goes on
                now = notes.read(GROUP, patience=0.0) or ""
            looked = time.monotonic()
            if known and now and now != known:
                again()
            known = now or known
        poll()

    return look


def release(notes: Notes) -> None:
    """Give back the cores that workers of an earlier run in this folder may hold, and end them.

    Ray Train's own cleaner of what a lost run reserved asks Ray's state API, and dies where
    that fails, as it does in the Ray that we start.
    """
    if (said := notes.read(GROUP)) is not None:
        found = ray.PlacementGroupID(bytes.fromhex(said))
        remove_placement_group(PlacementGroup(found))
        notes.remove(GROUP)


def release_all(config: Config) -> None:
    """The same for all that is under way in a run's folder."""
    run = RunDir.of(config.run)
    if run.remote:
        found = [run / name for name in run.remote.mirror.bucket.listed(UNFINISHED) if name.endswith(f"/{GROUP}")]
    else:
        found = list(run.path.glob(f"{UNFINISHED}/**/{GROUP}"))
    for note in found:
        release(Notes(note.parent, config))


def _in_a_thread(trainer: TorchTrainer, poll: Callable[[], None], notes: Notes) -> None:
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
        notes.write(REFUSED, LEFT)  # so that workers which Ray starts again end at once, and the run with them
        release(notes)
        thread.join(LEAVING)
        raise
    if problem:
        raise problem[0]

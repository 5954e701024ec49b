"""Messages if processes of a cluster are lost too often, and errors that do not count as losses. Nothing here starts Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import Unreachable, UserError, WorkersLost
from distill_at_scale.distillation import evaluate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import no_poll
from distill_at_scale.pipeline.monitoring.distillation_log import LogTail

ray = pytest.importorskip("ray")
from distill_at_scale.cluster import tasks as ray_tasks  # noqa: E402
from distill_at_scale.cluster import train_group  # noqa: E402

LOST = ray.exceptions.WorkerCrashedError
FOLDERS = (Path("prepared"), Path("synthetic"), Path("manifest.parquet"), Path("notes"))


@pytest.fixture
def ray_tasks_alone(monkeypatch):
    """ray_tasks_alone(wait): an executor without a cluster, and the numbers of tasks that are to share its 64 cores."""

    def make(wait=None):
        counts, remote = [], SimpleNamespace(remote=lambda *arguments: arguments)
        monkeypatch.setattr(ray_tasks, "ray", SimpleNamespace(put=lambda value: value, wait=wait))
        monkeypatch.setattr(ray_tasks, "_run", SimpleNamespace(options=lambda **resources: remote))
        monkeypatch.setattr(ray_tasks, "cores", lambda: 64)
        monkeypatch.setattr(ray_tasks, "cores_each", lambda tasks: counts.append(tasks) or 1)
        run = lambda task, done, poll=no_poll: ray_tasks.run(task, done, poll, 1, lambda event: None)  # noqa: E731
        return SimpleNamespace(run=run), counts

    return make


def test_a_task_that_is_lost_too_often_is_a_users_error(ray_tasks_alone):
    config, message = tiny_config("unused"), r"evaluate: processes were lost more often than cluster\.max_failures = 3"

    def failing(error):
        def wait(running, timeout):
            raise error

        return ray_tasks_alone(wait)[0]

    job = evaluate.jobs(config)[0]
    with pytest.raises(WorkersLost, match=message):
        tasks.evaluate(failing(LOST()), config, [job], FOLDERS, lambda row: None)
    with pytest.raises(KeyError):
        tasks.evaluate(failing(KeyError("a defect")), config, [job], FOLDERS, lambda row: None)


def test_the_loss_behind_the_failures_of_a_group_is_found():
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = ray.exceptions.ActorDiedError()
    failures = {0: RuntimeError("Connection closed by peer"), 1: WorkerHealthCheckFailedError("no answer", lost)}
    assert train_group._lost(WorkerGroupError("", failures)) is lost
    assert train_group._lost(lost) is lost
    assert train_group._lost(WorkerGroupError("", {0: RuntimeError("a defect")})) is None


@pytest.mark.parametrize("kind", [Unreachable, UserError])
def test_the_error_of_a_worker_is_one_of_the_same_kind_in_the_driver(kind):
    error = train_group.error_of(train_group.note_of(kind("s3://b/run: writing x failed: no network")))
    assert (type(error), str(error)) == (kind, "s3://b/run: writing x failed: no network")


def test_a_storage_that_refuses_meanwhile_ends_no_distillation(monkeypatch):
    """The note of who works is read to say that workers were lost, and for nothing else."""

    def read(name, retry_seconds):
        assert retry_seconds == 0.0
        answer = next(answers)
        if answer is None:
            raise Unreachable("503 SlowDown")
        return answer

    monkeypatch.setattr(train_group, "FOLLOW", -1.0)
    answers, lines = iter(["one group", None, "one group", None, "another group"]), []
    look = train_group._noticing(
        SimpleNamespace(read=read, remote=True), lambda: lines.append("log"), lambda: lines.append("lost")
    )
    for _ in range(5):
        look()
    assert lines == ["log"] * 4 + ["lost", "log"]


def test_progress_resets_the_failure_count(monkeypatch):
    """Two attempts make progress before they lose too many workers, the third does not."""
    done, lines = iter([0, 6, 6, 8, 8, 8]), []

    def attempt(group, sharing, say):
        raise WorkersLost("distill: processes were lost more often than 3 (killed)")

    monkeypatch.setattr(train_group, "_attempt", attempt)
    with pytest.raises(WorkersLost):
        train_group.run(SimpleNamespace(saved=lambda: next(done)), 1, lines.append)
    message = "  progress was made; resetting the failure count (distill: processes were lost more often than 3)"
    assert lines == [message] * 2
    monkeypatch.setattr(train_group, "_attempt", lambda group, sharing, say: None)
    assert train_group.run(SimpleNamespace(saved=lambda: 0), 1, lines.append) is None


def test_the_cores_of_an_evaluation_are_those_of_all_its_jobs(ray_tasks_alone):
    """So the rest of an interrupted stage ends as it would have."""
    config = tiny_config("unused")
    on_ray, counts = ray_tasks_alone()
    tasks.evaluate(on_ray, config, [], FOLDERS, lambda row: None)
    assert counts == [len(evaluate.jobs(config))] == [4]


def test_lines_that_replace_dropped_ones_are_all_reported(tmp_path):
    """Workers that resume from step 1 drop the line of step 2 and write a longer one before the next read."""
    path, lines = tmp_path / "metrics.jsonl", []
    old = '{"step": 0, "held": "before"}\n{"step": 1, "loss": 1.0}\n'
    path.write_text(old, encoding="utf-8")
    tail = LogTail(path, lines.append)
    path.write_text(old + '{"step": 2, "loss": 1.0}\n{"step": 3, "lo', encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2], "earlier lines and incomplete lines are not reported"
    hold = '{"step": 1, "held": "a line that is longer than what it replaces"}\n'
    path.write_text(old + hold, encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1]
    path.write_text(old + hold + '{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1, 2]
    path.write_text(old, encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1, 2, 0, 1], "the log is shorter than before"

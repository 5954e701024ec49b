"""A whole run whose folder is on object storage: the same bytes as on a disk, whatever is refused or killed on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import Run, tiny_config
from plan_cases import measure_quickly
from storage_cases import artefact_digests, stored_objects

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.export import export
from distill_at_scale.pipeline.stages import report
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.storage import lock as lease
from distill_at_scale.storage import object_store as bucket_module
from distill_at_scale.storage import sync as mirror
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

TIMES = ("seconds", "card.json", "evaluation.json")  # files that hold how long something took


@pytest.fixture
def remote_run(s3, bucket, tmp_path):
    """remote_run("a"): the run on object storage, from machine "a"."""

    def make(machine="a", **overrides):
        scratch = str(tmp_path / machine)
        keys = {"run__scratch": scratch, "run__retry_seconds": 0.0, **overrides}
        return Run(tiny_config(s3(f"{bucket}/run"), **keys))

    return make


pytestmark = pytest.mark.usefixtures("no_pauses")


def test_a_run_on_object_storage_leaves_the_bytes_of_one_on_a_disk(remote_run, s3, bucket, local_digests):
    run = remote_run()
    run.pipeline.run()
    stored = stored_objects(s3, bucket)
    assert artefact_digests(stored) == local_digests
    assert {f"stages/{s}.json" for s in ("ingest", "score", "select", "distill", "evaluate", "report")} <= set(stored)
    assert {"report.html", "metrics.jsonl", "run.json"} <= set(stored)
    assert not [name for name in stored if name.startswith(".work") or name == ".lease.json"]
    again = remote_run("another machine")
    again.pipeline.run()
    assert "started" not in again.text
    loaded = synthetic_set.load(s3(f"{bucket}/run"))
    assert len(loaded.labels) == 3


def test_a_control_that_one_machine_distilled_is_used_on_another(remote_run, s3, bucket, monkeypatch):
    stages = ("ingest", "score", "select", "distill", "evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remote_run("a", evaluate__controls=["unpruned"]).stages(*stages)
    other = remote_run("b", evaluate__controls=["unpruned"]).stages(*stages)
    assert "control unpruned: already distilled" in other.text
    names = {name.rpartition("/")[2] for name in stored_objects(s3, bucket) if name.startswith("controls/unpruned-")}
    assert {"control.json", "metrics.jsonl", "synthetic.safetensors", "card.json"} <= names
    assert not {"manifest.parquet", "state.safetensors"} & names  # of the unfinished control


@pytest.fixture
def failing(monkeypatch):
    """failing(which): uploads fail of whose number `which` says so; those of the lease do not count. Returns what failed."""

    def make(which):
        real, count, guard, failed = bucket_module.put, itertools.count(1), threading.Lock(), []

        def put(system, path, content):
            with guard:
                fails = not path.endswith(lease.NAME) and which(next(count))
            if fails:
                failed.append(path)
                raise OSError("503 SlowDown")
            real(system, path, content)

        monkeypatch.setattr(bucket_module, "put", put)
        return failed

    return make


def test_a_run_resumes_after_failed_uploads(remote_run, s3, bucket, local_digests, failing):
    """Uploads fail for good now and then; each time another machine resumes."""
    failed = failing(lambda number: number % 23 == 0)
    for machine in itertools.count():
        try:
            remote_run(f"machine {machine % 2}").pipeline.run()
            break
        except Unreachable:
            assert machine < 20
    assert len(failed) > 1
    assert artefact_digests(stored_objects(s3, bucket)) == local_digests


@pytest.mark.chaos
def test_a_run_resumes_after_each_failed_upload(remote_run, s3, local_digests, failing, tmp_path):
    """More than a hundred uploads, about ten minutes."""
    for number in itertools.count(1):
        bucket = f"each-{number}"
        s3.client.create_bucket(Bucket=bucket)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket_module, "put", bucket_module.put)
            failed = failing(lambda this, number=number: this == number)
            first, second = (
                Run(tiny_config(s3(f"{bucket}/run"), run__scratch=str(tmp_path / m), run__retry_seconds=0.0))
                for m in "ab"
            )
            with contextlib.suppress(Unreachable):
                first.pipeline.run()
        second.pipeline.run()
        assert artefact_digests(stored_objects(s3, bucket)) == local_digests, failed
        if not failed:
            break


def test_a_killed_stage_resumes_on_another_machine(remote_run, s3, bucket, local_digests, monkeypatch):
    monkeypatch.setattr(mirror, "FOLLOW", 0.01)
    run = remote_run("a")
    score = tasks.score

    def killed(executor, config, prepared, checkpoints, chunks, pieces, advance):
        score(executor, config, prepared, checkpoints, chunks[:1], pieces, lambda rows: None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            run.stages("ingest", "score")
    left = [name for name in stored_objects(s3, bucket) if name.startswith(".work/score-")]
    assert len([name for name in left if "/pieces/" in name]) == 1
    assert len([name for name in left if "/proxies/" in name]) == 4
    other = remote_run("b")
    monkeypatch.setattr(proxy.ProxyTrial, "_batch_gradient", None)  # all are there
    other.stages("ingest", "score")
    stored = stored_objects(s3, bucket)
    assert artefact_digests(stored)["scores.parquet"] == local_digests["scores.parquet"]
    assert (
        artefact_digests(stored)["proxies/trial-00/epoch-000.safetensors"]
        == local_digests["proxies/trial-00/epoch-000.safetensors"]
    )


def test_other_commands_read_and_write_there(remote_run, s3, bucket, tmp_path, monkeypatch):
    """plan, validate and export, each on its own machine."""
    measure_quickly(monkeypatch)
    remote_run("a").stages("ingest", "score", "select")
    finished = remote_run("b").pipeline.forecast()
    assert remote_run("c").pipeline.validate() == 0
    assert finished is not None
    assert {"plan.json", "validation.parquet"} <= set(stored_objects(s3, bucket))
    out = tmp_path / "kept.csv"
    export(remote_run("d").config, [], [out], {}, Display.silent())
    assert len(out.read_text(encoding="utf-8").splitlines()) > 3


def test_a_stage_without_a_record_is_not_trusted(remote_run, s3, bucket):
    remote_run().stages("ingest")
    s3.client.delete_object(Bucket=bucket, Key="run/stages/ingest.json")
    again = remote_run().stages("ingest")
    assert "ingest: finished" in again.text


def test_an_output_that_was_cut_short_is_refused(remote_run, s3, bucket):
    remote_run().stages("ingest", "score")
    key = "run/scores.parquet"
    expected = s3.client.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.client.put_object(Bucket=bucket, Key=key, Body=expected[:-1])
    with pytest.raises(UserError, match=r"bucket-\w+/run/scores\.parquet is missing; to move it to replaced/"):
        remote_run("b").stages("select")
    run = remote_run("b")
    run.pipeline.dir.redo = "score"  # what the message advises
    text = run.stages("score", "select").text
    assert "scores.parquet is not what was written; it is not used" in text
    assert "score: finished" in text
    assert s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() == expected


def test_a_new_run_at_an_old_address_takes_nothing_from_the_old_copy(remote_run, s3, bucket):
    remote_run().stages("ingest")
    for name in stored_objects(s3, bucket):
        s3.client.delete_object(Bucket=bucket, Key=f"run/{name}")
    run = remote_run()
    run.pipeline.dir.create()
    with run.pipeline.dir.lock():
        assert not (run.pipeline.dir / "prepared").exists()


def test_a_second_command_is_refused(remote_run, monkeypatch):
    """On another machine, as the holder's beat shows it to live."""
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LOOK", 0.1)
    first, second = remote_run("a").pipeline.dir, remote_run("b").pipeline.dir
    first.create()
    second.create()
    with (
        first.lock(),
        pytest.raises(UserError, match=r"process \d+ on .* is working in s3://bucket-\w+/run"),
        second.lock(),
    ):
        pass
    with second.lock():
        pass


def test_the_folder_of_a_dead_command_is_taken_over(remote_run, monkeypatch):
    """At once where its process is gone from this machine, not from one of the same name; else when its beat stands still."""
    monkeypatch.setattr(lease, "LOOK", 0.01)
    monkeypatch.setattr(lease, "STALE", 0.05)
    run = remote_run()
    folder, log = run.pipeline.dir, run.log
    folder.create()
    host = lease.socket.gethostname()
    for machine, waited in (("another machine", True), (None, True), (lease.machine(), False)):
        holder = {"host": host, "machine": machine, "pid": 2**22 + 1, "token": "x", "beat": 1}
        folder.remote.sync.store.write(lease.NAME, json.dumps(holder).encode())
        before = log.tell()
        with folder.lock():
            assert ("taking the lock" in log.getvalue()[before:]) == waited


def test_a_command_that_was_taken_over_publishes_no_record(remote_run, s3, bucket):
    folder = remote_run().pipeline.dir
    folder.create()
    other = {"host": "another host", "pid": 1, "token": "x", "beat": 1}
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.lock())
        folder.remote.sync.store.write(lease.NAME, json.dumps(other).encode())
        with pytest.raises(UserError, match="process 1 on another host is working"):
            folder.complete("ingest", StageInputs({}, {}), [], 0.0)
    assert "stages/ingest.json" not in stored_objects(s3, bucket)


@pytest.mark.parametrize("done", [False, True], ids=["at work", "done already"])
def test_a_command_that_was_taken_over_changes_nothing_any_more(remote_run, s3, bucket, monkeypatch, done):
    """Neither in the background nor at the end: the stored files belong to the other command."""
    monkeypatch.setattr(mirror, "FOLLOW", 0.01)
    folder = remote_run().pipeline.dir
    folder.create()
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.lock())
        (folder / "scores.parquet").write_text("of this one", encoding="utf-8")
        (folder / "manifest.parquet").write_text("of this one", encoding="utf-8")
        folder.keep()
        s3.client.put_object(Bucket=bucket, Key="run/scores.parquet", Body=b"of the other one")
        other = {"host": "another host", "pid": 1, "token": "x", "beat": 1}
        if done:
            s3.client.delete_object(Bucket=bucket, Key=f"run/{lease.NAME}")
        else:
            s3.client.put_object(Bucket=bucket, Key=f"run/{lease.NAME}", Body=json.dumps(other).encode())
        with pytest.raises(UserError, match="It took the lock while this command sent no heartbeat"):
            folder.remote.lock.check()
        (folder / "scores.parquet").write_text("later, of this one", encoding="utf-8")
        (folder / "manifest.parquet").unlink()
        with pytest.raises(UserError, match="another command has taken the lock"):
            stack.close()
    stored = stored_objects(s3, bucket)
    assert stored["scores.parquet"] == b"of the other one"
    assert stored["manifest.parquet"] == b"of this one"


def test_an_output_being_recomputed_has_no_record(remote_run, s3, bucket, monkeypatch):
    """Otherwise a machine that resumes would find an output that does not match its record."""
    folder = remote_run("a").pipeline.dir
    folder.create()
    with folder.lock():
        (folder / "report.html").write_text("old", encoding="utf-8")
        folder.complete("report", StageInputs({}, {}), [folder / "report.html"], 0.0)

    def interrupted(context, inputs):
        (run.pipeline.dir / "report.html").write_text("new, by another version", encoding="utf-8")
        raise KeyboardInterrupt

    run = remote_run("b")
    monkeypatch.setattr(run.pipeline, "inputs", lambda stage: StageInputs({}, {"page": "another"}))
    monkeypatch.setattr(report, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.stages("report")
    stored = stored_objects(s3, bucket)
    assert stored["report.html"] == b"new, by another version"
    assert "stages/report.json" not in stored
    other = remote_run("c").pipeline.dir
    other.create()
    with other.lock():
        assert (other / "report.html").read_text(encoding="utf-8") == "new, by another version"


def test_who_only_reads_removes_nothing(remote_run, s3, bucket):
    """A finished stage's unfinished work goes with the next command that holds the folder."""
    first = remote_run().stages("ingest", "score", "select").pipeline.dir
    name = f"{first.work('select', StageInputs({}, {})).parent.relative_to(first.path)}/select-"
    name += f"{first.record('select')['fingerprint'][:16]}/left"
    s3.client.put_object(Bucket=bucket, Key=f"run/{name}", Body=b"x")
    remote_run("b").pipeline.dir.fetch()
    assert name in stored_objects(s3, bucket)
    remote_run("c").stages("select")
    assert name not in stored_objects(s3, bucket)


def test_a_run_on_a_disk_has_no_copy(tmp_path):
    folder = RunDir.of(tiny_config(tmp_path / "run").run)
    assert folder.remote is None
    assert folder.path == Path(tmp_path / "run")

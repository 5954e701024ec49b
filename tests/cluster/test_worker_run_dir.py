"""A run on Ray whose driver and workers share no disk: they meet on object storage alone."""

from __future__ import annotations

import json
import shutil
import tempfile
import time

import pytest
from conftest import Run, tiny_config
from storage_cases import artefact_digests, stored_objects

from distill_at_scale.cluster.worker_run_dir import Notes, WorkerRunDir
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import run as sweep
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import scratch_of

pytestmark = pytest.mark.usefixtures("no_pauses")

SECRET = "very-secret-word"


@pytest.fixture
def apart(s3, tmp_path, monkeypatch):
    """apart("bucket", …): a configuration whose working copy is elsewhere for this process than for Ray's workers."""
    copies = []

    def make(bucket, **overrides):
        s3.client.create_bucket(Bucket=bucket)
        uri = s3(f"{bucket}/run").replace("s3://", f"s3://testing:{SECRET}@")  # workers may have started before `s3`
        config = tiny_config(uri, **overrides)
        copies.append(scratch_of(config.run.dir))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return config

    yield make
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)


def on_ray(config):
    from distill_at_scale.cluster.executor import RayExecutor

    run = Run(config)
    run.pipeline.context.make_executor = lambda: RayExecutor(config, lambda text: None)
    return run


@pytest.mark.slow
def test_driver_and_workers_meet_on_the_storage_alone(ray_session, apart, s3, local_digests):
    """Every stage, and the artefacts are the bytes of a run on a disk without Ray."""
    config = apart("apart", cluster__address=None, cluster__actors=1, distill__workers=1)
    run = on_ray(config).stages("ingest", "score", "select", "distill", "evaluate", "report")
    stored = stored_objects(s3, "apart")
    assert b"<html" in stored["report.html"]
    events = [json.loads(line) for line in stored["timeline.jsonl"].decode().splitlines()]
    work = {
        stage: {e["pid"] for e in events if e["what"] == "work" and e["stage"] == stage}
        for stage in ("ingest", "score")
    }
    assert work["ingest"].isdisjoint(work["score"]), "each stage starts its own processes on a cluster"
    actual = artefact_digests(stored)
    same = [name for name in local_digests if name.startswith(("prepared", "scores", "manifest", "proxies"))]
    assert {name: actual[name] for name in same} == {name: local_digests[name] for name in same}
    assert set(actual) == set(local_digests)
    assert not [name for name in stored if name.startswith(".work")]
    assert not [name for name, content in stored.items() if SECRET.encode() in content]
    assert SECRET not in run.text


@pytest.mark.slow
def test_trials_meet_on_the_storage_alone_and_asha_stops_what_lags_behind(ray_session, apart, s3, tmp_path):
    """Trials and their workers have another copy than the driver. The first trial sets the mark; with one image per class made
    of noise and a rate of 0 the second cannot reach it.
    """
    import ray

    from distill_at_scale.cluster.tune_runner import TuneRunner

    choice = {"search": "asha", "samples": 6, "concurrent": 1, "reduction": 2, "controls": []}
    keys = {
        "sweep": {"space": {"distill.dc.image_lr": [1.0, 1e-9]}, **choice},
        "runtime__rule": "none",
        "score__trials": 1,
    }
    keys |= {"distill__steps": 40, "distill__evaluate_every": 10, "evaluate__epochs": 30, "evaluate__seeds": 1}
    config = apart("trials", cluster__address=None, **keys)
    PointSet(config, LocalRunner(), Display.silent()).shared({})  # without Ray, which is quicker
    table = sweep.run(config, Display.silent(), lambda: TuneRunner(config, lambda text: None))
    rows = table.to_pylist()
    stopped = {row["trial"] for row in rows if row["stopped"] is not None}
    assert len(rows) == 2
    assert len(stopped) == 1, f"all or none stopped: {rows}"
    assert all(row["mean"] is not None and (row["stopped"] or 0) < 40 for row in rows)
    there = stored_objects(s3, "trials")
    assert len([name for name in there if name.endswith("scores.parquet")]) == 1
    assert {name.split("/")[1] for name in there if ".work/" in name} <= stopped
    assert not [name for name, content in there.items() if SECRET.encode() in content]
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until, "a stopped trial holds its cores"
        time.sleep(0.5)
    again = sweep.run(config, Display.silent(), lambda: TuneRunner(config, lambda text: None))
    assert again.equals(table), "what was finished or stopped was tried again"


def test_a_process_that_sees_the_drivers_copy_fetches_nothing(apart):
    config = apart("same")
    run = RunDir.of(config.run)
    run.create()
    with run.lock():
        packed = {"config": config.model_dump(), "path": [], "copy": run.remote.marker()}
        assert WorkerRunDir(packed).remote is None
        packed["copy"] = {**packed["copy"], "token": "another", "root": "/driver/copy"}
        other = WorkerRunDir(packed)
        assert other.remote is not None
        assert other("/driver/copy/prepared") == run / "prepared"


@pytest.mark.parametrize("remote", [False, True])
def test_notes_reach_the_other_side(apart, tmp_path, remote):
    config = apart("notes") if remote else tiny_config(tmp_path / "run")
    work = RunDir.of(config.run) / ".work" / "distill-1"
    work.mkdir(parents=True)
    notes = Notes(work, config)
    assert notes.read("refused.txt") is None
    notes.write("refused.txt", "why")
    assert Notes(work, config).read("refused.txt") == "why"
    if not remote:
        (work / "as it was").hardlink_to(work / "refused.txt")
        notes.write("refused.txt", "something else")
        assert (work / "as it was").read_text(encoding="utf-8") == "why", (
            "who reads meanwhile sees the one or the other"
        )
    notes.remove("refused.txt", "never.txt")
    assert Notes(work, config).read("refused.txt") is None

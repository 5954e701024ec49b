"""Driver and workers that meet on object storage: what each finds where it looks."""

from __future__ import annotations

import shutil

import pytest
from conftest import tiny_config

from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.executors.synced import SyncedExecutor
from distill_at_scale.storage import lock as lease
from distill_at_scale.storage import sync as mirror
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import FolderSync


@pytest.fixture
def folder(s3, tmp_path, monkeypatch):
    """The driver's RunDir of a run folder on object storage."""
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    monkeypatch.setattr(mirror, "FOLLOW", 0.01)
    s3.client.create_bucket(Bucket="exchange")
    run = RunDir.of(tiny_config(s3("exchange/run"), run__scratch=str(tmp_path / "driver")).run)
    run.create()
    with run.lock():
        yield run


def test_workers_on_the_drivers_machine_resume_from_a_state_written_elsewhere(folder, tmp_path):
    """The first worker was on another machine, which is lost; the next one reads the driver's copy."""
    names = "prepared", "manifest.parquet", ".work/distill-1", "metrics.jsonl", "networks"
    places = DistillPaths(*(folder / name for name in names))
    elsewhere = FolderSync(folder.remote.sync.store.uri, tmp_path / "worker", 0.0)

    class LostOnTheWay(LocalExecutor):
        def train(self, group):
            state = elsewhere.local / places.state.relative_to(folder.path)
            state.parent.mkdir(parents=True)
            state.write_text("of step 2", encoding="utf-8")
            elsewhere.push()
            shutil.rmtree(elsewhere.local)

    tasks.distill(SyncedExecutor(LostOnTheWay(), folder.remote), tiny_config("unused"), places, lambda line: None)
    assert places.state.read_text(encoding="utf-8") == "of step 2"

"""Sweeps on Ray Tune: trials that share cores without a deadlock, and a killed driver (asha: `test_worker_run_dir.py`)."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, TINY, tiny_config
from rich.console import Console

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments import points
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import run
from distill_at_scale.storage.run_dir import RunDir

ray = pytest.importorskip("ray")


def config(folder: Path, space: dict, sweep: dict | None = None, **sections) -> Config:
    shared = {"cluster__address": None, "runtime__rule": "none", "evaluate__seeds": 1, "score__trials": 1}
    return tiny_config(folder, sweep={"space": space, "controls": [], **(sweep or {})}, **{**shared, **sections})


def made_before(settings: Config) -> None:
    """Ingest and scores without Ray, which is quicker; that they run on it is shown elsewhere."""
    PointSet(settings, LocalRunner(), Display.silent()).shared({})


def sweep(settings: Config, shared: bool = True):
    from distill_at_scale.cluster.tune_runner import TuneRunner

    output = io.StringIO()
    display = Display(Console(file=output, width=200))
    if shared:
        made_before(settings)
    return run.run(settings, display, lambda: TuneRunner(settings, display.say)), output.getvalue()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("workers", "concurrent", "room"), [(1, None, 2), (2, None, 1), (1, 2, 2), (2, 2, None), (3, None, None)]
)
def test_no_more_trials_at_a_time_than_the_cluster_holds(tmp_path, workers, concurrent, room):
    from distill_at_scale.cluster.tune_runner import concurrency

    settings = config(tmp_path, {"select.keep": [0.5]}, {"concurrent": concurrent}, distill__workers=workers)
    if room is None:
        with pytest.raises(UserError, match=rf"distill.workers = {workers} do not fit on the cluster's 2 cores"):
            concurrency(settings)
    else:
        assert concurrency(settings) == room


@pytest.mark.usefixtures("ray_session")
def test_too_many_trials_at_a_time_are_refused_before_anything_starts(tmp_path):
    settings = config(tmp_path / "run", {"select.keep": [0.5]}, {"concurrent": 2}, distill__workers=2)
    with pytest.raises(UserError, match=r"2 trials at a time .*lower sweep.concurrent"):
        sweep(settings, shared=False)
    assert not (tmp_path / "run" / "shared").exists()
    assert ray.is_initialized(), "the Ray of others was shut down"


@pytest.mark.slow
@pytest.mark.xdist_group("more ray")
@pytest.mark.usefixtures("ray_session")
def test_trials_of_two_workers_on_two_cores_end_and_a_failing_one_does_not_end_them(tmp_path):
    """rate 1e30 makes the images infinite: that trial is listed, the other is evaluated."""
    space = {"distill.dc.image_lr": [0.1, 1e30]}
    settings = config(tmp_path / "run", space, distill__workers=2)
    table, _ = sweep(settings)
    good, bad = sorted(table.to_pylist(), key=lambda row: row["error"] is not None)
    assert 0 <= good["mean"] <= 1
    assert bad["error"] is not None
    assert bad["mean"] is None
    assert ray.is_initialized()
    for folder in (tmp_path / "run" / "points").iterdir():
        assert (folder / "prepared").is_symlink()
        assert "shared" in json.loads((folder / "stages" / "score.json").read_text(encoding="utf-8"))["reused_from"]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "points", "shared", "stages", "sweep.html", "sweep.parquet"}, "Tune left something"


@pytest.mark.chaos
def test_kill_9_of_a_sweep_and_the_same_command_again_does_no_finished_trial_again(tmp_path):
    path, root = tmp_path / "sweep.yaml", tmp_path / "run"
    values = {**TINY, "run": {"dir": str(root)}, "runtime": {"rule": "none"}, "cluster": {"address": None},
              "sweep": {"space": {"select.keep": [0.1, 0.2, 0.4, 0.8]}, "controls": []}}  # fmt: skip
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill_at_scale.cli", "sweep", str(path)]
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment)
    until = time.monotonic() + 280
    while len(finished := records(root)) < 1:
        assert time.monotonic() < until, "no trial ended"
        assert driver.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = records(root)
    assert len(finished) < 4, "all trials had ended, so nothing was tested"
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=290)
    assert again.returncode == 0, again.stderr[-3000:]
    assert finished.items() <= records(root).items(), "a finished trial was done again"
    table = pq.read_table(root / "sweep.parquet")
    assert table.num_rows == len(records(root)) == 4
    assert table["error"].null_count == 4


def records(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.glob("points/*/stages/evaluate.json")}


def test_the_notes_of_a_trial_are_known_to_the_points(tmp_path):
    points.write_stop(RunDir(tmp_path), {"step": 3, "top1": 0.5})
    points.write_failure(RunDir(tmp_path), points.Failure("its process was lost", transient=True))
    assert json.loads((tmp_path / points.STOPPED).read_text(encoding="utf-8")) == {"step": 3, "top1": 0.5}
    assert points.read_failure(RunDir(tmp_path)) == points.Failure("its process was lost", transient=True)

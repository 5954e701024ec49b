"""The whole command is killed in the middle of scoring and run again: the table is the one of an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_plugins
import pytest
import yaml
from conftest import ROOT, TINY, Run, tiny_config

pytestmark = pytest.mark.xdist_group("ray")  # what arms the killing criterion is one file for all processes


def command(folder: Path, stage: str, run: str, *overrides: str) -> list[str]:
    path = folder / "config.yaml"
    if not path.exists():
        values = {**TINY, "score": {**TINY["score"], "criterion": "fault_plugins:KillingLoss"}}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
    call = "import sys, torch; torch.set_num_threads(1); from distill_at_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", call, stage, str(path), f"run.dir={folder / run}", *overrides]


def run_command(folder: Path, stage: str, run: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    arguments = command(folder, stage, run, *overrides)
    return subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.fixture
def whole(tmp_path):
    """The scores of a run that nothing disturbed. The folder "broken" has only the prepared data of that run."""
    run = Run(tiny_config(tmp_path / "whole", score__criterion="fault_plugins:KillingLoss")).stages("ingest")
    shutil.copytree(run.dir, tmp_path / "broken")
    return (run.stages("score").dir / "scores.parquet").read_bytes()


@pytest.mark.slow
def test_a_command_killed_while_scoring_resumes_to_the_same_table(tmp_path, whole):
    fault_plugins.ARMED.touch()
    assert run_command(tmp_path, "score", "broken").returncode == 1
    assert not fault_plugins.ARMED.exists()
    assert not (tmp_path / "broken" / "scores.parquet").exists()
    pieces = list((tmp_path / "broken").rglob("chunk-*.parquet"))
    kept = {piece.name: piece.stat().st_mtime_ns for piece in pieces}
    assert kept, "the chunks that were finished before are lost"
    again = run_command(tmp_path, "score", "broken")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "broken" / "scores.parquet").read_bytes() == whole


@pytest.mark.chaos
def test_kill_9_of_a_driver_on_ray_half_way_loses_only_the_chunks_in_flight(tmp_path, whole):
    """Actors score slowly, the driver is killed when a third of the chunks is there, and the command is given again."""
    on_ray = ("cluster.address=null", "cluster.actors=2")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    fault_plugins.SLOW.touch()
    try:
        driver = subprocess.Popen(command(tmp_path, "score", "broken", *on_ray), cwd=tmp_path, env=environment)
        until = time.monotonic() + 240
        while len(list((tmp_path / "broken").rglob("chunk-*.parquet"))) < 4:
            assert time.monotonic() < until, "no chunk was scored"
            assert driver.poll() is None, "the driver ended before it could be killed"
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finally:
        fault_plugins.SLOW.unlink()
    finished = {piece.name: piece.stat().st_mtime_ns for piece in (tmp_path / "broken").rglob("chunk-*.parquet")}
    assert len(finished) >= 4
    again = run_command(tmp_path, "score", "broken", *on_ray)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "broken" / "scores.parquet").read_bytes() == whole


LOST_NODE = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from distill_at_scale.cli import main

folder, config, run = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 150 * 2**20})
second = cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)

def take_away():
    while len(list(folder.rglob("chunk-*.parquet"))) < 4:
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    (folder / "taken").touch()

threading.Thread(target=take_away, daemon=True).start()
code = main(["score", config, f"run.dir={run}", "cluster.address=null", "cluster.actors=2"])
os._exit(code)  # the simulated cluster, which lost a node, ends with an error of its own
"""


@pytest.mark.chaos
def test_a_node_lost_in_the_middle_of_scoring_changes_nothing(tmp_path, whole):
    command(tmp_path, "score", "broken")  # writes the configuration
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    arguments = [sys.executable, "-c", LOST_NODE, str(tmp_path / "broken"), str(tmp_path / "config.yaml"),
             str(tmp_path / "broken")]  # fmt: skip
    fault_plugins.SLOW.touch()
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=420)
    finally:
        fault_plugins.SLOW.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "broken" / "taken").exists(), "no node was taken away, so nothing was tested"
    assert (tmp_path / "broken" / "scores.parquet").read_bytes() == whole

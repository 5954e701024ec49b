"""Elastic workers: a group uses the available nodes and continues with fewer or more when nodes are lost or join."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY, tiny_config

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.local import LocalExecutor

WAITS = [[6, 2], [12, 1]]  # two workers stop before step 6, and one before step 12
STEPS = {"steps": 20, "checkpoint_every": 2}


@pytest.mark.parametrize("workers", [0, [1], [3, 2], [0, 1], [1.0, 2], [1, 2, 3], "two", True])
def test_invalid_numbers_of_workers_are_refused(workers):
    with pytest.raises(UserError, match=r"distill\.workers = .* a number from 1 on, or \[least, most\]"):
        tiny_config("unused", distill__workers=workers)


def test_more_workers_than_classes_are_refused_where_each_owns_some(digits_run):
    prepared = PreparedDataset(digits_run.dir / "prepared")
    with pytest.raises(UserError, match=r"distill\.workers = \[1, 4\] is more than the 3 classes"):
        distill.check_inputs(tiny_config("unused", distill__workers=[1, 4]), prepared, [5, 5, 5])


def test_the_number_of_workers_is_not_part_of_a_fingerprint(make_run, digits_run):
    again = make_run(digits_run.dir, distill__workers=[1, 3]).stages("distill")
    assert "distill: already done for this configuration, skipped" in again.text


def held(log: Path) -> list[int]:
    """How many workers began, each time that some did."""
    return [len(line["workers"]) for line in lines(log) if line.get("stage") == "hold"]


def lines(log: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if log.exists()
        else []
    )


def images(work: Path) -> torch.Tensor:
    return synthetic_set.load(work / "synthetic").images


@pytest.mark.slow
@pytest.mark.xdist_group("more ray")
@pytest.mark.usefixtures("ray_session")
def test_as_many_start_as_find_room(places, tmp_path):
    """Two of at most three, and their set is that of a fixed group of two."""
    from distill_at_scale.cluster.executor import RayExecutor

    sets = {}
    for name, workers in (("elastic", [1, 3]), ("fixed", 2)):
        own = DistillPaths(places.prepared, places.manifest, tmp_path / name, tmp_path / f"{name}.jsonl")
        config = tiny_config("unused", cluster__address=None, distill__workers=workers)
        executor = RayExecutor(config, lambda text: None)
        executor.session.local = name == "fixed"  # on the actors of the pool, which start faster than Ray Train
        tasks.distill(executor, config, own, lambda line: None)
        executor.release()
        sets[name] = images(own.work)
    assert held(tmp_path / "elastic.jsonl")[-1] == 2
    assert torch.equal(sets["elastic"], sets["fixed"])


@pytest.mark.usefixtures("ray_session")
def test_where_not_even_the_least_find_room_nothing_starts(places):
    from distill_at_scale.cluster.executor import RayExecutor

    config = tiny_config("unused", cluster__address=None, distill__workers=[3, 3])
    with pytest.raises(UserError, match=r"distill\.workers = 3 needs as many cores, the cluster has 2"):
        tasks.distill(RayExecutor(config, lambda text: None), config, places, lambda line: None)
    assert not places.work.exists()


@pytest.mark.usefixtures("ray_session")
def test_what_a_growing_cluster_lacks_is_awaited():
    from distill_at_scale.cluster.actor_pool import check_gpus

    with pytest.raises(UserError, match=r"cluster\.grows=true"):
        check_gpus(tiny_config("unused", cluster__gpus_per_worker=1).cluster)
    check_gpus(tiny_config("unused", cluster__gpus_per_worker=1, cluster__grows=True).cluster)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without cores, to which tests add nodes."""
    utils = pytest.importorskip("ray.cluster_utils")
    ray_cluster = utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False},
    )
    yield ray_cluster
    ray_cluster.shutdown()


def until(true: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    end = time.monotonic() + 300
    while not true():
        assert process.poll() is None, f"the command ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.2)


@pytest.mark.chaos
def test_a_group_shrinks_with_a_lost_node_and_grows_with_a_new_one(cluster, digits_run, tmp_path):
    """The command runs on two nodes, loses one in step 6, finds another in step 12; the set is that of one process."""
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster.add_node(**node)
    lost = cluster.add_node(**node)
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    section = {"method": "fault_plugins:WaitingBackend", "workers": [1, 2], "options": {"waits": WAITS}, **STEPS}
    values = {**TINY, "distill": {**TINY["distill"], **section}, "cluster": {"address": cluster.address}}
    values["run"] = {"dir": str(run), "reuse": str(digits_run.dir)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    call = (
        "import sys; from distill_at_scale.cluster import train_group; train_group.RESIZE = 2.0; "
        "from distill_at_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    for stage in ("ingest", "score", "select", "distill"):
        arguments = [sys.executable, "-c", call, stage, str(tmp_path / "config.yaml")]
        command = subprocess.Popen(
            arguments, text=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if stage == "distill":
            until(lambda: reached(log, 6), command, "two workers did six steps")
            cluster.remove_node(lost, allow_graceful=False)
            until(lambda: reached(log, 12), command, "the one left did six more")
            cluster.add_node(**node)
        output, _ = command.communicate(timeout=300)
        assert command.returncode == 0, output
    began = held(log)
    assert (began[0], began[-1]) == (2, 2)
    assert 1 in began
    alone = DistillPaths(run / "prepared", run / "manifest.parquet", tmp_path / "alone", tmp_path / "alone.jsonl")
    spared = {"distill__method": "fault_plugins:WaitingBackend", "distill__options": {"waits": []}}
    tasks.distill(
        LocalExecutor(),
        tiny_config("unused", **spared, **{f"distill__{k}": v for k, v in STEPS.items()}),
        alone,
        lambda line: None,
    )
    torch.testing.assert_close(images(run), images(alone.work), rtol=1e-4, atol=1e-5)


def reached(log: Path, step: int) -> bool:
    return any(line.get("stage") == "distill" and line["step"] == step for line in lines(log))

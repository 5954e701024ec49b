"""Distillation by two workers: the set of one, the same bytes after a stop, and an end together where one diverges."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave_group
from distill_runs import CPU, LOOPS, elsewhere, lines, same, start, stop_before
from safetensors.torch import load_file

from distill_at_scale.core.collectives import ProcessGroup
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.checkpoint import checkpoint_step
from distill_at_scale.distillation.engine import Distillation, DistillPaths

# one process group runs all of it, as starting processes costs seconds
pytestmark = pytest.mark.xdist_group("distill workers")

PAIRS = {
    "dm": {"distill__method": "dm", "distill__steps": 3, "runtime__rule": "loss"},
    "dc": {**LOOPS, "distill__dc__inner": 1, "distill__steps": 3},
    "dsa": {
        "distill__ipc": 2,
        "distill__method": "dsa",
        "distill__dsa__outer": 2,
        "distill__dsa__inner": 1,
        "distill__steps": 3,
    },
}
DIVERGING = {"distill__steps": 20, "distill__dc__image_lr": 1e30}
POISONED = [{"distill__steps": 2}, {**LOOPS, "distill__steps": 2}]  # nothing shared between classes; a shared network


def work(rank: int, folder: str, places: DistillPaths) -> None:
    """One of two workers; leaves its findings as files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = ProcessGroup(CPU)
    for name, overrides in PAIRS.items():
        result = start(elsewhere(places, name), group, **overrides).run()
        assert (result is not None) == (rank == 0)
        if result is not None:
            result.save(Path(folder) / name)
    stopped = elsewhere(places, "resumed")
    first = start(stopped, group, **PAIRS["dc"])
    stop_before(first, 2)
    with contextlib.suppress(KeyboardInterrupt):
        first.run()
    result = start(stopped, group, **PAIRS["dc"]).run()
    if result is not None:
        result.save(Path(folder) / "resumed")
    late = start(elsewhere(places, "late"), group, distill__checkpoint_every=1000, **PAIRS["dm"])
    late.timer.last -= 1000 * (rank == 0)
    stop_before(late, 2)
    with contextlib.suppress(KeyboardInterrupt):
        late.run()
    messages = [_message(start(elsewhere(places, "diverging"), group, **DIVERGING))]
    for k, overrides in enumerate(POISONED):
        poisoned = start(elsewhere(places, f"poisoned-{k}"), group, **overrides)
        poisoned.timer.last -= 1000 * (rank == 0)  # that it is late for a checkpoint does not hide it
        if rank == 1:
            with torch.no_grad():
                poisoned.method.images[0].fill_(float("inf"))
        messages.append(_message(poisoned))
    results = {"sum": torch.tensor([1.0 + rank, 2.0]), "other": torch.full((2, 2), float(rank))}
    group.all_reduce_sum(list(results.values()))
    facts = {
        "messages": messages,
        "sum": [t.tolist() for t in results.values()],
        "gather": group.gather(rank),
        "broadcast": group.broadcast(10 + rank),
        "highest": [group.all_reduce_max(2 * rank), group.all_reduce_max(0)],
        "first": group.smallest("second" if rank == 1 else None),
    }
    (Path(folder) / f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    leave_group()


def _message(distillation: Distillation) -> str:
    try:
        distillation.run()
    except DistillationDiverged as error:
        return str(error)
    return "finished"


@pytest.fixture(scope="module")
def pair(digits_run, tmp_path_factory) -> Path:
    """The folder with the results of two workers."""
    folder = tmp_path_factory.mktemp("pair")
    places = DistillPaths(
        digits_run.dir / "prepared", digits_run.dir / "manifest.parquet", folder / "work", folder / "metrics.jsonl"
    )
    mp.spawn(work, (str(folder), places), nprocs=2)
    return folder


def facts(pair: Path) -> list[dict]:
    return [json.loads((pair / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", PAIRS)
def test_two_workers_give_the_set_of_one(pair, places, name):
    """Up to the order in which floats are added."""
    one, two = start(places, **PAIRS[name]).run(), synthetic_set.load(pair / name)
    assert torch.equal(one.labels, two.labels)
    assert torch.allclose(one.images, two.images, rtol=1e-3, atol=1e-3)
    assert list(one.snapshots) == list(two.snapshots)
    assert one.card == two.card


def test_two_workers_resume_to_the_same_bytes(pair):
    assert same(synthetic_set.load(pair / "resumed"), synthetic_set.load(pair / "dc"))


def test_a_state_of_two_workers_is_resumed_by_one(pair, places):
    """The state belongs to classes, not to workers."""
    shutil.copytree(pair / "work" / "dm", places.work)
    again = start(places, **PAIRS["dm"])
    stop_before(again, 0)
    assert torch.equal(again.run().images, synthetic_set.load(pair / "dm").images)


def test_two_workers_save_together_where_it_is_late_for_one(pair):
    assert checkpoint_step(pair / "work" / "late" / "state.safetensors") == 1


def test_the_log_of_two_workers_is_one_log(pair, places):
    start(places, **PAIRS["dm"]).run()
    log = lines(replace(places, log=pair / "dm.jsonl"))
    assert [line["step"] for line in log] == [line["step"] for line in lines(places)]
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in lines(places)], rel=1e-3)


def test_two_workers_stop_together_where_one_diverges(pair):
    """Class 1 belongs to the second worker; the first stops with its message too."""
    (first, second) = (result["messages"] for result in facts(pair))
    assert first == second
    assert "is not finite at step" in first[0]
    assert "class '1' is not finite at step 0, image learning rate 0.1" in first[1]


def test_the_class_that_diverged_first_is_named_not_one_that_it_dragged_along(pair):
    """In the second outer iteration the shared network, and so every class, is broken too."""
    assert "class '1' is not finite at step 0" in facts(pair)[0]["messages"][2]


def test_the_state_that_diverging_workers_leave_is_finite(pair):
    state = load_file(pair / "work" / "diverging" / "state.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())


def test_a_group_adds_gathers_and_tells(pair):
    for result in facts(pair):
        assert result["sum"] == [[3.0, 4.0], [[1.0, 1.0], [1.0, 1.0]]]
        assert result["gather"] == [0, 1]
        assert result["broadcast"] == 10
        assert result["highest"] == [2, 0]
        assert result["first"] == "second"

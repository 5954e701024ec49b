"""One, two and four workers agree: the same images up to the order of sums, with no more communication than the methods need.

All cases run in the same four processes, which are started once; a group of two is made of the first two of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave_group, tiny_config
from safetensors.torch import load_file

from distill_at_scale.core.collectives import ProcessGroup, SingleProcess
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.distillation.methods import METHODS

pytestmark = pytest.mark.xdist_group("parallel")  # one process makes the fixtures, which take half a minute

CPU = torch.device("cpu")
LOOPS = {"outer": 2, "inner": 2, "network_batch": 5, "network_lr": 0.05}
CHEAP: dict[str, dict[str, Any]] = {  # smaller than their defaults; a method that is not named runs as it is
    "dc": LOOPS,
    "dsa": {**LOOPS, "augment": "color_crop_cutout_scale_rotate"},
    "idc": {"inner": 2, "network_samples": 20, "network_batch": 10, "real_batch": 8},
}
APART = ("sre2l", "rded")  # they need a teacher, which their own tests make
BY_CLASS = [name for name, kind in METHODS.items() if kind.parallel == "classes" and name not in APART]
REFRESH = "loss, refresh"  # the rule loss, and renewals of the kept samples
CASES = [
    (method, rule)
    for method in BY_CLASS
    for rule in ("none", "loss", "ite", REFRESH)
    if not (rule != "none" and METHODS[method].no_runtime) and (method, rule) != ("dsa", REFRESH)  # as for dc
]
CLASSES = [str(digit) for digit in range(5)]  # no multiple of 2 or 4: shares differ
STEPS, IPC = 3, 2


class Spy(ProcessGroup):
    """A group of workers that records its collectives."""

    def __init__(self, size: int, members: Any):
        super().__init__(CPU)
        self.size, self.members = size, members
        self.sums: list[int] = []  # tensors in each
        self.gathered: list[str] = []

    def all_reduce_sum(self, tensors):
        self.sums.append(len(tensors))
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=self.members)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, tensor):
        self.gathered.append("tensors")
        result = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(result, tensor, group=self.members)
        return result

    def all_reduce_max(self, level):
        shared = torch.tensor([level])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.members)
        return int(shared.item())

    def gather(self, value):
        self.gathered.append(kind_of(value))
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.members)
        return values

    def broadcast(self, value):
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.members)
        return box[0]


def kind_of(value: Any) -> str:
    """What a gathered value holds: the images, a whole state, or plain numbers."""
    if isinstance(value, dict):
        return "state" if any(isinstance(v, torch.Tensor) for v in value.values()) else "numbers"
    return "images" if isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value) else "numbers"


def name_of(method: str, rule: str, workers: int) -> str:
    return f"{method}-{rule}-{workers}"


def begin(places: DistillPaths, method: str, rule: str, workers: Any) -> Distillation:
    overrides = {f"distill__{method}__{key}": value for key, value in CHEAP.get(method, {}).items()}
    overrides |= {"select__refresh": 1, "select__refresh_pool": 0.5} if rule == REFRESH else {}
    config = tiny_config("unused", data__classes=CLASSES, distill__method=method, distill__ipc=IPC, distill__steps=STEPS,
                         distill__checkpoint_every=2, runtime__rule=rule.partition(",")[0], runtime__refresh=2,
                         **overrides)  # fmt: skip
    own = name_of(method, rule, workers.size)
    return Distillation(config, replace(places, work=places.work / own, log=places.work / f"{own}.jsonl"), workers, CPU)


def work(rank: int, folder: str, places: DistillPaths) -> None:
    """One of four processes; writes the sets and the recorded collectives of each worker."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 4)}
    for size, members in groups.items():
        if rank < size:
            for method, rule in CASES:
                spy = Spy(size, members)
                result = begin(places, method, rule, spy).run()
                facts = {"sums": spy.sums, "gathered": spy.gathered}
                (Path(folder) / f"{name_of(method, rule, size)}.{rank}.json").write_text(
                    json.dumps(facts), encoding="utf-8"
                )
                if result is not None:
                    result.save(Path(folder) / name_of(method, rule, size))
        dist.barrier()
    leave_group()


@pytest.fixture(scope="module")
def five_classes(make_run, tmp_path_factory) -> DistillPaths:
    run = make_run(tmp_path_factory.mktemp("five") / "run", data__classes=CLASSES, distill__ipc=IPC)
    run.stages("ingest", "score", "select")
    work = run.dir / "parallel"
    work.mkdir()
    return DistillPaths(run.dir / "prepared", run.dir / "manifest.parquet", work, work / "log.jsonl")


@pytest.fixture(scope="module")
def group(five_classes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(work, (str(folder), five_classes), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def alone(five_classes) -> dict[tuple[str, str], synthetic_set.SyntheticSet]:
    return {case: begin(five_classes, *case, SingleProcess()).run() for case in CASES}


def asked(group: Path, method: str, rule: str, size: int) -> list[dict[str, Any]]:
    return [
        json.loads((group / f"{name_of(method, rule, size)}.{rank}.json").read_text(encoding="utf-8"))
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("method", "rule"), CASES)
def test_workers_give_the_set_of_one_process(group, alone, five_classes, method, rule, size):
    one, several = alone[method, rule], synthetic_set.load(group / name_of(method, rule, size))
    assert torch.equal(one.labels, several.labels)
    torch.testing.assert_close(several.images, one.images, rtol=1e-3, atol=1e-4)
    assert several.card == one.card
    first, other = (load_file(five_classes.work / name_of(method, rule, n) / "state.safetensors") for n in (1, size))
    kept = [key for key in first if key.startswith("kept/")]
    assert len(kept) == (len(CLASSES) if rule == REFRESH else 0)
    assert all(torch.equal(first[key], other[key]) for key in kept)


@pytest.mark.parametrize("method", BY_CLASS)
def test_runtime_pruning_changed_what_they_agree_on(alone, method):
    if (method, "loss") in alone:
        assert not torch.equal(alone[method, "none"].images, alone[method, "loss"].images)
    if (method, REFRESH) in alone:
        assert not torch.equal(alone[method, "loss"].images, alone[method, REFRESH].images)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", [name for name in ("dc", "dsa") if name in BY_CLASS])
def test_every_batch_of_the_inner_loop_is_one_sum_of_the_whole_gradient(group, five_classes, method, size):
    batches = -(-len(CLASSES) * IPC // LOOPS["network_batch"])
    expected = STEPS * (LOOPS["outer"] - 1) * LOOPS["inner"] * batches
    parameters = len(list(begin(five_classes, method, "none", SingleProcess()).context.spec.build(0).parameters()))
    for result in asked(group, method, "none", size):
        assert result["sums"] == [parameters] * expected


@pytest.mark.parametrize("size", [2, 4])
def test_matching_distributions_needs_no_sums(group, size):
    assert all(result["sums"] == [] for result in asked(group, "dm", "loss", size))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("method", "rule"), CASES)
def test_images_are_gathered_for_checkpoints_snapshots_and_the_result_only(group, method, rule, size):
    """Checkpoints after steps 2 and 3; snapshots before steps 0 and 1, and at the end; the result."""
    for result in asked(group, method, rule, size):
        kinds = [result["gathered"].count(kind) for kind in ("state", "images", "tensors")]
        assert kinds == [2, 4, 0]

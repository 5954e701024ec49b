"""Where the work of a run takes place: processes and threads of this machine, of its GPUs, and of a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import tiny_config
from plan_cases import MACHINE, layout

from distill_at_scale.pipeline.executors.layout import Layout, Spread


@pytest.mark.parametrize(
    ("address", "expected"), [(None, (False, False)), ("none", (True, False)), ("head:1", (False, True))]
)
def test_the_address_says_where_the_work_runs(address, expected):
    there = layout(tiny_config("x", cluster__address=address))
    assert (there.local, there.remote) == expected


@pytest.mark.parametrize(
    ("config", "tasks", "expected"),
    [
        ({"cluster__address": None}, 2, Spread(2, 2)),
        ({"cluster__address": None}, 9, Spread(4, 1)),
        ({"cluster__address": "none"}, 9, Spread(1, 1)),  # tests have one thread
    ],
)
def test_tasks_share_the_cores(config, tasks, expected):
    assert layout(tiny_config("x", **config)).tasks(tasks) == expected


@pytest.mark.parametrize(
    ("config", "group", "expected"),
    [
        ({"cluster__address": None}, (2, 2), Spread(2, 2)),
        ({"cluster__address": None}, (1, 8), Spread(4, 1)),  # elastic: one thread each
        ({"cluster__address": "ray://head:1"}, (1, 8), Spread(8, 1)),  # a cluster whose size is unknown
        ({"cluster__address": None, "cluster__gpus_per_worker": 1.0}, (1, 8), Spread(2, 1)),
        ({"cluster__address": None, "cluster__gpus_per_worker": 0.5}, (4, 4), Spread(4, 1)),
    ],
)
def test_a_group_has_as_many_workers_as_fit(config, group, expected):
    assert layout(tiny_config("x", **config), replace(MACHINE, gpus=2)).group(*group) == expected


def test_gpus_bound_the_actors_and_other_programs_the_processes_without_ray(monkeypatch):
    gpus = layout(tiny_config("x", cluster__address=None, cluster__gpus_per_worker=0.5), replace(MACHINE, gpus=2))
    assert (gpus.actors(), gpus.actors(gpu=False)) == (Spread(4, 1), Spread(4, 1))
    assert layout(tiny_config("x", cluster__address=None, cluster__actors=3)).actors() == Spread(3, 1)
    monkeypatch.setattr("distill_at_scale.pipeline.executors.layout.local_cores", lambda: 4)
    config = tiny_config("x", cluster__address="none")
    assert [Layout(config, MACHINE, others).tasks(9).side for others in (0.0, 1.5, 4.0)] == [4, 2, 1]

"""The pool on Ray Data: errors that its actors cannot send, lost nodes, the sizes of calls. Nothing here starts Ray."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import instant
from distill_at_scale.pipeline.executors.base import Task, Unit, Worker

ray = pytest.importorskip("ray")
from distill_at_scale.cluster import data_pool  # noqa: E402

LOST = ray.exceptions.WorkerCrashedError


class OddError(UserError):
    """It can be pickled, but not unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("outcome", "kind", "text"),
    [
        ([{"odd": lambda: None}], RuntimeError, "pickle"),
        (OddError("a class", "its file"), RuntimeError, "OddError: a class and its file"),
        (OSError(28, "No space left on device", "/data"), OSError, "/data"),
        (KeyError("a defect"), RuntimeError, "KeyError: 'a defect'"),
    ],
)
def test_what_a_ray_data_actor_cannot_send_is_an_error_and_no_loss(monkeypatch, outcome, kind, text):
    def run(self, units):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, instant("work", "x")

    monkeypatch.setattr(data_pool.DataActor, "run", run)
    actor = data_pool.DataActor(({}, Worker, {}, 1))
    actor.called = True
    (row,) = actor(pa.table({"number": [3], "units": [pickle.dumps([Unit(0)])]})).to_pylist()
    error = pickle.loads(row["answer"])
    assert (row["number"], type(error)) == (3, kind)
    assert text in str(error)


@pytest.fixture
def passes(monkeypatch):
    """passes(answers, units): a Ray Data pool. `answers(waiting, alone)` has the batches with a result in each pass, and None
    where the pass ends because a node is lost."""

    def make(answers, units):
        asked, done, lines = [], [], []

        def once(waiting, task, sharing, alone):
            asked.append((alone, [len(batch) for batch in waiting.values()]))
            for number in answers(dict(waiting), alone):
                if number is None:
                    raise LOST
                yield number, [unit.work for unit in waiting[number]], instant("work", "x"), 0

        monkeypatch.setattr(data_pool, "_stream", once)
        monkeypatch.setattr(data_pool, "actor_count", lambda config, gpus, sharing: 2)
        task = Task(Worker, tiny_config("unused"), {}, [Unit(n, (Path(f"piece {n}"),)) for n in range(units)])
        try:
            data_pool.run(task, done.append, 1, lambda event: None, lines.append)
        finally:
            make.asked = asked
        return sorted(done), asked, lines

    return make


def test_a_ray_data_pool_that_is_lost_after_its_last_unit_costs_nothing(passes):
    done, asked, lines = passes(lambda waiting, alone: [*waiting, None], 40)
    assert (done, len(asked), lines) == (list(range(40)), 1, [])


def test_what_a_lost_node_left_is_sent_again_in_calls_of_several_units(passes):
    done, asked, lines = passes(lambda waiting, alone: waiting if len(waiting[0]) < 10 else [0, None], 40)
    assert done == list(range(40))
    assert [(alone, len(sizes), max(sizes)) for alone, sizes in asked] == [(False, 14, 10), (False, 13, 7)]
    assert lines == ["  workers were lost; sending 30 unfinished units of work again"]


def test_the_units_of_a_call_that_kills_its_actors_are_sent_again_one_by_one_and_the_one_at_fault_is_named(passes):
    def answers(waiting, alone):
        return [number for number, batch in waiting.items() if all(unit.work != 7 for unit in batch)]

    with pytest.raises(WorkersLost, match=r"lost 7 times; 1 units of work are left, the first one makes piece 7\."):
        passes(answers, 40)
    assert passes.asked[1:] == [(True, [1] * 10), (True, [1]), (True, [1])]


@pytest.mark.parametrize(("units", "actors"), [(1, 8), (40, 2), (1310, 64), (100_000, 256)])
def test_calls_are_large_first_and_few(units, actors):
    calls = data_pool.grouped(list(range(units)), actors)
    assert [unit for call in calls for unit in call] == list(range(units))
    sizes = [len(call) for call in calls]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= max(1, units // (2 * actors))
    assert len(calls) <= units / data_pool.MOST_UNITS + 2 * actors * (1 + math.log(max(1, units / actors)))

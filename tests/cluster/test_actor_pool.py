"""The pool of Ray actors: units in few calls, lost actors, actors that find no core. Nothing here starts Ray."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import Event, TimeSpent
from distill_at_scale.pipeline.executors.base import Task, Unit, Worker

ray = pytest.importorskip("ray")
from distill_at_scale.cluster import actor_pool  # noqa: E402

LOST = ray.exceptions.WorkerCrashedError


class Answer:
    """What a call of an actor returns: the result, or a loss, at once."""

    def __init__(self, value):
        self.ended = Future()
        if isinstance(value, Exception):
            self.ended.set_exception(value)
        else:
            self.ended.set_result(value)

    def future(self):
        return self.ended


@pytest.fixture
def pool(monkeypatch):
    """pool(killing, units): the results of a pool of two actors, each lost in the calls that hold the unit `killing`.

    `begun` is the answer of an actor to a new task.
    """
    killed = []

    def make(killing, units, begun=None):
        class Handle:
            lost = False

            def __getattr__(self, name):
                return SimpleNamespace(remote=lambda *arguments: Answer(self.answer(name, *arguments)))

            def answer(self, name, *arguments):
                if name != "run":
                    return begun if name == "begin" else None
                (batch,) = arguments
                self.lost = self.lost or killing(batch)
                event = Event("work", "x", 0.0, 0.01)
                return LOST() if self.lost else ([{"unit": unit.work} for unit in batch], event)

        remote = SimpleNamespace(remote=lambda path: Handle())
        fake = SimpleNamespace(remote=lambda **o: lambda kind: remote, put=lambda job: job, kill=killed.append)
        monkeypatch.setattr(actor_pool, "ray", fake)
        done, events, lines = [], [], []
        task = Task(
            Worker, tiny_config("unused"), {}, [Unit(number, (Path(f"piece {number}"),)) for number in range(units)]
        )
        actor_pool.ActorPool().run(task, 2, lambda r: done.append(r["unit"]), events.append, lines.append)
        return sorted(done), events, lines

    return make


def test_many_units_are_few_calls_and_all_are_done_once(pool):
    done, events, _ = pool(lambda batch: False, 1000)
    assert done == list(range(1000))
    assert len(events) < 100


def test_the_units_of_a_lost_actor_are_repeated_one_by_one_and_counted_once(pool):
    losses = []

    def killing(batch):
        units = [unit.work for unit in batch]
        if 500 in units and len(losses) < 3:
            losses.append(units)
            return True
        return False

    done, events, lines = pool(killing, 1000)
    assert done == list(range(1000))
    assert len(losses[0]) > 1
    assert losses[1:] == [[500]] * 2
    assert sum(event.what == "lost" for event in events) == 3
    assert lines == [f"  {len(losses[0]) + 2} units of work were repeated after losses, and counted once"]


def test_units_that_are_lost_too_often_are_named(pool):
    with pytest.raises(WorkersLost, match=r"lost 4 times .*, the first one makes piece 7\.") as error:
        pool(lambda batch: any(unit.work == 7 for unit in batch), 40)
    assert "validate" in str(error.value)


def test_an_actor_that_cannot_begin_a_task_ends_it_with_the_error(pool):
    with pytest.raises(UserError, match="no such module"):
        pool(lambda batch: False, 40, UserError("no such module"))


def test_actors_that_are_lost_when_they_begin_a_task_count_as_lost(pool):
    with pytest.raises(WorkersLost, match=r"lost 4 times .*; 40 units of work are left"):
        pool(lambda batch: False, 40, LOST())


class PendingAnswer:
    def __init__(self, number):
        self.number, self.future = number, Future


def test_actors_that_find_no_core_are_ended_where_enough_others_are_ready(monkeypatch):
    """The first of three actors waits for a core."""
    started, killed = [], []

    def start(path):
        number = len(started)
        ready = PendingAnswer(number)
        started.append(SimpleNamespace(number=number, ready=SimpleNamespace(remote=lambda: ready)))
        return started[-1]

    def wait(answers, num_returns, timeout=None):
        there = [answer for answer in answers if answer.number > 0]
        first = there[:num_returns]
        assert timeout == 0 or len(first) == num_returns, "Ray would wait without end"
        return first, [answer for answer in answers if answer not in first]

    fake = SimpleNamespace(
        remote=lambda **options: lambda kind: SimpleNamespace(remote=start),
        wait=wait,
        get=lambda answers: None,
        kill=lambda handle: killed.append(handle.number),
    )
    monkeypatch.setattr(actor_pool, "ray", fake)
    pool = actor_pool.ActorPool()
    pool.grow(3)
    assert [actor.handle.number for actor in pool.ready(2)] == [1, 2]
    assert killed == [0]
    assert [actor.handle.number for actor in pool.ready(1)] == [1]
    assert killed == [0], "an idle actor that is ready stays"


@pytest.mark.parametrize(
    ("waiting", "actors", "seconds", "units"),
    [
        (1000, 2, None, 1),
        (1000, 2, 0.01, 250),
        (1000, 2, 0.5, 8),
        (1000, 2, 60, 1),
        (3, 2, 0.01, 1),
        (10**6, 1000, 0.85, 4),
    ],
)
def test_a_call_has_as_many_units_as_take_seconds_and_leave_work_for_all_actors(waiting, actors, seconds, units):
    assert actor_pool.units_per_call(waiting, actors, seconds) == units


class Touch(Worker):
    """Publishes the output of each unit; its result is what was stored before."""

    name = event = "touch"

    def run(self, units):
        for unit in units:
            unit.outputs[0].touch()
            yield {"stored": list(self.paths["stored"])}


def test_an_output_is_stored_when_its_unit_is_published(tmp_path):
    """So a worker that is lost in the middle of a batch loses the unfinished units only."""

    class Space:
        def __init__(self):
            self.stored = []

        def __call__(self, path):
            return path

        def keep(self, *paths):
            self.stored += [path.name for path in paths]

    space = Space()
    worker = Touch(tiny_config("unused"), {"stored": space.stored}, None, TimeSpent())
    units = [Unit(name, (tmp_path / name, tmp_path / f"{name} that is never written")) for name in "ab"]
    assert actor_pool.run_units(space, worker, units) == [{"stored": []}, {"stored": ["a"]}]
    assert space.stored == ["a", "b"]

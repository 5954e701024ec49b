"""Messages if processes of a cluster are lost too often, and errors that do not count as losses. Nothing here starts Ray."""

from __future__ import annotations

import math
import pickle
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import Unreachable, UserError, WorkersLost
from distill_at_scale.core.events import Event, TimeSpent, instant
from distill_at_scale.distillation import evaluate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Task, Unit, Worker, no_poll
from distill_at_scale.pipeline.monitoring.distillation_log import LogTail

ray = pytest.importorskip("ray")
from distill_at_scale.cluster import actor_pool, data_pool, train_group  # noqa: E402
from distill_at_scale.cluster import tasks as ray_tasks  # noqa: E402

LOST = ray.exceptions.WorkerCrashedError
FOLDERS = (Path("prepared"), Path("synthetic"), Path("manifest.parquet"), Path("notes"))


@pytest.fixture
def ray_tasks_alone(monkeypatch):
    """ray_tasks_alone(wait): an executor without a cluster, and the numbers of tasks that are to share its 64 cores."""

    def make(wait=None):
        counts, remote = [], SimpleNamespace(remote=lambda *arguments: arguments)
        monkeypatch.setattr(ray_tasks, "ray", SimpleNamespace(put=lambda value: value, wait=wait))
        monkeypatch.setattr(ray_tasks, "_run", SimpleNamespace(options=lambda **resources: remote))
        monkeypatch.setattr(ray_tasks, "cores", lambda: 64)
        monkeypatch.setattr(ray_tasks, "cores_each", lambda tasks: counts.append(tasks) or 1)
        run = lambda task, done, poll=no_poll: ray_tasks.run(task, done, poll, 1, lambda event: None)  # noqa: E731
        return SimpleNamespace(run=run), counts

    return make


def test_a_task_that_is_lost_too_often_is_a_users_error(ray_tasks_alone):
    config, message = tiny_config("unused"), r"evaluate: processes were lost more often than cluster\.max_failures = 3"

    def failing(error):
        def wait(running, timeout):
            raise error

        return ray_tasks_alone(wait)[0]

    job = evaluate.jobs(config)[0]
    with pytest.raises(WorkersLost, match=message):
        tasks.evaluate(failing(LOST()), config, [job], FOLDERS, lambda row: None)
    with pytest.raises(KeyError):
        tasks.evaluate(failing(KeyError("a defect")), config, [job], FOLDERS, lambda row: None)


def test_the_loss_behind_the_failures_of_a_group_is_found():
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = ray.exceptions.ActorDiedError()
    failures = {0: RuntimeError("Connection closed by peer"), 1: WorkerHealthCheckFailedError("no answer", lost)}
    assert train_group._lost(WorkerGroupError("", failures)) is lost
    assert train_group._lost(lost) is lost
    assert train_group._lost(WorkerGroupError("", {0: RuntimeError("a defect")})) is None


@pytest.mark.parametrize("kind", [Unreachable, UserError])
def test_the_error_of_a_worker_is_one_of_the_same_kind_in_the_driver(kind):
    error = train_group.error_of(train_group.note_of(kind("s3://b/run: writing x failed: no network")))
    assert (type(error), str(error)) == (kind, "s3://b/run: writing x failed: no network")


def test_a_storage_that_refuses_meanwhile_ends_no_distillation(monkeypatch):
    """The note of who works is read to say that workers were lost, and for nothing else."""

    def read(name, retry_seconds):
        assert retry_seconds == 0.0
        answer = next(answers)
        if answer is None:
            raise Unreachable("503 SlowDown")
        return answer

    monkeypatch.setattr(train_group, "FOLLOW", -1.0)
    answers, lines = iter(["one group", None, "one group", None, "another group"]), []
    look = train_group._noticing(
        SimpleNamespace(read=read, remote=True), lambda: lines.append("log"), lambda: lines.append("lost")
    )
    for _ in range(5):
        look()
    assert lines == ["log"] * 4 + ["lost", "log"]


def test_progress_resets_the_failure_count(monkeypatch):
    """Two attempts make progress before they lose too many workers, the third does not."""
    done, lines = iter([0, 6, 6, 8, 8, 8]), []

    def attempt(group, sharing, say):
        raise WorkersLost("distill: processes were lost more often than 3 (killed)")

    monkeypatch.setattr(train_group, "_attempt", attempt)
    with pytest.raises(WorkersLost):
        train_group.run(SimpleNamespace(saved=lambda: next(done)), 1, lines.append)
    message = "  progress was made; resetting the failure count (distill: processes were lost more often than 3)"
    assert lines == [message] * 2
    monkeypatch.setattr(train_group, "_attempt", lambda group, sharing, say: None)
    assert train_group.run(SimpleNamespace(saved=lambda: 0), 1, lines.append) is None


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


def test_the_cores_of_an_evaluation_are_those_of_all_its_jobs(ray_tasks_alone):
    """So the rest of an interrupted stage ends as it would have."""
    config = tiny_config("unused")
    on_ray, counts = ray_tasks_alone()
    tasks.evaluate(on_ray, config, [], FOLDERS, lambda row: None)
    assert counts == [len(evaluate.jobs(config))] == [4]


def test_lines_that_replace_dropped_ones_are_all_reported(tmp_path):
    """Workers that resume from step 1 drop the line of step 2 and write a longer one before the next read."""
    path, lines = tmp_path / "metrics.jsonl", []
    old = '{"step": 0, "held": "before"}\n{"step": 1, "loss": 1.0}\n'
    path.write_text(old, encoding="utf-8")
    tail = LogTail(path, lines.append)
    path.write_text(old + '{"step": 2, "loss": 1.0}\n{"step": 3, "lo', encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2], "earlier lines and incomplete lines are not reported"
    hold = '{"step": 1, "held": "a line that is longer than what it replaces"}\n'
    path.write_text(old + hold, encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1]
    path.write_text(old + hold + '{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1, 2]
    path.write_text(old, encoding="utf-8")
    tail.read()
    assert [line["step"] for line in lines] == [2, 0, 1, 1, 2, 0, 1], "the log is shorter than before"


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

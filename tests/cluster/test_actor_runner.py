"""ActorRunner: the actors it keeps, lost processes, and points that run on it."""

from __future__ import annotations

import json
from pathlib import Path

import point_bodies
import pytest
from conftest import tiny_config
from rich.console import Console

from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner, PointTask

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def runner(ray_session, tmp_path_factory):
    """One runner for all tests: starting its actors takes seconds."""
    from distill_at_scale.cluster.actor_runner import ActorRunner

    config = tiny_config(tmp_path_factory.mktemp("runner"), cluster__address=None, cluster__max_failures=1)
    runner = ActorRunner(config, lambda line: None)
    yield runner
    runner.close()
    assert ray.is_initialized(), "a Ray that was there before stays"


@pytest.fixture
def run(runner, tmp_path):
    """run(body, count): the error of each point by its number, None where it succeeded."""

    def run(body, count=1, **keys):
        tasks = [
            PointTask(tiny_config(tmp_path / str(k), cluster__address=None), f"point {k}", **keys) for k in range(count)
        ]
        errors = {}
        runner.run(tasks, body, lambda index, last, error: errors.update({index: error}))
        return errors

    return run


def processes(folder) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in Path(folder).glob("*.pid")}


def test_points_run_in_as_many_processes_as_there_are_cores_and_these_stay(run, tmp_path):
    assert run(point_bodies.process, 8) == dict.fromkeys(range(8))
    first = processes(tmp_path)
    run(point_bodies.process, 8)
    second = processes(tmp_path)
    assert len(first) == len(second) == 8
    assert set(second.values()) <= set(first.values())
    assert len(set(first.values())) <= 2


def test_an_actor_has_one_thread(run, tmp_path):
    run(point_bodies.threads)
    assert (tmp_path / "0.threads").read_text(encoding="utf-8") == "1"


def test_finished_points_do_not_run(run, tmp_path):
    assert run(point_bodies.process, 2, finished=True) == {0: None, 1: None}
    assert not processes(tmp_path)


@pytest.mark.parametrize(
    ("body", "error"), [(point_bodies.user_error, UserError), (point_bodies.diverged, DistillationDiverged)]
)
def test_errors_come_back_as_they_were_and_do_not_end_the_other_points(run, body, error):
    errors = run(body, 3)
    assert [type(errors[index]) for index in range(3)] == [error] * 3
    assert getattr(errors[0], "visit", 3) == 3


def test_an_error_of_the_callback_ends_the_run(runner, tmp_path):
    def done(index, last, error):
        raise error

    task = PointTask(tiny_config(tmp_path / "0", cluster__address=None), "point 0")
    with pytest.raises(UserError, match="bad key"):
        runner.run([task], point_bodies.user_error, done)


def test_a_point_whose_actor_is_lost_runs_again(run, tmp_path):
    assert run(point_bodies.dies_once, 3) == dict.fromkeys(range(3))
    assert set(processes(tmp_path)) == {"0", "1", "2"}
    assert (tmp_path / "died").exists()


def test_a_point_that_always_kills_its_actor_is_given_up_with_its_name(run):
    errors = run(point_bodies.dies)
    assert isinstance(errors[0], UserError)
    assert str(errors[0]).startswith("point 0: its worker was lost 2 times")


def test_actors_make_room_for_the_ordinary_executor_and_come_back(runner, run, tmp_path):
    run(point_bodies.process)
    before = set(processes(tmp_path).values())
    executor = runner.executor()
    ready = ray.remote(num_cpus=2)(lambda: True)
    assert ray.get(ready.remote(), timeout=60)
    executor.close()
    run(point_bodies.process)
    assert before.isdisjoint(processes(tmp_path).values())


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """The run folder of the point sets. Ingest and scores are made without Ray, which is quicker."""
    folder = tmp_path_factory.mktemp("pooled") / "run"
    PointSet(tiny_config(folder, cluster__address=None), LocalRunner(), Display.silent()).shared({})
    return folder


def points() -> list[Point]:
    return [Point({"select.keep": keep}, seed) for keep in (0.3, 1.0) for seed in (0, 1)]


@pytest.mark.slow
def test_points_in_actors_equal_those_of_this_process_and_run_once(runner, pooled, tmp_path):
    display = Display(Console(quiet=True))
    config = tiny_config(pooled, cluster__address=None)
    point_set = PointSet(config, runner, display)
    outcomes = point_set.run([*points(), points()[0]])
    assert [outcome.kept for outcome in outcomes[::2]] == [outcomes[0].kept, outcomes[0].of, outcomes[0].kept]
    assert outcomes[0].kept < outcomes[0].of
    for outcome in outcomes:
        for stage in ("ingest", "score"):
            record = json.loads((outcome.folder / "stages" / f"{stage}.json").read_text(encoding="utf-8"))
            assert "/shared/" in record["reused_from"]
        assert (outcome.folder / "prepared").is_symlink()
    records = {path: path.stat().st_mtime_ns for path in (pooled / "points").glob("*/stages/*.json")}
    again = PointSet(config, runner, display).run(points())
    assert [outcome.accuracy() for outcome in again] == [outcome.accuracy() for outcome in outcomes[:4]]
    assert {path: path.stat().st_mtime_ns for path in records} == records
    alone = PointSet(tiny_config(tmp_path / "alone"), LocalRunner(), display).run(points())
    assert [outcome.accuracy() for outcome in alone] == [outcome.accuracy() for outcome in again]


@pytest.mark.slow
def test_a_point_that_fails_is_named_by_its_overrides(runner, pooled):
    config = tiny_config(pooled, cluster__address=None)
    point_set = PointSet(config, runner, Display(Console(quiet=True)))
    with pytest.raises(UserError, match=r"the point \[select.keep=0.3 evaluate.lr=1e\+38\], repetition 1: .*diverged"):
        point_set.run([Point({"select.keep": 0.3, "evaluate.lr": 1e38}, 1)])


def test_an_override_that_is_not_allowed_is_refused_before_anything_starts(runner, tmp_path):
    point_set = PointSet(tiny_config(tmp_path / "run", cluster__address=None), runner, Display(Console(quiet=True)))
    with pytest.raises(UserError, match=r"select\.kep"):
        point_set.run([points()[0], Point({"select.kep": 0.3})])
    assert not (tmp_path / "run" / "shared").exists()

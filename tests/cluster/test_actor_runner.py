"""The pool of warm actors: what it calls, what it keeps, what it does about lost processes; points on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm_calls
from conftest import tiny_config
from rich.console import Console

from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.runners import LocalRunner, PooledRunner

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def pool(tmp_path):
    from distill_at_scale.cluster.actor_runner import ActorRunner

    with ActorRunner(tiny_config(tmp_path, cluster__address=None, cluster__max_failures=1), lambda line: None) as pool:
        yield pool
    assert ray.is_initialized(), "a Ray that was there before stays"


def test_calls_are_made_by_as_many_processes_as_there_are_cores_and_these_stay(pool):
    first = dict(pool.map(warm_calls.process, [{"value": k} for k in range(8)]))
    second = dict(pool.map(warm_calls.process, [{"value": k} for k in range(8)]))
    assert {k: value for k, (value, _) in first.items()} == {k: 2 * k for k in range(8)}
    assert {pid for _, pid in second.values()} <= {pid for _, pid in first.values()}
    assert len({pid for _, pid in first.values()}) <= 2


def test_an_actor_has_one_thread(pool):
    assert [found for _, found in pool.map(warm_calls.threads, [{}])] == [1]


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("diverged", DistillationDiverged)])
def test_errors_come_back_as_they_were(pool, kind, error):
    with pytest.raises(UserError) as caught:
        list(pool.map(warm_calls.raises, [{"kind": kind}]))
    assert type(caught.value) is error
    assert getattr(caught.value, "visit", 3) == 3


def test_a_call_whose_actor_is_lost_is_made_again(pool, tmp_path):
    calls = [{"marker": str(tmp_path / "died"), "value": k} for k in range(3)]
    assert dict(pool.map(warm_calls.dies_once, calls)) == {0: 0, 1: 1, 2: 2}
    assert (tmp_path / "died").exists()


def test_a_call_that_always_kills_its_actor_is_given_up_with_its_name(pool):
    with pytest.raises(UserError, match="the fatal one: its worker was lost 2 times"):
        list(pool.map(warm_calls.dies, [{}], ["the fatal one"]))


def test_actors_make_room_for_the_ordinary_executor_and_come_back(pool):
    before = {pid for _, (_, pid) in pool.map(warm_calls.process, [{"value": 1}])}
    executor = pool.executor()
    ready = ray.remote(num_cpus=2)(lambda: True)
    assert ray.get(ready.remote(), timeout=60)
    executor.close()
    assert before.isdisjoint(pid for _, (_, pid) in pool.map(warm_calls.process, [{"value": 1}]))


def points() -> list[Point]:
    return [Point({"select.keep": keep}, seed) for keep in (0.3, 1.0) for seed in (0, 1)]


def test_points_in_actors_are_those_of_this_process_and_are_tried_once(pool, tmp_path):
    display = Display(Console(quiet=True))
    config = tiny_config(tmp_path / "pooled", cluster__address=None)
    runner = PooledRunner(config, display, pool)
    found = runner.run([*points(), points()[0]])
    assert [outcome.kept for outcome in found[::2]] == [found[0].kept, found[0].of, found[0].kept]
    assert found[0].kept < found[0].of
    records = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "pooled" / "points").glob("*/stages/*.json")}
    again = PooledRunner(config, display, pool).run(points())
    assert [outcome.accuracy() for outcome in again] == [outcome.accuracy() for outcome in found[:4]]
    assert {path: path.stat().st_mtime_ns for path in records} == records
    alone = LocalRunner(tiny_config(tmp_path / "alone"), display).run(points())
    assert [outcome.accuracy() for outcome in alone] == [outcome.accuracy() for outcome in again]


def test_ingest_and_scores_are_read_by_points_not_made(pool, tmp_path):
    runner = PooledRunner(tiny_config(tmp_path / "run", cluster__address=None), Display(Console(quiet=True)), pool)
    for outcome in runner.run(points()[:2]):
        for stage in ("ingest", "score"):
            record = json.loads((outcome.folder / "stages" / f"{stage}.json").read_text())
            assert "/shared/" in record["reused_from"]
        assert (outcome.folder / "prepared").is_symlink()


def test_a_point_that_fails_is_named_by_its_overrides(pool, tmp_path):
    config = tiny_config(tmp_path / "run", cluster__address=None)
    runner = PooledRunner(config, Display(Console(quiet=True)), pool)
    with pytest.raises(UserError, match=r"the point \[select.keep=0.3 evaluate.lr=1e\+38\], repetition 1: .*diverged"):
        runner.run([Point({"select.keep": 0.3, "evaluate.lr": 1e38}, 1)])


def test_an_override_that_is_not_allowed_is_refused_before_anything_starts(pool, tmp_path):
    runner = PooledRunner(tiny_config(tmp_path / "run", cluster__address=None), Display(Console(quiet=True)), pool)
    with pytest.raises(UserError, match=r"select\.kep"):
        runner.run([points()[0], Point({"select.kep": 0.3})])
    assert not (tmp_path / "run" / "shared").exists()

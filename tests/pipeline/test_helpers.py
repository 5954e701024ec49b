"""Long units without Ray: threads of a unit, helper processes on free cores, errors and losses in them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import helper_workers
import pytest
import torch

from distill_at_scale.core import environment
from distill_at_scale.core.errors import UserError
from distill_at_scale.pipeline.executors import helpers, local
from distill_at_scale.pipeline.executors.base import Task, Unit
from distill_at_scale.pipeline.executors.local import LocalExecutor, threads_each
from distill_at_scale.pruning.proxies.train import ProxyTrial


@pytest.fixture
def work(make_config, tmp_path, monkeypatch):
    """work(fates, busy): the results of long units on two cores, of which other programs use `busy`, and what was said."""
    monkeypatch.setattr(local, "local_cores", lambda: 2)
    monkeypatch.setattr(helpers, "START", 0.1)

    def run(fates: list[str], busy: float = 0.0) -> tuple[list[dict[str, int]], list[str]]:
        began = time.monotonic()
        monkeypatch.setattr(helpers, "busy_seconds", lambda: busy * (time.monotonic() - began) + time.process_time())
        lines, results = list[str](), list[dict[str, int]]()
        units = [Unit(each) for each in enumerate(fates)]
        paths = {"driver": Path(str(os.getpid())), "started": tmp_path / "started"}
        task = Task(helper_workers.Helped, make_config(tmp_path), paths, units, total=len(units))

        def say(line: str) -> None:
            lines.append(line)
            if "in one process" in line:  # no helper will come
                paths["started"].touch()

        LocalExecutor(torch.device("cpu"), say).run(task, results.append)
        return sorted(results, key=lambda result: result["number"]), lines

    return run


def test_units_run_side_by_side_on_free_cores(work):
    results, lines = work(["done"] * 6)
    assert [result["number"] for result in results] == list(range(6))
    assert len({result["pid"] for result in results}) == 2
    assert {result["threads"] for result in results} == {1}
    assert lines[0].startswith("  long work: in 2 processes with one thread each; other programs use 0.0 of 2 cores")


def test_beside_busy_programs_one_process_does_all(work):
    results, lines = work(["done"] * 3, busy=1.8)
    assert {result["pid"] for result in results} == {os.getpid()}
    assert re.fullmatch(r"  long work: in one process, because other programs use 1\.[789] of 2 cores", lines[0])


def test_a_single_unit_gets_no_helper(work):
    results, lines = work([""])
    assert (results[0]["threads"], results[0]["pid"], lines) == (2, os.getpid(), [])


@pytest.mark.parametrize("fate", ["killed", "unreadable"])
def test_the_unit_of_a_lost_helper_is_done_here(work, fate):
    results, lines = work([fate] * 4)
    assert [result["number"] for result in results] == list(range(4))
    assert any("exit code -9; its work is done again in this process" in line for line in lines)


def test_an_error_in_a_helper_is_the_error_of_the_work(work):
    with pytest.raises(UserError, match=r"^unit \d cannot be done$"):
        work(["error"] * 6)


def test_threads_follow_from_the_cores_and_all_units():
    assert [threads_each(units, 8) for units in (1, 2, 3, 8, 100)] == [8, 4, 2, 1, 1]


def test_proxies_of_helpers_have_the_same_bytes(make_run, digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "local_cores", lambda: 2)
    monkeypatch.setattr(helpers, "START", 0.0)
    monkeypatch.setattr(helpers, "busy_seconds", lambda: None)
    train = ProxyTrial.run

    def slow(trial, *callbacks):
        time.sleep(1)  # for the helper to start
        train(trial, *callbacks)

    monkeypatch.setattr(ProxyTrial, "run", slow)
    run = make_run(tmp_path / "run", score__trials=2)
    lines: list[str] = []
    run.pipeline.context.make_executor = lambda: LocalExecutor(torch.device("cpu"), lines.append)
    run.stages("ingest", "score")
    assert "training of proxies: in 2 processes" in lines[0]
    assert (run.dir / "scores.parquet").read_bytes() == (digits_run.dir / "scores.parquet").read_bytes()


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("max 100000", 4), ("1000 100000", 1), ("", 4)])
def test_a_container_lends_a_share_of_the_cores(monkeypatch, text, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text if path.name == "cpu.max" else "-1")
    assert environment.usable_cores() == cores


def test_busy_seconds_of_these_cores_grow_with_work():
    before, began = environment.busy_seconds(), time.process_time()
    if before is None:
        pytest.skip("this system does not say how busy its cores are")
    while time.process_time() - began < 0.3:
        pass
    assert environment.busy_seconds() - before > 0.2

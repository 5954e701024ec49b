"""Every stage is struck while it works, on real Ray nodes in network namespaces; the whole matrix has the mark chaos."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT

pytest.importorskip("ray")
sys.path.append(str(ROOT))  # jobs are scripts, and not installed
from jobs.faults import hosts
from jobs.faults.bench import Bench
from jobs.faults.cells import STAGES, Cells, Result
from jobs.faults.faults import FAULTS

pytestmark = pytest.mark.xdist_group("hosts")
FAST = {
    "ingest": "actor",
    "score": "actor",
    "select": "driver",
    "distill": "actor",
    "evaluate": "actor",
    "sweep": "actor",
}
SMALL = (
    'data.classes=["0","1","2"]', "score.trials=1", "score.epochs=2", "distill.workers=1", "distill.steps=120",
    "evaluate.seeds=2", "evaluate.epochs=40", 'sweep.space={"select.keep": [0.3]}', "sweep.controls=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    if reason := hosts.possible():
        pytest.skip(f"hosts cannot be made here: {reason}")
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="module")
def small(bench) -> Cells:
    """The undisturbed run is made without Ray, where one worker ends with the same bytes."""
    return Cells(bench, print, SMALL, alone=True)


@pytest.fixture(scope="module")
def full(bench) -> Cells:
    return Cells(bench, print)


def held(result: Result) -> None:
    assert (result.verdict, result.reasons) == ("ok", []), result


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fault"), FAST.items())
def test_a_stage_survives_and_ends_with_the_same_bytes(small, stage, fault):
    small.prepare([stage])
    held(small.run(stage, fault))


@pytest.mark.chaos
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_matrix(full, stage, fault):
    full.prepare([stage])
    result = full.run(stage, fault)
    if result.verdict == "n/a":
        pytest.skip(result.reasons[0])
    held(result)

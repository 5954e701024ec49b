"""The plan: the estimates of every stage before a run, errors with advice, and predictions next to measured times."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import TINY, tiny_config
from plan_cases import FACTS, GB, MACHINE, layout, measure_quickly, planners

import distill_at_scale as das
from distill_at_scale import cli
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.dry_run import DryRun, Rate
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate, finish
from distill_at_scale.pruning.selection import quotas

EVERY = ["ingest", "score", "select", "distill", "evaluate", "report"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)


@pytest.fixture
def planner(tmp_path):
    with planners(tmp_path) as make:
        yield make


def estimate(stage: str = "distill", **fields) -> StageEstimate:
    return StageEstimate(**{"stage": stage, "parts": {"steps": 60.0}, **fields})


def test_a_plan_has_every_stage_and_is_published_and_kept_beside_the_actual_seconds(tmp_path, make_run):
    run = make_run(tmp_path / "run", evaluate__controls=["unpruned", "random_keep"])
    plan = run.pipeline.forecast()
    assert [one.stage for one in plan.stages] == EVERY
    assert all(0 < one.low <= one.seconds <= one.high and one.host > 0 and one.actual is None for one in plan.stages)
    assert list(plan.stages[4].parts) == ["train and test", "open", "distil unpruned", "distil random_keep"]
    written = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert list(written["stages"]) == EVERY
    assert written["total"]["seconds"] == pytest.approx(plan.seconds)
    assert not (tmp_path / "run" / "prepared").exists()

    run.stages("ingest", "score", "select")
    again = make_run(tmp_path / "run", evaluate__controls=["unpruned", "random_keep"]).pipeline.forecast()
    for before, after in zip(plan.stages[:3], again.stages[:3], strict=True):
        record = json.loads((tmp_path / "run" / "stages" / f"{after.stage}.json").read_text(encoding="utf-8"))
        assert (after.actual, after.before) == (record["seconds"], True)
        assert after.seconds == pytest.approx(before.seconds)
        assert after.off == pytest.approx(before.seconds / record["seconds"] - 1)
    assert [one.actual for one in again.stages[3:]] == [None, None, None]


def test_stages_that_are_done_without_a_plan_or_for_another_configuration(digits_run, make_run, tmp_path):
    shutil.copytree(digits_run.dir, tmp_path / "run")
    (tmp_path / "run" / "plan.json").unlink(missing_ok=True)
    run = make_run(tmp_path / "run", select__keep=0.5)
    plan = run.pipeline.forecast()
    assert "holds the output of select for another configuration" in run.text
    assert {one.stage: one.before for one in plan.stages} == {**dict.fromkeys(EVERY[2:], True), "score": False}
    assert [one.stage for one in plan.stages if one.actual is not None] == ["score"]


def test_known_counts_come_from_the_listing_and_from_the_prepared_set_alike(digits_run):
    config, folder = digits_run.config, digits_run.dir
    listed = validate.planned(config, ingest.plan(config))
    prepared = validate.known(config, PreparedDataset(folder / "prepared"), folder / "manifest.parquet")
    assert (listed.counts, listed.kept, listed.tests) == (prepared.counts, prepared.kept, prepared.tests)


@pytest.mark.parametrize(
    ("units", "starts", "expected"),
    [([2.0, 2.0, 2.0], [0.0], 6.0), ([2.0, 2.0, 2.0], [0.0, 0.0], 4.0), ([2.0, 2.0, 2.0], [0.0, 3.0], 5.0)],
)
def test_each_process_takes_the_next_unit(units, starts, expected):
    assert finish(units, starts) == expected


@pytest.fixture
def rates(monkeypatch):
    """A second for each step, epoch and pass of a sample; a hundredth to test a sample."""
    monkeypatch.setattr(DryRun, "ready", lambda self, kept: Rate.fixed(1.0))
    monkeypatch.setattr(DryRun, "steps", lambda *_: Rate.fixed(1.0))

    def trainings(self):
        rate = replace(Rate.fixed(1.0), last=self.measured.tests / 100)
        return {f"evaluate {name} convnet": rate for name in ("distilled", "kept", "full")} | {"rest": Rate.fixed(0.0)}

    monkeypatch.setattr(Planner, "_trainings", trainings)
    scoring = dict.fromkeys(("train a proxy", "score", "rest"), Rate.fixed(1.0))
    monkeypatch.setattr(DryRun, "stage", lambda *_, **keys: scoring)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 1.35), (2, 0.675)])
def test_renewals_of_the_kept_samples_rate_a_part_of_the_data_each(planner, rates, workers, seconds):
    keys = {"distill__method": "dm", "distill__steps": 10, "distill__workers": workers, "cluster__address": None}
    made = planner(tiny_config("x", **keys, select__refresh=3, select__refresh_pool=0.5))
    # after steps 3, 6 and 9, of half of 90 samples
    assert made.distill().parts["renew the kept samples"] == pytest.approx(seconds)
    assert "renew the kept samples" not in planner(tiny_config("x", **keys)).distill().parts


def test_infobatch_shortens_the_trainings_on_real_data_alone(planner, rates, monkeypatch):
    def trained(method, **keys):
        config = tiny_config("x", distill__method=method, **{f"distill__{method}__{key}": v for key, v in keys.items()})
        return next(iter(planner(config).distill().parts.values()))

    every = {
        "mtt": {"experts": 1, "expert_epochs": 20, "max_start": 1},
        "rded": {"teacher_epochs": 20, "teacher_network": "convnet_bn"},
    }
    for (method, keys), key in zip(every.items(), ("expert_infobatch", "teacher_infobatch"), strict=True):
        assert trained(method, **keys) == pytest.approx(20 * sum(FACTS.kept))
        assert trained(method, **keys, **{key: 0.5}) == pytest.approx(0.72 * 20 * sum(FACTS.kept))

    epochs = []
    monkeypatch.setattr(Planner, "_units", lambda self, name, units, spread: epochs.append([n for n, _ in units]) or [])
    for drop in (0.0, 0.5):
        keys = {"evaluate__bounds": ["kept", "full"], "evaluate__bound_epochs": 20, "evaluate__bound_infobatch": drop}
        made = planner(tiny_config("x", **keys, evaluate__seeds=1, score__epochs=20, score__infobatch=drop))
        made.evaluate()
        made.score()
        dry = made.measured.config
        assert dry.evaluate.bound_infobatch == dry.score.infobatch == 0, "the dry run measures whole epochs"
    assert np.divide(epochs[2], epochs[0]) == pytest.approx([1, 1, 0.72, 0.72])  # distilled, random_real, kept, full
    assert np.divide(epochs[3], epochs[1]) == pytest.approx([0.72, 0.72])  # two trials


def test_other_programs_are_named_and_ray_s_start_is_counted_once(planner, monkeypatch, tmp_path):
    config = tiny_config("x", cluster__address=None)
    planned = planner(config)
    monkeypatch.setattr(plans, "other_programs", lambda seconds: 1.3)
    monkeypatch.setattr(plans, "DryRun", lambda *_: planned.measured)
    for name in EVERY:
        monkeypatch.setattr(Planner, name, lambda self, name=name: estimate(name))
    plan = plans.make(config, FACTS, MACHINE, tmp_path / "plan.json", {"ingest": {"seconds": 1.0}}, lambda stage: None)
    assert plan.load == "other programs use 1.3 of 4 cores now: the times hold for this load"
    assert plan.load in "\n".join(plans.remarks(plan))
    starts = {one.stage: one.parts["start"] for one in plan.stages if "start" in one.parts}
    assert starts == {"score": RAY * START}


@pytest.mark.parametrize(
    ("fields", "machine", "message"),
    [
        ({"host": 20 * GB}, {}, r"distill needs about 20\.0 GB of memory.*lower distill\.ipc"),
        ({"host": 5 * GB, "processes": 4}, {}, r"in each of 4 processes"),
        ({"device": 30 * GB}, {"gpus": 1, "gpu_memory": 24 * GB}, r"30\.0 GB of GPU memory, a worker has 24\.0 GB"),
        ({"disk": 80 * GB, "at_peak": 30 * GB}, {}, r"110\.0 GB on the run folder's disk \(most in distill\).*set run\.dir"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_the_key_to_change(fields, machine, message):
    config = tiny_config("x", cluster__address=None)
    there = layout(config, replace(MACHINE, **machine))
    plan = plans.RunPlan([], plans.problems(config, there, [estimate(**fields)]))
    with pytest.raises(UserError, match=message):
        plan.refuse()
    plans.RunPlan([], plans.problems(config, there, [estimate(host=GB, disk=GB)])).refuse()


def test_what_cannot_fit_by_its_size_is_not_measured(tmp_path, planner, monkeypatch):
    config = tiny_config("x", evaluate__bounds=["full"])
    monkeypatch.setattr(DryRun, "_measure", None)
    large = replace(FACTS, counts=[10**9] * 3)
    plan = plans.make(config, large, replace(MACHINE, disk=10**15), tmp_path / "plan.json", {}, lambda stage: None)
    assert any("evaluate needs about" in line for line in plan.problems)
    assert plan.stages == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distill__workers": 9}, "distill.workers = 9 needs 9 cores, this machine has 4"),
        ({"score__workers": 8}, "score.workers = 8 needs"),
        ({"cluster__gpus_per_worker": 1.0}, "cluster.gpus_per_worker = 1, this machine has 0 GPUs"),
    ],
)
def test_workers_that_find_no_place_are_refused(overrides, message):
    config = tiny_config("x", **{"cluster__address": None, **overrides})
    assert any(message in line for line in plans.problems(config, layout(config), []))
    assert plans.problems(config, layout(tiny_config("x")), []) == []


def test_a_plan_is_for_the_cluster_that_the_environment_names(monkeypatch):
    class Planned(Exception):
        pass

    def make_pipeline(config, display):
        raise Planned(config.cluster.address)

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(das, "make_pipeline", make_pipeline)
    for address, expected in ((None, "head:6379"), ("none", "none")):
        with pytest.raises(Planned, match=expected):
            das.plan_run(tiny_config("x", cluster__address=address), Display.silent())


def test_kept_samples_are_expected_by_rate_and_number_and_at_least_the_images_of_a_class():
    def kept(counts, minimum, **keys):
        return quotas.expected(tiny_config("x", **{f"select__{k}": v for k, v in keys.items()}).select, minimum, counts)

    assert kept([100, 20, 3], 5, keep=0.1) == [10, 5, 3]
    assert kept([100, 5], 2, per_class=7) == [7, 5]
    assert kept([100, 5], 2, keep="auto") == [100, 5]


def test_more_images_than_samples_are_refused(tmp_path, make_run):
    with pytest.raises(UserError, match=r"fewer than distill\.ipc = 500"):
        make_run(tmp_path / "run", distill__method="dm", distill__ipc=500).pipeline.forecast()


def test_the_command_prints_the_table_with_costs_and_refuses_what_does_not_fit_with_two(tmp_path, capsys, monkeypatch):
    path, small = tmp_path / "tiny.yaml", replace(MACHINE, memory=2**20)
    path.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}), encoding="utf-8")
    assert cli.main(["plan", str(path), "cluster.price=2.0"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in (*EVERY, "cost"))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["total"]["cost"] == pytest.approx(plan["total"]["seconds"] / 3600 * 2)
    monkeypatch.setattr("distill_at_scale.pipeline.pipeline.this_machine", lambda folder: small)
    assert cli.main(["plan", str(path)]) == 2
    assert "this run does not fit here" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["problems"]

"""The plan: the estimates of every stage before a run, errors with advice, and predictions next to measured times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import tiny_config

from distill_at_scale import cli
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import Cost, Method
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.planning import dry_data, forecast, memory
from distill_at_scale.pipeline.planning import facts as known
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.dry_run import DryRun, Rate, rate
from distill_at_scale.pipeline.planning.estimates import Planner, StageEstimate, finish
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pipeline.planning.machine import ClusterLayout, Machine, Spread
from distill_at_scale.pipeline.planning.measurements import Measurements

CPU = torch.device("cpu")
GB = 10**9
MACHINE = Machine(cores=4, memory=16 * GB, gpus=0, gpu_memory=0, disk=100 * GB)
FACTS = Facts((1, 8, 8), [f"c{k}" for k in range(20)], [30] * 20, [6] * 20, 50, False, 16, "images")
EVERY = ["ingest", "score", "select", "distill", "evaluate", "report"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measurements of a few milliseconds in one process: these tests do not look at how good they are."""
    monkeypatch.setattr("distill_at_scale.pipeline.planning.dry_run.SECONDS", 0.01)
    monkeypatch.setattr("distill_at_scale.pipeline.planning.measurements.OTHERS", 0)


def estimate(stage: str = "distill", **fields) -> StageEstimate:
    return StageEstimate(**{"stage": stage, "parts": {"steps": 60.0}, **fields})


@pytest.fixture
def planner(tmp_path):
    """Planners of configurations, on prepared data of made-up samples in the shape of their facts."""
    made = []

    def make(config, facts: Facts = FACTS) -> Planner:
        folder = tmp_path / f"data{len(made)}"
        write_samples(folder, facts)
        measured = Measurements(config, facts, layout(config), PreparedDataset(folder))
        made.append(measured)
        return Planner(config, facts, layout(config), measured)

    yield make
    for measured in made:
        measured.close()


def write_samples(folder: Path, facts: Facts) -> None:
    tensors, each = facts.kind == "tensors", 8
    pixels = np.random.default_rng(0).integers(0, 255, (each * facts.classes, *facts.shape), np.uint8)
    pixels = pixels.astype(np.float32) if tensors else pixels
    labels = np.repeat(np.arange(facts.classes), each)
    table = shards.to_table([f"{k:06d}" for k in range(len(labels))], labels, pixels)
    for split in ("train", "test"):
        shards.write_shards(folder / split, [table], table.schema, 4)
    channels = NetworkSpec("", facts.shape, 2, kind=facts.kind).channel_shape[0]
    counts = {split: [each] * facts.classes for split in ("train", "test")}
    meta = {"class_names": facts.class_names, "shape": list(facts.shape), "counts": counts, "kind": facts.kind,
            "mean": [0.5] * channels, "std": [0.25] * channels, "chunk": 16}  # fmt: skip
    shards.write_meta(folder, meta, "made up")


def layout(config=None, machine: Machine = MACHINE) -> ClusterLayout:
    return ClusterLayout(config or tiny_config("x", cluster__address=None), machine)


def test_a_plan_has_every_stage_and_is_published(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    plan = run.pipeline.forecast()
    assert [row.estimate.stage for row in plan.rows] == EVERY
    assert all(row.estimate.seconds > 0 and row.estimate.host > 0 and row.actual is None for row in plan.rows)
    written = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert list(written["stages"]) == EVERY
    assert written["total"]["seconds"] == pytest.approx(plan.seconds, abs=0.01)
    assert not (tmp_path / "run" / "prepared").exists()


def test_a_control_costs_a_distillation_of_its_own(tmp_path, make_run):
    both = make_run(tmp_path / "run", evaluate__controls=["unpruned", "random_keep"]).pipeline.forecast()
    (row,) = (row for row in both.rows if row.estimate.stage == "evaluate")
    assert list(row.estimate.parts) == ["train and test", "distil unpruned", "distil random_keep"]
    assert all(seconds > 0 for seconds in row.estimate.parts.values())
    alone = make_run(tmp_path / "alone", select__keep=1.0, evaluate__controls=["unpruned"]).pipeline.forecast()
    assert list(alone.rows[4].estimate.parts) == ["train and test"]


def test_after_a_run_predictions_are_shown_next_to_measured_times(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    before = {row.estimate.stage: row.estimate.seconds for row in run.pipeline.forecast().rows}
    run.stages("ingest", "score", "select")
    after = make_run(tmp_path / "run").pipeline.forecast()
    for row in after.rows[:3]:
        record = json.loads((tmp_path / "run" / "stages" / f"{row.estimate.stage}.json").read_text(encoding="utf-8"))
        assert row.actual == record["seconds"]
        assert row.before
        assert row.estimate.seconds == pytest.approx(before[row.estimate.stage])
        assert row.off == pytest.approx(row.estimate.seconds / row.actual - 1)
    assert [row.actual for row in after.rows[3:]] == [None, None, None]


def test_a_prediction_made_after_the_run_is_marked(digits_run, tmp_path):
    import shutil

    shutil.copytree(digits_run.dir, tmp_path / "run")
    config = tiny_config(tmp_path / "run")
    (tmp_path / "run" / "plan.json").unlink(missing_ok=True)
    records = {"select": json.loads((tmp_path / "run" / "stages" / "select.json").read_text(encoding="utf-8"))}
    data = PreparedDataset(tmp_path / "run" / "prepared")
    facts = known.of_prepared(config, data, tmp_path / "run" / "manifest.parquet")
    plan = forecast.make(config, facts, MACHINE, tmp_path / "run" / "plan.json", records, lambda stage: None, data)
    assert {row.estimate.stage: row.before for row in plan.rows}["select"] is False


def test_output_of_another_configuration_is_not_taken_for_this_one(digits_run, make_run, tmp_path):
    import shutil

    shutil.copytree(digits_run.dir, tmp_path / "run")
    run = make_run(tmp_path / "run", select__keep=0.5)
    plan = run.pipeline.forecast()
    assert "holds the output of select for another configuration" in run.text
    assert {row.estimate.stage for row in plan.rows if row.actual is not None} <= {"ingest", "score"}


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_can_be_planned(method, planner):
    teacher = {"teacher_network": "convnet_bn"}  # of 8 x 8 pixels
    config = tiny_config(
        "x", distill__method=method, runtime__rule="loss", distill__sre2l=teacher, distill__rded=teacher
    )
    made = planner(config)
    assert made.distill().parts["steps"] > 0
    assert made.evaluate().seconds > 0


def test_clips_can_be_planned(planner):
    facts = replace(FACTS, shape=(4, 3, 8, 8), kind="clips")
    config = tiny_config("x", distill__method="dm", distill__network="convnet3d", score__network="convnet3d",
                         evaluate__networks=["convnet3d"], data__frames=4)  # fmt: skip
    made = planner(config, facts)
    assert all(0 < plan.low < plan.seconds < plan.high for plan in (made.score(), made.distill(), made.evaluate()))


def test_known_counts_come_from_the_listing_and_from_the_prepared_set_alike(digits_run):
    config = digits_run.config
    listed = known.of_listing(config, ingest.plan(config))
    from distill_at_scale.data.prepared.dataset import PreparedDataset

    prepared = known.of_prepared(
        config, PreparedDataset(digits_run.dir / "prepared"), digits_run.dir / "manifest.parquet"
    )
    assert (listed.counts, listed.kept, listed.tests) == (prepared.counts, prepared.kept, prepared.tests)


def test_what_is_kept_has_at_least_the_images_of_a_class():
    assert known.expected_kept(tiny_config("x", select__keep=0.1, distill__ipc=5), [100, 20, 3]) == [10, 5, 3]
    assert known.expected_kept(tiny_config("x", select__per_class=7, distill__ipc=2), [100, 5]) == [7, 5]


def test_the_first_units_and_those_that_compile_are_kept_apart():
    times = [0.0, 9.0, 10.0, 11.0, 12.0, 14.0, 24.0, 25.0]  # 1 s each, but for 9 s at first, 2 s and 10 s later
    seen = rate(times)
    assert seen.each == pytest.approx(5 / 4)
    assert (seen.low, seen.high) == (1.0, 2.0)
    assert seen.once == pytest.approx(25 - 7 * 5 / 4)


@pytest.mark.parametrize(
    ("units", "starts", "expected"),
    [([2.0, 2.0, 2.0], [0.0], 6.0), ([2.0, 2.0, 2.0], [0.0, 0.0], 4.0), ([2.0, 2.0, 2.0], [0.0, 3.0], 5.0)],
)
def test_each_process_takes_the_next_unit(units, starts, expected):
    assert finish(units, starts) == expected


class Counting(DC):
    """Its step takes no time, but records its arguments."""

    seen: ClassVar[list[tuple[int, int, int]]] = []

    def step(self, i):
        Counting.seen.append((len(self.context.labels), self.outer, self.inner))
        return {}


def test_long_loops_are_measured_short_and_a_worker_has_its_own_classes(planner, monkeypatch):
    monkeypatch.setitem(METHODS, "dc", Counting)
    Counting.seen.clear()
    config = tiny_config("x", distill__ipc=6, distill__dc__outer=10, distill__dc__inner=50, distill__workers=2,
                         cluster__address=None)  # fmt: skip
    planner(config).distill()
    assert {(outer, inner) for _, outer, inner in Counting.seen} == {(1, 1), (2, 1), (2, 2)}
    (classes, *_), *steps = Counting.seen  # first a step with all measured classes
    assert {labels for labels, _, _ in steps} == {-(-classes // 2)}


def test_loops_add_up_as_they_nest(monkeypatch, tmp_path):
    config = tiny_config("x", distill__ipc=10, distill__dc__outer=10, distill__dc__inner=50)
    write_samples(tmp_path / "source", FACTS)
    dry_data.write(tmp_path, PreparedDataset(tmp_path / "source"), 2, 12, 12, 4)
    run = DryRun(config, {"folder": tmp_path}, CPU, TimeSpent())
    run.seconds = 0.01

    def cost(config, workers, seconds):
        loops = config.distill.dc
        return Rate.fixed(1 + 2 * loops.outer + (loops.outer - 1) * 3 * loops.inner)

    monkeypatch.setattr(run, "_steps", cost)
    assert run.steps(1, True, 12).each == pytest.approx(1 + 2 * 10 + 9 * 3 * 50)


def test_the_dry_set_has_full_classes_of_a_few_samples(tmp_path):
    write_samples(tmp_path / "source", FACTS)
    dry_data.write(tmp_path / "dry", PreparedDataset(tmp_path / "source"), 3, each=20, kept=5, tests=4)
    data = PreparedDataset(tmp_path / "dry" / "prepared")
    assert (data.counts("train"), data.counts("test")) == ([20] * 3, [2] * 3)
    pixels, labels = data.load("train")
    assert len(np.unique(pixels[labels == 1], axis=0)) == 8
    assert manifest.facts(tmp_path / "dry" / "manifest.parquet")["kept_per_class"] == [5] * 3


def test_other_programs_are_named_and_an_idle_machine_is_forecast(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr("distill_at_scale.pipeline.planning.machine.Load.others", 1.3)
    plan = make_run(tmp_path / "run").pipeline.forecast()
    assert "other programs use 1.3 of" in plan.load
    assert "on an idle machine about" in plan.load
    assert plan.load in "\n".join(plans.remarks(plan))


class Replicated(Method):
    """Every worker holds all classes, and a teacher is needed."""

    parallel, default_steps = "replicate", 4
    init_of = staticmethod(lambda config: "noise")
    protocol = staticmethod(lambda config: TrainingProtocol(2))
    networks = staticmethod(lambda config: ["a", "b"])
    costs = staticmethod(lambda config: [Cost("train two experts", "convnet", "kept", 20, True),
                                         Cost("label them", "convnet", "synthetic", 30, False)])  # fmt: skip
    make_network = staticmethod(lambda name, setting, real: (setting.networks / name).touch())
    load_state_dict = None
    state_dict = lambda self: {}  # noqa: E731

    def snapshot(self):
        return torch.zeros(len(self.setting.labels), *self.setting.spec.shape), torch.tensor(self.setting.labels)

    def __init__(self, setting):
        self.setting = setting

    def prepare(self, real):
        assert {"a", "b"} <= {path.name for path in self.setting.networks.iterdir()}

    def step(self, i):
        return {}


def test_a_custom_method_with_networks_and_costs_can_be_planned(planner):
    config = tiny_config("x", distill__method="test_plan:Replicated", cluster__address=None)
    plan = planner(config).distill()
    assert list(plan.parts) == ["train two experts", "label them", "prepare", "steps"]
    assert all(seconds >= 0 for seconds in plan.parts.values())


def test_memory_is_followed_to_its_peak():
    def work():
        a = torch.ones(1000)
        b = a + 1
        del a
        return (b * 2).sum() + torch.ones(10).sum()

    assert 8000 <= memory.peak(work, CPU) < 8200


def test_activations_grow_with_the_network():
    small, large = (NetworkSpec("convnet", (3, 32, 32), 10, width) for width in (16, 32))
    assert memory.activations(large) == pytest.approx(2 * memory.activations(small), rel=0.01)


def test_images_and_their_momentum_count_in_a_workers_memory():
    one, two = (memory.of_distillation(own, 10, 3072, 0, 0, CPU, "host")[0] for own in (100, 200))
    assert two - one == 100 * 10 * 3072 * 8
    assert memory.of_distillation(1, 1, 1, 5 * GB, 0, CPU, "shards")[0] < GB


@pytest.mark.parametrize(
    ("fields", "machine", "message"),
    [
        ({"host": 20 * GB}, {}, r"distill needs about 20\.0 GB of memory.*lower distill\.ipc"),
        ({"host": 5 * GB, "processes": 4}, {}, r"in each of 4 processes"),
        ({"device": 30 * GB}, {"gpus": 1, "gpu_memory": 24 * GB}, r"30\.0 GB of GPU memory, a worker has 24\.0 GB"),
        (
            {"disk": 80 * GB, "at_peak": 30 * GB},
            {},
            r"110\.0 GB on the run folder's disk \(most in distill\).*set run\.dir",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_key_to_change(fields, machine, message):
    config = tiny_config("x", cluster__address=None)
    there = layout(config, replace(MACHINE, **machine))
    plan = plans.combine(config, there, [estimate(**fields)], {}, {})
    with pytest.raises(UserError, match=message):
        plan.refuse()


def test_a_run_that_fits_is_not_refused():
    config = tiny_config("x", cluster__address=None)
    plans.combine(config, layout(config), [estimate(host=GB, disk=GB)], {}, {}).refuse()


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
    assert plans.problems(config, layout(config.model_copy(update={"cluster": tiny_config("x").cluster})), []) == []


def test_more_images_than_samples_are_refused(tmp_path, make_run):
    with pytest.raises(UserError, match=r"fewer than distill\.ipc = 500"):
        make_run(tmp_path / "run", distill__method="dm", distill__ipc=500).pipeline.forecast()


def test_a_price_makes_costs():
    config = tiny_config("x", cluster__address=None, cluster__price=3.0)
    plan = plans.combine(config, layout(config), [estimate(parts={"steps": 7200.0}), estimate("score")], {}, {})
    assert plan.cost == pytest.approx(3.0 * (2 + 1 / 60))
    remote = layout(tiny_config("x", cluster__address="ray://head:1"))
    assert estimate(parts={"steps": 3600.0}, machines=remote.machines(8)).cost(3.0) == pytest.approx(24.0)


def test_a_stage_of_weeks_gets_a_warning():
    (line,) = plans.advice([estimate(parts={"steps": 30 * 86400.0})])
    assert "distill takes 30.0 days here, most of it for: steps; lower distill.steps" in line


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


def test_the_command_prints_the_table_and_exits_with_zero(tmp_path, capsys):
    import yaml
    from conftest import TINY

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}), encoding="utf-8")
    assert cli.main(["plan", str(path), "cluster.price=2.0"]) == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in EVERY)
    assert "cost" in out


def test_the_command_refuses_what_does_not_fit_with_two(tmp_path, capsys, monkeypatch):
    import yaml
    from conftest import TINY

    monkeypatch.setattr("distill_at_scale.pipeline.pipeline.here", lambda folder: replace(MACHINE, memory=2**20))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}), encoding="utf-8")
    assert cli.main(["plan", str(path)]) == 2
    assert "this run does not fit here" in capsys.readouterr().err
    assert json.loads(Path(tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["problems"]


@pytest.mark.parametrize("shape", [(32,), (2, 32), (1, 8, 8), (2, 1, 4, 4)])
def test_tensors_can_be_planned(shape, planner):
    facts = replace(FACTS, shape=shape, kind="tensors")
    config = tiny_config("x", distill__method="dm", distill__dm__augment="none", distill__network="mlp",
                         score__network="mlp", evaluate__networks=["mlp"], data__source="tensors")  # fmt: skip
    made = planner(config, facts)
    assert all(plan.seconds > 0 for plan in (made.score(), made.distill(), made.evaluate()))
    assert facts.held == 4 * facts.values  # float32

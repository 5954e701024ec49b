"""The plan: the estimates of every stage before a run, errors with advice, and predictions next to measured times."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, tiny_config
from PIL import Image

import distill_at_scale as das
from distill_at_scale import cli
from distill_at_scale.core.environment import Machine
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared import excerpt
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import Cost, Method
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.executors.layout import Layout, Spread
from distill_at_scale.pipeline.planning import dry_run
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.dry_run import DryRun, Rate
from distill_at_scale.pipeline.planning.estimates import RAY, Planner, StageEstimate, finish
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.pruning.selection import quotas

GB = 10**9
MACHINE = Machine(cores=4, memory=16 * GB, gpus=0, gpu_memory=0, disk=100 * GB)
NAMES = ["a", "b", "c"]
FACTS = PlannedDataset((1, 8, 8), NAMES, NAMES, [30] * 3, 12, "images", [6] * 3)
EVERY = ["ingest", "score", "select", "distill", "evaluate", "report"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measurements of a few milliseconds in one process: these tests do not look at how good they are."""
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    monkeypatch.setattr(dry_run, "PROCESSES", 1)
    monkeypatch.setattr(plans, "LOOK", 0.01)


def estimate(stage: str = "distill", **fields) -> StageEstimate:
    return StageEstimate(**{"stage": stage, "parts": {"steps": 60.0}, **fields})


@pytest.fixture
def planner(tmp_path):
    """Planners of configurations, on prepared data of made-up samples in the shape of their facts."""
    made = []

    def make(config, facts: PlannedDataset = FACTS, **options) -> Planner:
        folder = tmp_path / f"data{len(made)}"
        write_samples(folder, facts)
        made.append(DryRun(config, facts, layout(config), PreparedDataset(folder), **options))
        return Planner(config, facts, layout(config), made[-1])

    yield make
    for measured in made:
        measured.close()


def write_samples(folder: Path, facts: PlannedDataset) -> None:
    tensors, each = facts.kind == "tensors", 8
    pixels = np.random.default_rng(0).integers(0, 255, (each * facts.classes, *facts.shape), np.uint8)
    pixels = pixels.astype(np.float32) if tensors else pixels
    labels = np.repeat(np.arange(facts.classes), each)
    table = shards.to_table([f"{k:06d}" for k in range(len(labels))], labels, pixels)
    splits = ("train", "test") if facts.tests else ("train",)
    for split in splits:
        shards.write_shards(folder / split, [table], table.schema, 4)
    channels = NetworkSpec("", facts.shape, 2, kind=facts.kind).channel_shape[0]
    counts = {split: [each] * facts.classes for split in splits}
    meta = {"class_names": facts.class_names, "shape": list(facts.shape), "counts": counts, "kind": facts.kind,
            "mean": [0.5] * channels, "std": [0.25] * channels, "chunk": 16}  # fmt: skip
    shards.write_meta(folder, meta, "made up")


def layout(config=None, machine: Machine = MACHINE) -> Layout:
    return Layout(config or tiny_config("x", cluster__address=None), machine)


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


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_can_be_planned_without_a_test_split(method, planner):
    teacher = {"teacher_network": "convnet_bn"}  # of 8 x 8 pixels
    config = tiny_config("x", distill__method=method, runtime__rule="loss", distill__sre2l=teacher, distill__rded=teacher,
                         distill__ipc=2)  # fmt: skip
    facts = replace(FACTS, tests=0, kept=[8] * 3)  # as many as pca needs
    assert planner(config, facts).distill().parts["steps"] > 0


@pytest.mark.parametrize(
    ("shape", "kind", "network"),
    [((4, 3, 8, 8), "clips", "convnet3d"), ((32,), "tensors", "mlp"), ((2, 1, 4, 4), "tensors", "mlp")],
)  # fmt: skip
def test_clips_and_tensors_can_be_planned(shape, kind, network, planner):
    facts = replace(FACTS, shape=shape, kind=kind)
    config = tiny_config("x", distill__method="dm", distill__network=network, score__network=network,
                         evaluate__networks=[network], distill__dm__augment="none", evaluate__bounds=["full"],
                         data=(TINY["data"] | {"frames": 4}) if kind == "clips" else {"source": "tensors"})  # fmt: skip
    made = planner(config, facts)
    assert all(0 < one.low <= one.seconds <= one.high for one in (made.score(), made.distill(), made.evaluate()))


class Replicated(Method):
    """Every worker holds all classes, and networks are needed."""

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
    plan = planner(tiny_config("x", distill__method="test_plan:Replicated")).distill()
    assert list(plan.parts) == ["train two experts", "label them", "prepare", "steps"]


def test_a_single_teacher_has_all_cores_and_several_experts_share_them(planner, monkeypatch):
    seen = {}
    monkeypatch.setattr(DryRun, "_measure", lambda self, name, spread, *a, **b: seen.setdefault(name, spread) and {})
    for method, spread in (("sre2l", Spread(1, 4)), ("mtt", Spread(4, 1))):
        seen.clear()
        config = tiny_config("x", cluster__address=None, distill__method=method, distill__mtt__experts=9)
        planner(config).measured.ready(2)
        assert seen["prepare"] == spread


def test_weights_of_another_number_of_classes_than_the_dry_run_has(planner, tmp_path):
    from safetensors.torch import save_file

    names = [f"c{k}" for k in range(30)]
    facts = replace(FACTS, class_names=names, counts=[30] * 30, kept=[6] * 30)  # more than a dry run has
    state = NetworkSpec("convnet", FACTS.shape, 30, 8).build(0).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    config = tiny_config("x", score__weights=str(tmp_path / "weights.safetensors"), data__classes=names)
    made = planner(config, facts)
    assert list(made.score().parts) == ["score", "write"]
    assert made.measured.classes < 30


def test_broken_samples_at_the_start_of_a_class_are_skipped_and_the_temporary_folder_is_named(tmp_path, make_run):
    for split, label, number in ((s, c, k) for s in ("train", "test") for c in "ab" for k in range(20)):
        file = tmp_path / "data" / split / label / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(file)
        if split == "train" and number < 17:  # more than are read at first
            file.write_bytes(b"broken")
    data = {"source": "imagefolder", "path": str(tmp_path / "data"), "size": 8, "channels": 1}
    config = tiny_config(tmp_path / "run", data=data)
    facts = validate.planned(config, ingest.plan(config))
    measured = DryRun(config, facts, layout(config))
    assert measured.folder.name.startswith("distill_at_scale-")
    measured.ingest(Spread(1, 1))
    assert measured.prepared.counts("train") == [3, 3]
    measured.close()
    assert not measured.folder.exists()


def test_a_process_that_cannot_start_is_an_error_and_all_are_ended(planner, monkeypatch):
    measured = planner(tiny_config("x", cluster__address=None), most=3).measured
    monkeypatch.setattr(dry_run.helpers, "COMMAND", "raise SystemExit(3)")
    with pytest.raises(UserError, match="has ended with exit code 3"):
        measured._measure("load_torch", Spread(3, 1))
    measured.close()
    assert [process.returncode is not None for process in measured._others] == [True, True]


@pytest.mark.slow
def test_processes_measure_side_by_side_and_as_a_group(planner):
    config = tiny_config("x", cluster__address=None, distill__workers=2, distill__method="dm")
    made = planner(config, most=2)
    assert made.measured.classes == 3
    assert made.distill().parts["steps"] > 0
    assert made.measured.start != START


def test_known_counts_come_from_the_listing_and_from_the_prepared_set_alike(digits_run):
    config, folder = digits_run.config, digits_run.dir
    listed = validate.planned(config, ingest.plan(config))
    prepared = validate.known(config, PreparedDataset(folder / "prepared"), folder / "manifest.parquet")
    assert (listed.counts, listed.kept, listed.tests) == (prepared.counts, prepared.kept, prepared.tests)


def test_the_first_units_and_those_that_compile_are_kept_apart():
    stamps = [0.0, 9.0, 10.0, 11.0, 12.0, 14.0, 24.0, 25.0]  # 1 s each, but for 9 s at first, 2 s and 10 s later
    seen = Rate.of(stamps, end=27.0)
    assert seen.each == pytest.approx(5 / 4)
    assert (seen.low, seen.high, seen.last) == (1.0, 2.0, 2.0)
    assert seen.once == pytest.approx(25 - 7 * 5 / 4)


@pytest.mark.parametrize(
    ("units", "starts", "expected"),
    [([2.0, 2.0, 2.0], [0.0], 6.0), ([2.0, 2.0, 2.0], [0.0, 0.0], 4.0), ([2.0, 2.0, 2.0], [0.0, 3.0], 5.0)],
)
def test_each_process_takes_the_next_unit(units, starts, expected):
    assert finish(units, starts) == expected


def test_loops_add_up_as_they_nest(planner, monkeypatch):
    config = tiny_config("x", distill__ipc=10, distill__dc__outer=10, distill__dc__inner=50)

    def measure(self, name, spread, group, config, count):
        loops = config.distill.dc
        cost = 1 + 2 * loops.outer + (loops.outer - 1) * 3 * loops.inner
        return {"outer": Rate.fixed(loops.outer), "inner": Rate.fixed(loops.inner), "steps": Rate.fixed(cost)}

    monkeypatch.setattr(DryRun, "_measure", measure)
    monkeypatch.setattr(DryRun, "ready", lambda self, kept: None)
    seen = planner(config).measured.steps(FACTS, Spread(1, 1), "none")
    assert seen.each == pytest.approx(1 + 2 * 10 + 9 * 3 * 50)


def test_the_dry_set_has_full_classes_of_a_few_samples(tmp_path):
    write_samples(tmp_path / "source", replace(FACTS, tests=0))
    excerpt.write(tmp_path / "dry" / "prepared", PreparedDataset(tmp_path / "source"), 2, each=20, tests=4)
    data = PreparedDataset(tmp_path / "dry" / "prepared")
    assert (data.counts("train"), data.counts("test")) == ([20, 20], [2, 2])
    pixels, labels = data.load("train")
    assert len(np.unique(pixels[labels == 1], axis=0)) == 8


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


@pytest.mark.parametrize(
    ("address", "expected"), [(None, (False, False)), ("none", (True, False)), ("head:1", (False, True))]
)
def test_the_address_says_where_the_work_runs(address, expected):
    there = layout(tiny_config("x", cluster__address=address))
    assert (there.local, there.remote) == expected


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


def test_several_workers_of_a_proxy_can_be_planned(planner):
    config = tiny_config("x", cluster__address=None, score__workers=2, score__trials=1)
    assert planner(config).score().parts["proxies"] > 0


def test_criteria_that_compare_checkpoints_can_be_planned_for_parts_of_an_epoch(planner):
    criteria = {"score__criterion": ["cad", "forgetting", "clusters"], "score__cad_length": 3}
    parts = planner(tiny_config("x", **criteria, score__epochs=0.6, score__checkpoints_per_epoch=10)).score().parts
    assert all(parts[name] > 0 for name in ("proxies", "score", "cluster"))


def test_the_price_of_scoring_follows_epochs_checkpoints_and_clusters(planner, monkeypatch):
    rates = {name: Rate.fixed(seconds) for name, seconds in (("train a proxy", 1.0), ("score", 1.0), ("rest", 0.0))}
    monkeypatch.setattr(DryRun, "stage", lambda *arguments, **keys: rates)

    def price(**keys):
        made = planner(tiny_config("x", score__trials=1, **{f"score__{key}": value for key, value in keys.items()}))
        return made.measured.trained, made.layout.actors().side, made.score().parts

    trained, side, parts = price(criterion="cad", epochs=0.6, checkpoints_per_epoch=10)
    assert parts["proxies"] == pytest.approx(0.6 * 90 / trained)
    assert parts["score"] == pytest.approx(90 * 5 / side)  # of six checkpoints all but the last
    assert "cluster" not in parts
    few, many = (price(criterion=["loss", "clusters"], clusters=count)[2]["cluster"] for count in (2, 20))
    assert many == pytest.approx(10 * few)


def test_only_proxies_in_training_hold_a_window_of_images(planner):
    config = tiny_config("x", cluster__address=None, score__trials=1)
    made = planner(config)
    large = replace(made.facts, counts=[100_000] * len(made.facts.counts), shape=(3, 64, 64))
    one, four = (
        replace(made, config=tiny_config("x", cluster__address=None, score__trials=n), facts=large) for n in (1, 4)
    )
    sizes = [(size := planned.size("score")).host * size.processes for planned in (one, four)]
    assert sizes[1] > 2 * sizes[0]


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

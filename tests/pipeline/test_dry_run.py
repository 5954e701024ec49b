"""The dry run behind a plan: every method, network and criterion can be measured on made-up or real samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config
from PIL import Image
from plan_cases import FACTS, layout, measure_quickly, planners, write_samples

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared import excerpt
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import Cost, Method
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.helpers import START
from distill_at_scale.pipeline.executors.layout import Spread
from distill_at_scale.pipeline.planning import dry_run
from distill_at_scale.pipeline.planning.dry_run import DryRun, Rate


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    measure_quickly(monkeypatch)


@pytest.fixture
def planner(tmp_path):
    with planners(tmp_path) as make:
        yield make


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
    plan = planner(tiny_config("x", distill__method="test_dry_run:Replicated")).distill()
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


def test_the_first_units_and_those_that_compile_are_kept_apart():
    stamps = [0.0, 9.0, 10.0, 11.0, 12.0, 14.0, 24.0, 25.0]  # 1 s each, but for 9 s at first, 2 s and 10 s later
    seen = Rate.of(stamps, end=27.0)
    assert seen.each == pytest.approx(5 / 4)
    assert (seen.low, seen.high, seen.last) == (1.0, 2.0, 2.0)
    assert seen.once == pytest.approx(25 - 7 * 5 / 4)


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

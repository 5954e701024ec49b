"""The command compare: scores by hand, bytes, orders of real samples, resume, refusals, and a run from end to end."""

from __future__ import annotations

import io
import json
import math
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from distill_at_scale.config.experiments import CompareSection
from distill_at_scale.config.load import load, with_overrides
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.evaluate import random_real
from distill_at_scale.distillation.soft_labels import Teacher
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.experiments.compare import run as compare
from distill_at_scale.experiments.compare import scores, sets
from distill_at_scale.experiments.compare.runs import open_runs
from distill_at_scale.experiments.compare.units import recipe
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pruning.scoring import score_table

STAGES = ("ingest", "score", "select", "distill")
CRITERIA = ["loss", "herding"]
TEACHER = {"teacher_network": "convnet", "teacher_epochs": 2, "teacher_augment": "none", "label_epochs": 2}


@pytest.fixture(scope="module")
def two_runs(make_run, tmp_path_factory):
    """A finished run of DM and one of TESLA, which learns soft labels, on the same digits; tests only read them."""
    folder = tmp_path_factory.mktemp("compare")
    first = make_run(folder / "dm", distill__method="dm", score__criterion=CRITERIA).stages(*STAGES, "evaluate")
    tesla = {"experts": 1, "expert_epochs": 2, "max_start": 0, "target_epochs": 1, "student_steps": 1, "image_lr": 10.0,
             "augment": "none", "expert_augment": "none"}  # fmt: skip
    values = {"distill__method": "tesla", "distill__tesla": tesla, "distill__ipc": 2, "score__criterion": CRITERIA}
    return [first.config, make_run(folder / "tesla", run__reuse=str(folder / "dm"), **values).stages(*STAGES).config]


def compared(configs, folder, connect=LocalExecutor, **keys):
    first = with_overrides(configs[0], {"compare.dir": str(folder), **{f"compare.{k}": v for k, v in keys.items()}})
    compare.run([first, *configs[1:]], Display.silent(), connect)
    return pq.read_table(folder / "compare.parquet").to_pylist(), json.loads(
        (folder / "compare.json").read_text(encoding="utf-8")
    )


def no_executor():
    raise AssertionError("nothing must be trained")


def test_scores_are_those_of_dd_ranking_by_hand():
    # alpha = 0.5 (0.6 - 0.5) - 0.5 (0.9 - 0.4) = -0.2; (e^-0.2 - e^-1) / (e - e^-1) = (0.818731 - 0.367879) / 2.350402
    assert scores.label_robust(0.6, 0.5, 0.9, 0.4) == pytest.approx(0.191819, abs=1e-6)
    assert scores.label_robust(1.0, 0.0, 0.5, 1.0) == pytest.approx(
        (math.exp(0.75) - math.exp(-1)) / 2.350402, abs=1e-6
    )
    # 0.5 (0.7 - 0.5) + 0.5 (0.4 - 0.4) = 0.1; (1.105171 - 0.367879) / 2.350402
    assert scores.augmentation_robust(0.7, 0.5, 0.4, 0.4) == pytest.approx(0.313688, abs=1e-6)
    assert scores.augmentation_robust(0.3, 0.3, 0.2, 0.2) == pytest.approx(0.268941, abs=1e-6)


def test_scores_take_the_best_regime_of_the_set_and_the_same_of_random_samples():
    ours = {("hard", True): 0.4, ("hard", False): 0.3, ("soft", True): 0.6, ("soft", False): 0.2}
    random = {("hard", True): 0.9, ("hard", False): 0.9, ("soft", True): 0.5, ("soft", False): 0.1}
    result = scores.scores(ours, random, {("hard", True): 0.9})
    assert result["lrs"] == pytest.approx(scores.label_robust(0.6, 0.5, 0.9, 0.4))
    assert result["ars"] == pytest.approx(scores.augmentation_robust(0.6, 0.5, 0.2, 0.1))
    assert scores.scores(ours, random, {}) == {"lrs": None, "ars": result["ars"]}
    assert scores.scores(ours, {}, {("hard", True): 0.9}) == {"lrs": None, "ars": None}


def test_bytes_are_those_of_the_files():
    section = CompareSection.model_validate({"labels": ["hard", "soft", "views"], "teacher": {"label_epochs": 30}})
    assert [sets.label_bytes(kind, 10, section, 50) for kind in section.labels] == [8, 8 + 40, 8 + 30 * 20]
    assert sets.label_bytes("views", 10, section, 20) == 8 + 20 * 20  # fewer epochs than labelled ones
    few = CompareSection.model_validate({"teacher": {"label_epochs": 30, "top_k": 3}})
    assert sets.label_bytes("views", 10, few, 50) == 8 + 30 * 3 * (2 + 2)
    idc = sets.Entry("idc", "distilled", 3072 * 4, stored=10, training=40)
    assert idc.bytes("soft", [], 48) == 10 * 3072 * 4 + 40 * 48


def test_equal_bytes_fill_the_bytes_of_a_set_and_one_more_image_per_class_does_not_fit(two_runs):
    data = PreparedDataset(open_runs(two_runs)[0].dir / "prepared")
    section = CompareSection.model_validate({"labels": ["hard", "soft"]})
    ours = [sets.Entry("a", "distilled", 64 * 4, 6, 6), sets.Entry("b", "distilled", 64 * 4, 15, 15)]
    entries = sets.baselines(ours, {"random": None}, data, section, 10, 1.0)
    assert [entry.budget for entry in entries] == ["2 per class", "5 per class", "bytes of a", "bytes of b"]
    for one, entry in zip(ours, entries[2:], strict=True):
        for labels, each in (("hard", 8), ("soft", 8 + 12)):
            room, k = one.bytes(labels, [], each), entry.per_class[labels]
            assert 3 * k * (64 + each) <= room < 3 * (k + 1) * (64 + each)
    assert entries[2].bytes("hard", data.counts(), 8) == 3 * entries[2].per_class["hard"] * 72
    small = sets.Entry("c", "external", 64, 3, 3), sets.Entry("d", "external", 64 - 1, 3, 3)
    section = section.model_copy(update={"budgets": ["bytes"], "labels": ["hard"]})
    entries = sets.baselines(small, {"random": None}, data, section, 10, 1.0)
    assert [entry.title for entry in entries] == [
        "random, bytes of c; bytes of d (with hard labels one image per class is more)"
    ]
    assert entries[0].bytes("hard", data.counts(), 8) == 3 * 72 > small[1].bytes("hard", [], 8)


def test_orders_of_real_samples_follow_their_scores(two_runs):
    first = open_runs(two_runs)[0]
    found, missing = sets.orders(first.dir / "scores.parquet", ["easiest", "herding", "cad"], first.data.counts())
    table = score_table.read(first.dir / "scores.parquet")[0]
    for name, column in (("easiest", "loss"), ("herding", "herding")):
        for label in range(3):
            values = table[column].to_numpy()[table["label"].to_numpy() == label]
            assert found[name][str(label)].tolist() == np.argsort(values, kind="stable").tolist()
    assert missing == ["cad: scores.parquet has no column cad; add cad to score.criterion and score again"]


def test_hard_labels_from_end_to_end(two_runs, tmp_path):
    rows, facts = compared(two_runs, tmp_path, epochs=2, baselines=["random", "herding", "cad"], budgets=["images"])
    titles = [
        "dm",
        "tesla",
        "random, 1 per class",
        "random, 2 per class",
        "herding, 1 per class",
        "herding, 2 per class",
    ]
    assert list(dict.fromkeys(row["entry"] for row in rows)) == [*titles, "whole training split"]
    assert {(row["n"], row["labels"]) for row in rows if row["kind"] != "full"} == {(2, "hard")}
    by = {(row["entry"], row["augment"]): row for row in rows}
    assert by["dm", True]["bytes"] == 3 * (64 * 4 + 8)
    assert by["herding, 2 per class", True]["bytes"] == 6 * (64 + 8)
    one, other = by["tesla", False], by["random, 2 per class", False]
    assert one["over_random"] == pytest.approx(one["mean"] - other["mean"])
    (score,) = [score for score in facts["scores"] if score["entry"] == "dm"]
    full, best = by["whole training split", True]["mean"], max((by["dm", a]["mean"], a) for a in (True, False))
    expected = scores.label_robust(best[0], by["random, 1 per class", best[1]]["mean"], full, best[0])
    assert score["lrs"] == pytest.approx(expected)
    assert facts["left_out"] == ["cad: scores.parquet has no column cad; add cad to score.criterion and score again"]
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "herding, 2 per class" in page
    assert "add cad to score.criterion" in page


def test_a_baseline_of_an_order_trains_on_its_first_samples(two_runs, tmp_path):
    first = with_overrides(two_runs[0], {"compare.dir": str(tmp_path), "compare.baselines": ["random", "easiest"]})
    plan = compare.make_plan(open_runs([first]), Display.silent())
    paths = {"prepared": plan.runs[0].dir / "prepared", "networks": tmp_path}
    worker = compare.Compare(plan.config, paths, torch.device("cpu"), None)
    units = {unit.work[0]: unit for unit in compare._units(plan).values()}
    job = next(job for job in units if job.set == "easiest" and job.ipc == 1)
    data, order = worker.training_set(job, units[job].work[1], units[job]), safetensors_io.load(units[job].inputs[0])
    expected = [plan.runs[0].data.take("train", label, order[str(label)][:1].numpy())[0] for label in range(3)]
    assert np.array_equal(data.images.numpy(), np.stack(expected))
    job = next(job for job in units if job.set == "random" and job.seed == 1 and job.ipc == 1)
    data = worker.training_set(job, units[job].work[1], units[job])
    assert np.array_equal(data.images.numpy(), random_real(plan.runs[0].data, 1, 0, 1)[0])


def test_soft_labels_are_learned_ones_or_the_teachers(two_runs, tmp_path):
    rows, _ = compared(
        two_runs, tmp_path, epochs=2, labels=["soft", "views"], baselines=["random"], budgets=["images"], teacher=TEACHER,
        augment="without", seeds=1,
    )  # fmt: skip
    assert {(row["entry"], row["labels"]) for row in rows} == {
        (name, labels)
        for name in ("dm", "tesla", "random, 1 per class", "random, 2 per class")
        for labels in ("soft", "views")
    }
    free = {(row["entry"], row["labels"]) for row in rows if row["teacher_seconds"] == 0}
    assert free == {("tesla", "soft")}
    first = with_overrides(
        two_runs[0], {"compare.dir": str(tmp_path), "compare.labels": ["soft"], "compare.teacher": TEACHER}
    )
    plan = compare.make_plan(open_runs([first, two_runs[1]]), Display.silent())
    folder = plan.networks
    worker = compare.Compare(
        plan.config, {"prepared": plan.runs[0].dir / "prepared", "networks": folder}, torch.device("cpu"), None
    )
    units = {unit.work[0]: unit for unit in compare._units(plan).values()}
    tesla, dm = (worker.training_set(*unit.work, unit) for unit in (
        next(units[job] for job in units if job.set == name) for name in ("tesla", "dm")
    ))  # fmt: skip
    own = synthetic_set.load(two_runs[1].run.dir)
    assert torch.equal(tesla.soft["soft_labels"], own.extras["soft_labels"])
    teacher = Teacher.load(folder / "teacher.safetensors", torch.device("cpu"))
    assert torch.allclose(
        dm.soft["soft_labels"], teacher.logits(synthetic_set.load(two_runs[0].run.dir).images), atol=1e-5
    )


def test_only_missing_networks_are_trained(two_runs, tmp_path):
    keys = {
        "epochs": 1,
        "baselines": ["random"],
        "budgets": ["images"],
        "seeds": 1,
        "full_seeds": 0,
        "augment": "without",
    }
    before, _ = compared(two_runs[:1], tmp_path, **keys)
    assert compared(two_runs[:1], tmp_path, no_executor, **keys)[0] == before
    log = tmp_path / "networks.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([*lines[:-1], lines[-1][:20]]), encoding="utf-8")  # cut short by an interruption
    trained = []

    class Counting(LocalExecutor):
        def run(self, task, done, poll=lambda: False):
            trained.extend(str(unit.work[0]) for unit in task.units)
            super().run(task, done, poll)

    again, _ = compared(two_runs[:1], tmp_path, Counting, **keys)
    assert trained == ["random, 1 per class, hard labels without augmentation, convnet 0"]
    assert [row["mean"] for row in again] == [row["mean"] for row in before]
    trained.clear()
    first, second = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([first[:30] + b"\xff\x00" + first[32:], second, b""]))  # damaged on the disk
    assert compared(two_runs[:1], tmp_path, Counting, **keys)[0][1]["mean"] == before[1]["mean"]
    assert trained == ["dm, hard labels without augmentation, convnet 0"], "later lines are kept"
    trained.clear()
    compared(two_runs, tmp_path, Counting, **keys)
    assert [name.split(",")[0] for name in trained] == ["tesla", "random"]  # of the new run, and random at its size


def test_a_comparison_says_that_it_tests_on_the_test_split(two_runs, tmp_path):
    keys, console = {"compare.dir": str(tmp_path)}, Console(file=io.StringIO(), width=200)
    held_out = with_overrides(two_runs[0], keys | {"select.held_out": 0.2, "evaluate.split": "held_out"})
    for config, said in ((with_overrides(two_runs[0], keys), False), (held_out, True)):
        compare.make_plan(open_runs([config]), Display(console))
        assert ("all networks are tested on the test split" in console.file.getvalue()) is said


def test_every_set_of_a_kind_of_labels_has_one_recipe(two_runs):
    config = with_overrides(two_runs[0], {"compare.epochs": 7, "compare.strategy": "crop_flip", "evaluate.lr": 0.05})
    of_set = TrainingProtocol(300, augment="color", lr=0.7, cutmix=1.0)
    assert recipe(config, of_set, "hard", True) == TrainingProtocol(7, "crop_flip", lr=0.05)
    assert recipe(config, of_set, "soft", False) == TrainingProtocol(7, "none", lr=0.05, labels="soft")
    views = [recipe(config, of_set, "views", augment) for augment in (True, False)]
    assert [(one.cutmix, one.augment, one.epochs, one.temperature) for one in views] == [
        (1.0, "flip", 7, 20.0),
        (0.0, "none", 7, 20.0),
    ]


def test_the_cost_of_a_set_counts_what_its_selection_needed(two_runs, make_run, tmp_path):
    first = open_runs(two_runs)[0]
    keys = {"run__reuse": str(first.dir.path), "score__criterion": CRITERIA}
    chosen = {"loss": {"keep": 0.5}, "chance": {"keep": 0.5, "criterion": "random"}, "every": {"keep": 1.0}}
    loss, chance, every = open_runs([
        make_run(tmp_path / name, **keys, **{f"select__{k}": v for k, v in own.items()}).stages(*STAGES).config
        for name, own in chosen.items()
    ])  # fmt: skip
    assert loss.selection_seconds() == loss.seconds("select", "score") > loss.seconds("select")
    assert [run.selection_seconds() for run in (chance, every)] == [run.seconds("select") for run in (chance, every)]
    found = {"made_with": "x", "rounds": [1], "name": "loss", "chosen": {"keep": 0.5}, "seconds": 1000.0}
    write_json(chance.dir / "auto.json", found)
    table, facts = manifest.read(chance.dir / "manifest.parquet")
    manifest.write(chance.dir / "manifest.parquet", table, facts | {"asked": facts["asked"] | {"keep": "auto"}})
    assert chance.selection_seconds() == pytest.approx(1000 + chance.seconds("select", "score"))


def test_other_labels_of_views_are_other_networks(two_runs, tmp_path):
    def keys(**teacher):
        values = {"labels": ["hard", "views"], "epochs": 4, "baselines": ["random"], "teacher": TEACHER | teacher}
        first = with_overrides(
            two_runs[0], {f"compare.{k}": v for k, v in values.items()} | {"compare.dir": str(tmp_path)}
        )
        units = compare._units(compare.make_plan(open_runs([first]), Display.silent()))
        return {key for key, unit in units.items() if unit.work[0].labels == "views"}, set(units)

    (views, every), (fewer, others), (top, _) = (
        keys(label_epochs=4),
        keys(label_epochs=2),
        keys(label_epochs=4, top_k=2),
    )
    assert views.isdisjoint(fewer | top)
    assert every - views == others - fewer
    assert keys(label_epochs=9)[0] == views, "more labelled epochs than the training has change nothing"


def test_runs_that_cannot_be_compared_are_refused_before_anything_is_trained(two_runs, make_run, tmp_path):
    relative = os.path.relpath(two_runs[0].run.dir)
    unfinished = make_run(tmp_path / "unfinished").stages("ingest", "score").config
    classes = make_run(tmp_path / "classes", data__classes=["0", "1"]).stages(*STAGES).config
    untested = make_run(tmp_path / "untested", data__holdout=None).stages(*STAGES).config
    shares = make_run(tmp_path / "shares", data__holdout=0.4).stages(*STAGES).config
    for configs, problem in (
        ([two_runs[0], unfinished], "no output of select"),
        ([two_runs[0], classes], "different classes: 3 (0, 1, 2, ...) and 2"),
        ([two_runs[0], shares], "different test samples"),
        ([two_runs[0], two_runs[0]], "named twice"),
        ([two_runs[0], with_overrides(two_runs[0], {"run.dir": relative})], "named twice"),
        (
            [with_overrides(two_runs[0], {"compare.dir": "s3://bucket/compare"})],
            "compare.dir = s3://bucket/compare is in an",
        ),
        ([untested], "no test split"),
        ([with_overrides(two_runs[0], {"compare.networks": ["nonet"]})], "compare.networks"),
        ([with_overrides(two_runs[0], {"compare.external": {"x": str(tmp_path / "none")}})], "compare.external: x = "),
    ):
        with pytest.raises(UserError) as error:
            compare.run(configs, Display.silent(), no_executor)
        assert problem in str(error.value)
    with pytest.raises(UserError, match="CONFIG is an address, but must be on this machine"):
        load("s3://bucket/run")


def test_the_report_of_a_run_shows_its_comparison(two_runs, make_run, tmp_path):
    run = make_run(tmp_path / "run", run__reuse=two_runs[0].run.dir, score__criterion=CRITERIA).stages(
        *STAGES, "evaluate", "report"
    )
    assert "<h2>Comparison</h2>" not in (run.dir / "report.html").read_text(encoding="utf-8")
    compared([run.config], run.dir / "compare", epochs=1, baselines=["random"], seeds=1, full_seeds=0)
    run.stages("report")
    report = (run.dir / "report.html").read_text(encoding="utf-8")
    assert "<h2>Comparison</h2>" in report
    assert "random, 1 per class" in report


def test_tiles_are_those_of_the_method_pca(two_runs, make_run, tmp_path):
    run = make_run(tmp_path / "pca", distill__method="pca", run__reuse=two_runs[0].run.dir, score__criterion=CRITERIA)
    run.stages(*STAGES)
    first = with_overrides(two_runs[0], {"compare.dir": str(tmp_path / "out"), "compare.baselines": ["pca"]})
    plan = compare.make_plan(open_runs([first, run.config]), Display.silent())
    by = {entry.title: entry for entry in plan.entries}
    assert set(by) == {"dm", "pca", "pca, 1 per class", "whole training split"}
    held = make_run(tmp_path / "held", run__reuse=two_runs[0].run.dir, score__criterion=CRITERIA, select__held_out=0.3)
    held.stages(*STAGES)
    rank = manifest.read(held.dir / "manifest.parquet", ["rank"])[0]["rank"].to_numpy()[: plan.runs[0].data.counts()[0]]
    assert rank.min() == manifest.HELD_OUT
    data = open_runs([held.config])[0].data
    plain = sets.tiles(held.dir / "manifest.parquet", data, normalization_of(data), 1, 1, None)
    first_kept = data.take("train", 0, np.flatnonzero(rank == 0))
    assert torch.equal(plain.images[:1], normalization_of(data).apply(torch.from_numpy(first_kept)))
    with pytest.raises(UserError, match=r"class '0' has fewer than 10000 samples"):
        sets.tiles(held.dir / "manifest.parquet", data, normalization_of(data), 1, 100, None)
    ours, theirs = (safetensors_io.load(by[name].file) for name in ("pca, 1 per class", "pca"))
    assert torch.equal(ours["images"], theirs["images"])
    crop = synthetic_set.load(run.dir).protocol.crop
    assert crop is not None
    crops = {(unit.work[0].set, unit.work[0].augment): unit.work[1].crop for unit in compare._units(plan).values()}
    for name in ("pca", "pca, 1 per class"):
        assert (crops[name, True], crops[name, False]) == (crop, None)
    assert crops["dm", True] is None

"""Controls that are distilled: which ones a run has, their manifests, their place in evaluation.json, resume and reuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill_at_scale.config.load import validate
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.stages import controls

BOTH = ["unpruned", "random_keep"]
STAGES = ("ingest", "score", "select", "distill", "evaluate")
PRUNED = {"runtime__rule": "loss", "evaluate__controls": BOTH}


@pytest.fixture(scope="module")
def with_controls(make_run, tmp_path_factory):
    """A finished run with both controls; tests only read it."""
    return make_run(tmp_path_factory.mktemp("controls") / "run", **PRUNED).stages(*STAGES)


def evaluation(run):
    return json.loads((run.dir / "evaluation.json").read_text(encoding="utf-8"))


def test_a_run_has_the_controls_that_differ_from_it():
    def names(kept, rule, method="dm"):
        values = {"runtime": {"rule": rule}, "distill": {"method": method}, "evaluate": {"controls": BOTH}}
        return controls.applicable(validate(values), kept, 100)

    assert names(20, "none") == BOTH
    assert names(100, "loss") == ["unpruned"]
    assert names(100, "none") == []
    assert names(100, "loss", "mtt") == []  # to which runtime pruning does not apply
    assert names(20, "none", "coreset") == ["random_keep"]  # the first of all samples are the first kept ones
    assert names(100, "none", "pca") == ["random_keep"]  # which takes others than the first


def test_the_manifest_of_a_control_keeps_all_or_as_many_of_each_class_at_random(digits_run, tmp_path):
    source, data = digits_run.dir / "manifest.parquet", PreparedDataset(digits_run.dir / "prepared")
    run_table, facts = manifest.read(source)
    paths = {name: tmp_path / f"{name}.parquet" for name in (*BOTH, "again", "other")}
    controls.write_manifest(source, paths["unpruned"], data, "unpruned", 0)
    for name, seed in (("random_keep", 0), ("again", 0), ("other", 1)):
        controls.write_manifest(source, paths[name], data, "random_keep", seed)
    tables = {name: manifest.read(path)[0] for name, path in paths.items()}
    assert all(table["sample_id"].equals(run_table["sample_id"]) for table in tables.values())
    kept = {name: table["kept"].to_numpy() for name, table in tables.items()}
    labels = run_table["label"].to_numpy()
    assert kept["unpruned"].all()
    assert np.bincount(labels[kept["random_keep"]]).tolist() == facts["kept_per_class"]
    assert np.array_equal(kept["random_keep"], kept["again"])
    assert not np.array_equal(kept["random_keep"], kept["other"])
    assert not np.array_equal(kept["random_keep"], run_table["kept"].to_numpy())
    ranks = tables["random_keep"]["rank"].to_numpy()  # at random too, as coreset and pca take the first samples
    for label in np.unique(labels):
        own = labels == label
        assert sorted(ranks[own]) == list(range(own.sum()))
        assert abs(np.corrcoef(ranks[own], run_table["rank"].to_numpy()[own])[0, 1]) < 0.5
        assert (kept["random_keep"][own] == (ranks[own] < facts["kept_per_class"][label])).all()


def test_controls_stand_in_the_evaluation_with_their_size_and_time(with_controls):
    result, of = evaluation(with_controls), sum(PreparedDataset(with_controls.dir / "prepared").counts())
    kept = manifest.facts(with_controls.dir / "manifest.parquet")["kept"]
    assert [line["set"] for line in result["summary"]] == ["distilled", *BOTH, "random_real"]
    assert [line["against"] for line in result["differences"]] == [*BOTH, "random_real"]
    sizes = {name: (facts["kept"], facts["of"], facts["steps"]) for name, facts in result["controls"].items()}
    assert sizes == {"unpruned": (of, of, 3), "random_keep": (kept, of, 3)}
    assert all(facts["seconds"] > 0 for facts in result["controls"].values())
    assert result["distillations"] == 1


def test_a_control_is_the_distillation_of_such_a_run(with_controls, make_run, tmp_path):
    """The unpruned control has the images of a run that keeps everything and drops nothing."""
    plain = make_run(tmp_path / "plain", select__keep=1.0).stages("ingest", "score", "select", "distill")
    (folder,) = with_controls.dir.glob("controls/unpruned-*")
    assert synthetic_set.load(folder).images.equal(synthetic_set.load(plain.dir).images)
    assert not synthetic_set.load(folder).images.equal(synthetic_set.load(with_controls.dir).images)
    assert sorted(path.name for path in folder.iterdir()) == ["control.json", "metrics.jsonl", "synthetic"]


def test_an_interrupted_control_resumes_and_finished_ones_are_not_repeated(make_run, tmp_path, monkeypatch):
    distilled, real = [], tasks.distill

    def distill(executor, config, files, report):
        distilled.append(files.work.parent.name.partition("-")[0])
        if len(distilled) == 3:
            raise KeyboardInterrupt
        real(executor, config, files, report)

    monkeypatch.setattr(tasks, "distill", distill)
    run = make_run(tmp_path / "run", **PRUNED)
    with pytest.raises(KeyboardInterrupt):
        run.stages(*STAGES)
    again = make_run(tmp_path / "run", **PRUNED).stages(*STAGES)
    assert distilled[1:] == ["unpruned", "random_keep", "random_keep"]
    assert "control unpruned: already distilled" in again.text
    other = make_run(tmp_path / "other", **PRUNED, evaluate__seeds=1, run__reuse=str(tmp_path / "run")).stages(*STAGES)
    assert len(distilled) == 4
    assert len(evaluation(other)["rows"]) == 4


def test_a_control_that_would_repeat_the_run_is_left_out_with_the_reason(make_run, tmp_path):
    run = make_run(tmp_path / "run", select__keep=1.0, evaluate__controls=BOTH, evaluate__seeds=1).stages(*STAGES)
    assert "unpruned, random_keep left out, because the run keeps all training samples" in run.text
    assert {row["set"] for row in evaluation(run)["rows"]} == {"distilled", "random_real"}
    assert evaluation(run)["controls"] == {}

"""evaluate.split: held_out: a run without a test split is tested on exactly the samples that nothing was made from."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from distill_at_scale.config.load import validate
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import summary
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.pipeline import warnings
from distill_at_scale.pipeline.report import show
from distill_at_scale.pipeline.run_reader import open_run
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.storage.run_dir import STAGES

KEYS = {
    "data__holdout": None, "select__held_out": 0.3, "evaluate__split": "held_out", "evaluate__bounds": ["full"],
    "evaluate__bound_epochs": 1, "evaluate__controls": ["unpruned", "random_keep"], "distill__method": "dm",
    "distill__evaluate_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tested(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("held-out") / "run", **KEYS).stages(*STAGES)


@pytest.fixture(scope="module")
def outside(tested):
    """The ids that the manifest marks."""
    rows = pq.read_table(tested.dir / "manifest.parquet").to_pylist()
    assert not any(row["kept"] for row in rows if row["rank"] == -1)
    return {row["sample_id"] for row in rows if row["rank"] == -1}


def stored(run, wanted):
    """The pixels of some training samples, read from the shards."""
    tables = [pq.read_table(path) for path in sorted((run.dir / "prepared" / "train").glob("*.parquet"))]
    rows = pa.concat_tables(tables)
    mask = [name in wanted for name in rows["sample_id"].to_pylist()]
    return PreparedDataset(run.dir / "prepared").pixels(rows.filter(pa.array(mask)))


@pytest.fixture(scope="module")
def evaluator(tested):
    folders = (tested.dir / name for name in ("prepared", "synthetic", "manifest.parquet"))
    return Evaluator(tested.config, *folders, torch.device("cpu"))


def test_networks_are_tested_on_the_held_out_samples(tested, outside, evaluator):
    assert len(outside) == sum(int(0.3 * n + 0.5) for n in PreparedDataset(tested.dir / "prepared").counts())
    assert np.array_equal(evaluator.test[0].numpy(), stored(tested, outside))
    rows = json.loads((tested.dir / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert {row["set"] for row in rows} == {"distilled", "unpruned", "random_keep", "random_real", "full"}
    hits = [row["top1"] * len(outside) for row in rows]
    assert np.allclose(hits, np.round(hits), atol=1e-6)
    on_the_way = [
        json.loads(line)
        for line in (tested.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if "top1" in line
    ]
    assert on_the_way[0]["top1"] * len(outside) == pytest.approx(round(on_the_way[0]["top1"] * len(outside)))


def test_no_set_that_it_is_compared_with_holds_one_of_them(tested, outside, evaluator, tmp_path):
    held = {image.tobytes() for image in stored(tested, outside)}
    rest = {name for name in PreparedDataset(tested.dir / "prepared").index()[0] if name not in outside}
    only = held - {image.tobytes() for image in stored(tested, rest)}
    for seed in range(20):
        images = evaluator._training_set(
            EvaluationJob("random_real", "convnet", seed), evaluator.synthetic
        ).images.numpy()
        assert not only & {image.tobytes() for image in images}
    full = evaluator._training_set(EvaluationJob("full", "convnet", 0), evaluator.synthetic)
    assert np.array_equal(full.images.numpy(), stored(tested, rest))
    data = PreparedDataset(tested.dir / "prepared")
    for name in ("unpruned", "random_keep"):
        facts = controls.write_manifest(tested.dir / "manifest.parquet", tmp_path / name, data, name, 0)
        kept = {row["sample_id"] for row in pq.read_table(tmp_path / name).to_pylist() if row["kept"]}
        assert not kept & outside
        assert facts == {"kept": len(kept), "of": len(rest)}
        assert name != "unpruned" or kept == rest


def test_results_are_named_after_the_samples_that_they_were_measured_on(tested, outside, digits_run, tmp_path):
    name, run = "the held-out part of the training split", open_run(tested.dir)
    assert run.tested == {"split": "held_out", "samples": len(outside)}
    assert run.plot_accuracy().axes[0].get_xlabel().startswith(f"top-1 accuracy on {name} in %")
    show.print_folder(show.describe(tested.dir), Console(width=150, file=(out := io.StringIO())))
    assert f"top-1 accuracy on {name}, %" in out.getvalue()
    page = (tested.dir / "report.html").read_text(encoding="utf-8")
    assert f"tested on {name}." in page
    assert "test split" not in out.getvalue() + page
    assert "nothing will be evaluated" not in tested.text
    shutil.copytree(tested.dir, tmp_path / "run")
    (tmp_path / "run" / "stages" / "evaluate.json").unlink()
    assert "evaluate" in open_run(tmp_path / "run").open_stages
    usual = {"split": "test", "samples": sum(PreparedDataset(digits_run.dir / "prepared").counts("test"))}
    assert open_run(digits_run.dir).tested == summary.tested({}, usual["samples"]) == usual


def test_few_held_out_samples_are_warned_of():
    config = validate({"select": {"held_out": 0.2}, "evaluate": {"split": "held_out"}})
    assert list(warnings.of_data(config, ["a"], [500], 0)) == []
    (line,) = warnings.of_data(config, ["a"], [100], 1000)
    expected = "the held-out part of the training split has only 20 samples, and each is 5 points of top-1"
    assert (line.startswith(expected), line.endswith("; raise select.held_out")) == (True, True)


def test_it_needs_a_held_out_part():
    with pytest.raises(UserError, match=r"set select\.held_out, for example to 0\.2"):
        validate({"evaluate": {"split": "held_out"}})

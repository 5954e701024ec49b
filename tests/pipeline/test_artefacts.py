"""What a finished run holds: its files, the record of the run, the manifest, the evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill_at_scale.data.prepared import manifest
from distill_at_scale.distillation import evaluate
from distill_at_scale.distillation.summary import summarize

CORE = ("ingest", "score", "select", "distill", "evaluate")


def test_a_run_leaves_its_artefacts(digits_run):
    for name in (
        "prepared/dataset.json",
        "rejected.parquet",
        "scores.parquet",
        "manifest.parquet",
        "synthetic/card.json",
        "synthetic/synthetic.safetensors",
        "synthetic/preview.png",
        "evaluation.json",
        "metrics.jsonl",
        "run.json",
    ):
        assert (digits_run.dir / name).is_file()
    assert not any((digits_run.dir / ".work").iterdir())
    assert not list(digits_run.dir.rglob("*.tmp"))


def test_the_run_file_records_configuration_and_surroundings(digits_run):
    facts = json.loads((digits_run.dir / "run.json").read_text(encoding="utf-8"))
    assert facts["config"]["distill"]["width"] == 8
    assert facts["versions"]["torch"]
    assert facts["hardware"]["cores"] >= 1
    assert set(facts["seconds"]) == set(CORE)


def test_the_manifest_holds_the_selection_and_where_it_comes_from(digits_run):
    table, facts = manifest.read(digits_run.dir / "manifest.parquet")
    counts = np.bincount(table["label"].to_numpy())
    assert facts["kept_per_class"] == [int(0.2 * n + 0.5) for n in counts]
    assert (facts["asked"], facts["criterion"], facts["order"]) == ({"keep": 0.2}, "loss", "useful")
    record = digits_run.pipeline.dir.record("select")
    assert facts["fingerprint"] == record["fingerprint"]
    assert facts["scores"] == record["content"]["score"]
    assert facts["reached"] == pytest.approx(sum(facts["kept_per_class"]) / counts.sum())


def test_the_evaluation_has_a_row_per_job_and_a_summary(digits_run):
    evaluation = json.loads((digits_run.dir / "evaluation.json").read_text(encoding="utf-8"))
    jobs = [evaluate.EvaluationJob(row["set"], row["network"], row["seed"]) for row in evaluation["rows"]]
    assert jobs == evaluate.jobs(digits_run.config)
    assert evaluation["summary"] == summarize(evaluation["rows"])
    assert all({"top1", "top5", "seconds"} <= set(row) for row in evaluation["rows"])

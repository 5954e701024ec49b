"""Checks of a finished distillation: images equal to real ones, a loss that never moved, the measured share."""

from __future__ import annotations

import json

import pytest
import torch

from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.placement import kept_places
from distill_at_scale.distillation import result_checks, synthetic_set


def log_of(folder, losses, shares=()):
    lines = [{"stage": "distill", "step": i, "loss": loss} for i, loss in enumerate(losses)]
    lines += [{"stage": "distill", "step": i, "loss": 1.0 + i, "real_share": share} for i, share in enumerate(shares)]
    path = folder / "metrics.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, [{"stage": "distill", "held": "x"}, *lines])) + '\n{"stage": "dis', encoding="utf-8"
    )
    return path


def real_set(digits_run, change):
    """The run's set with the first kept sample of each class as its images, each changed by `change` (normalised)."""
    data, manifest = PreparedDataset(digits_run.dir / "prepared"), digits_run.dir / "manifest.parquet"
    synthetic = synthetic_set.load(digits_run.dir)
    for row, label in enumerate(synthetic.labels.tolist()):
        places = kept_places(data, manifest, [label])[label][:1]
        synthetic.images[row] = normalization_of(data).apply(torch.from_numpy(data.take("train", label, places)))[0]
        synthetic.images[row] += change[row]
    return synthetic, data, manifest


def test_images_equal_to_real_samples_are_counted(digits_run, tmp_path):
    noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    synthetic, data, manifest = real_set(digits_run, [0.0, 0.5 * noise, 0.005 * noise])
    assert result_checks.equal_to_real(synthetic, data, manifest) == (2, 3, 0)
    (line,) = result_checks.warnings(digits_run.config, synthetic, data, manifest, log_of(tmp_path, (3.0, 2.0, 1.0)))
    assert line.startswith("2 of 3 distilled samples equal a kept real sample of their class")
    assert "raise distill.steps" in line


def test_a_distilled_set_of_the_run_equals_no_real_sample(digits_run):
    data, manifest = PreparedDataset(digits_run.dir / "prepared"), digits_run.dir / "manifest.parquet"
    assert result_checks.equal_to_real(synthetic_set.load(digits_run.dir), data, manifest) == (0, 3, 0)


def test_further_classes_are_not_compared(digits_run, monkeypatch):
    monkeypatch.setattr(result_checks, "MOST_BYTES", 1)
    synthetic, data, manifest = real_set(digits_run, [0.0] * 3)
    assert result_checks.equal_to_real(synthetic, data, manifest) == (1, 1, 0)


def test_classes_that_keep_no_more_than_ipc_are_flagged_in_log_card_and_record(make_run, tmp_path):
    """Distribution matching of two samples with two images that start from them has nothing to learn."""
    run = make_run(
        tmp_path / "run", select__per_class=2, distill__method="dm", distill__dm__augment="none", distill__ipc=2
    )
    run.stages("ingest", "score", "select", "distill")
    warnings = synthetic_set.load(run.dir).card["warnings"]
    assert warnings == json.loads((run.dir / "stages" / "distill.json").read_text(encoding="utf-8"))["warnings"]
    assert warnings[-1] == (
        "6 of 6 distilled samples equal a kept real sample of their class: 3 classes keep no more samples than distill.ipc = "
        "2; raise select.keep"
    )
    assert all(f"warning: {line}" in run.text for line in warnings)


def test_a_sound_set_has_no_warnings(digits_run):
    assert "warnings" not in synthetic_set.load(digits_run.dir).card


@pytest.mark.parametrize(
    ("losses", "start"),
    [((0.0, 0.0), "the loss was 0"), ((1e-12, 0.0), "the loss was 0"), ((2.5, 2.5, 2.5), "the loss was 2.5"),
     ((2.5, 2.5), None), ((2.5, 2.5, 2.4), None), ((), None)],
)  # fmt: skip
def test_a_loss_that_never_moves_is_said(digits_run, tmp_path, losses, start):
    synthetic, data = synthetic_set.load(digits_run.dir), PreparedDataset(digits_run.dir / "prepared")
    log = log_of(tmp_path, losses)
    lines = result_checks.warnings(digits_run.config, synthetic, data, digits_run.dir / "manifest.parquet", log)
    assert [line.startswith(start) for line in lines] == ([] if start is None else [True])


def test_the_dropped_share_is_that_of_the_log(tmp_path):
    assert result_checks.dropped_share(log_of(tmp_path, (1.0,))) is None
    assert result_checks.dropped_share(tmp_path / "missing.jsonl") is None
    assert result_checks.dropped_share(log_of(tmp_path, (), (0.75, 0.8, 0.7))) == pytest.approx(0.25)


def test_a_batch_too_small_for_the_configured_share_drops_less(make_run, tmp_path):
    """Of three samples, 30 % are none."""
    run = make_run(tmp_path / "run", runtime__rule="loss", runtime__drop=0.3, distill__dc__real_batch=3)
    run.stages("ingest", "score", "select", "distill")
    assert json.loads((run.dir / "stages" / "distill.json").read_text(encoding="utf-8"))["dropped_share"] == 0.0
    assert "left out 0.0% of the real batches (runtime.drop: 30.0%)" in run.text

"""ZCA: its effect on the data, its inverse, and that distillation and evaluation use it but scoring does not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.evaluate import Evaluator
from distill_at_scale.pipeline import validate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whitened(tmp_path_factory, make_run):
    run = make_run(tmp_path_factory.mktemp("zca") / "run", data__whiten="zca", distill__method="dm", evaluate__seeds=1)
    return run.stages("ingest", "score", "select", "distill", "evaluate", "report")


def test_whitened_data_are_uncorrelated_up_to_epsilon(whitened):
    prepared = PreparedDataset(whitened.dir / "prepared")
    pixels = torch.from_numpy(prepared.load("train")[0])
    plain = normalization_of(prepared, whitened=False).apply(pixels).flatten(1).double()
    whitened_values = normalization_of(prepared).apply(pixels).flatten(1).double()
    values, vectors = np.linalg.eigh(np.cov(plain.numpy().T))
    expected = (vectors * (values / (values + 0.1))) @ vectors.T
    assert np.allclose(np.cov(whitened_values.numpy().T), expected, atol=1e-4)
    assert whitened_values.mean(0).abs().max() < 1e-4


def test_the_round_trip_gives_the_pixels_back(whitened):
    prepared = PreparedDataset(whitened.dir / "prepared")
    pixels = torch.from_numpy(prepared.load("train")[0])
    norm = normalization_of(prepared)
    assert torch.equal(norm.stored(norm.apply(pixels)), pixels)
    assert float((norm.invert(norm.apply(pixels)) - pixels / 255).abs().max()) < 1e-5


def test_the_inverse_of_a_nearly_singular_covariance_is_exact(tmp_path):
    chance = np.random.default_rng(0)
    few = chance.normal(size=(20, 200)) * 30
    matrix = torch.from_numpy(whitening.inverse_root(np.cov(few.T)))
    fitted = whitening.Whitening(torch.zeros(200), matrix)
    samples = torch.from_numpy(few).float()
    assert float((fitted.invert(fitted.apply(samples)) - samples).abs().max()) < 1e-4 * float(samples.abs().max())
    fitted.save(tmp_path)
    assert torch.equal(whitening.Whitening.load(tmp_path).apply(samples), fitted.apply(samples))


def test_draws_are_whitened_and_a_saved_set_knows_how(whitened):
    prepared = PreparedDataset(whitened.dir / "prepared")
    pool = ClassSampler.load(prepared, whitened.dir / "manifest.parquet", [0], 0, CPU)
    draw = pool.draw([0], 5, "x", 0)[0]
    assert torch.equal(draw.images, normalization_of(prepared).apply(pool.pixels[0][draw.rows]))
    synthetic = synthetic_set.load(whitened.dir)
    assert synthetic.card["whitening"]["kind"] == "zca"
    assert synthetic.card["whitening"]["epsilon"] == 0.1
    assert torch.equal(synthetic.normalization.apply(pool.pixels[0]), normalization_of(prepared).apply(pool.pixels[0]))
    assert synthetic.pixels().dtype == torch.uint8
    assert torch.equal(synthetic.snapshots[max(synthetic.snapshots)], synthetic.pixels())


def test_a_real_start_looks_like_real_samples(whitened):
    """Before the first step the images are whitened real samples: shown, they are these samples."""
    synthetic, prepared = synthetic_set.load(whitened.dir), PreparedDataset(whitened.dir / "prepared")
    first = synthetic.snapshots[0][0].numpy()
    assert (prepared.load("train", labels=[0])[0] == first).all((1, 2, 3)).any()


def test_evaluation_sees_whitened_tests_and_controls(whitened):
    folders = (whitened.dir / "prepared", whitened.dir / "synthetic", whitened.dir / "manifest.parquet")
    evaluator = Evaluator(whitened.config, *folders, CPU)
    assert evaluator.synthetic.normalization.whitening is not None


def test_scores_do_not_see_the_whitening(whitened, digits_run):
    assert (whitened.dir / "scores.parquet").read_bytes()[:1000] == (digits_run.dir / "scores.parquet").read_bytes()[
        :1000
    ]


def test_a_plain_set_stays_as_it_was(digits_run):
    meta = json.loads((digits_run.dir / "prepared" / "dataset.json").read_text(encoding="utf-8"))
    assert not {"whiten", "kind"} & set(meta)
    assert not (digits_run.dir / "prepared" / whitening.FILE).exists()
    assert synthetic_set.load(digits_run.dir).card["whitening"] is None


def test_samples_that_are_too_large_are_refused_before_anything_is_read(make_config, tmp_path):
    config = make_config(tmp_path, data__whiten="zca", data__size=112, data__channels=3)
    with pytest.raises(UserError, match=r"37,632 values.*at most 12,288.*lower data\.size"):
        validate.check_names(config)

"""On a CUDA device: the whole pipeline runs there, resumes to the same bytes, and its matching agrees with the CPU's."""

from __future__ import annotations

import pytest
import torch

from distill_at_scale.backends.gradients import real_gradient
from distill_at_scale.distill import Distillation
from distill_at_scale.networks import NetworkSpec
from distill_at_scale.workers import Solo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_every_stage_runs_on_the_gpu(tmp_path, make_run, method):
    run = make_run(tmp_path / "run", distill__method=method, runtime__rule="loss").stages(*STAGES)
    assert (run.dir / "report.html").exists()


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_every_stage_runs_on_the_gpu_for_clips(tmp_path, make_run, method):
    data = {"source": "moving_digits", "path": str(tmp_path / "clips"), "frames": 8, "size": 16}
    options = {"score__network": "convnet3d", "distill__network": "convnet3d", "evaluate__networks": ["convnet3d"]}
    run = make_run(tmp_path / "run", data=data, distill__method=method, runtime__rule="loss", **options).stages(*STAGES)
    assert (run.dir / "report.html").exists()


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_a_resumed_distillation_on_the_gpu_ends_with_the_same_bytes(tmp_path, places, make_config, method):
    def images(steps: int, folder: str) -> torch.Tensor:
        config = make_config(tmp_path, distill__method=method, distill__steps=steps, runtime__rule="loss")
        here = type(places)(places.prepared, places.manifest, tmp_path / folder, tmp_path / f"{folder}.jsonl")
        made = Distillation(config, here, Solo(), torch.device("cuda")).run()
        assert made is not None
        return made.images

    whole = images(6, "whole")
    images(4, "parts")
    assert torch.equal(images(6, "parts"), whole)


def test_the_real_gradient_agrees_with_the_cpu():
    spec = NetworkSpec("convnet", (3, 16, 16), 10, 16)
    batch = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = spec.build(0)
    on_cpu = real_gradient(network, batch, 3, 8)
    on_gpu = real_gradient(network.cuda(), batch.cuda(), 3, 32)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-5)

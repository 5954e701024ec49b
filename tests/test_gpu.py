"""On a CUDA device: every method's pipeline runs there, resumes to the same images, and computes what the CPU computes."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL

from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.engine import Distillation, method_class, method_context
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.shared.gradient_distance import real_gradient
from distill_at_scale.models.spec import NetworkSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")
MATCHING = ("dc", "dsa", "dm", "idc")


def keys(method: str, **more):
    return {"distill__method": method, "distill__ipc": 2, f"distill__{method}": SMALL[method], **more}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_stage_runs_on_the_gpu(tmp_path, make_run, method):
    run = make_run(tmp_path / "run", **keys(method, runtime__rule="loss")).stages(*STAGES)
    assert (run.dir / "report.html").exists()
    steps = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(line.get("gpu_peak_bytes", 0) > 0 for line in steps)


@pytest.mark.parametrize("method", MATCHING)
def test_individual_effects_are_ranked_on_the_gpu(tmp_path, make_run, method):
    run = make_run(tmp_path / "run", **keys(method, runtime__rule="ite")).stages(*STAGES)
    assert (run.dir / "report.html").exists()


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_every_stage_runs_on_the_gpu_for_clips(tmp_path, make_run, method):
    data = {"source": "moving_digits", "path": str(tmp_path / "clips"), "frames": 8, "size": 16}
    options = {"score__network": "convnet3d", "distill__network": "convnet3d", "evaluate__networks": ["convnet3d"]}
    run = make_run(tmp_path / "run", data=data, distill__method=method, runtime__rule="loss", **options).stages(*STAGES)
    assert (run.dir / "report.html").exists()


@pytest.mark.parametrize("method", MATCHING)
def test_a_resumed_distillation_on_the_gpu_ends_with_the_same_images(tmp_path, places, make_config, method):
    def images(steps: int, folder: str) -> torch.Tensor:
        config = make_config(tmp_path, **keys(method, distill__steps=steps, runtime__rule="loss"))
        here = type(places)(places.prepared, places.manifest, tmp_path / folder, tmp_path / f"{folder}.jsonl")
        result = Distillation(config, here, SingleProcess(), torch.device("cuda")).run()
        assert result is not None
        return result.images

    whole = images(6, "whole")
    images(4, "parts")
    resumed = images(6, "parts")
    if method in ("dsa", "idc"):  # the way back through an augmentation adds up in no fixed order on a GPU
        torch.testing.assert_close(resumed, whole, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(resumed, whole)


@pytest.mark.parametrize("rule", ["none", "loss", "ite"])
@pytest.mark.parametrize("method", MATCHING)
def test_the_first_step_agrees_with_the_cpu(places, make_config, monkeypatch, method, rule):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    one = {"dc": {"outer": 1}, "dsa": {"outer": 1, "augment": "none"}, "dm": {"augment": "none"},
           "idc": SMALL["idc"] | {"inner": 1, "augment": "none"}}[method]  # fmt: skip
    config = make_config("unused", **keys(method, runtime__rule=rule) | {f"distill__{method}": one})
    on_cpu, on_gpu = (gradient_of_a_step(config, places, torch.device(name)) for name in ("cpu", "cuda"))
    assert on_cpu.norm() > 0
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 1e-3


def gradient_of_a_step(config, places, device: torch.device) -> torch.Tensor:
    prepared = PreparedDataset(places.prepared)
    setting = method_context(config, prepared, places, SingleProcess(), device)
    backend = method_class(config)(setting)
    backend.prepare(ClassSampler.load(prepared, places.manifest, setting.labels, config.distill_seed, device))
    backend.step(0)
    return backend.images.grad.cpu()


def test_the_real_gradient_agrees_with_the_cpu():
    spec = NetworkSpec("convnet", (3, 16, 16), 10, 16)
    batch = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = spec.build(0)
    on_cpu = real_gradient(network, batch, 3, 8)
    on_gpu = real_gradient(network.cuda(), batch.cuda(), 3, 32)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-5)

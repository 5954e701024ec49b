"""The precision of a run: `auto` is resolved once, by the driver, and recorded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from distill_at_scale.core.errors import OtherConfiguration
from distill_at_scale.core.progress import Display
from distill_at_scale.models import precision
from distill_at_scale.models.precision import autocast, resolve, resolved
from distill_at_scale.pipeline.export import export


def on_cpu_with(monkeypatch, bf16):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_auto_is_bf16_where_the_device_computes_in_it(monkeypatch, bf16):
    on_cpu_with(monkeypatch, bf16)
    assert resolve("auto", on_gpu=False) == ("bf16" if bf16 else "fp32")
    assert resolve("auto", on_gpu=True) == "bf16"
    assert resolve("fp32", on_gpu=True) == "fp32"
    assert resolve("bf16", on_gpu=False) == "bf16"


@pytest.mark.parametrize(
    ("units", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False), ({}, False)],
)
def test_units_of_the_cpu(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert precision.cpu_has_bf16.__wrapped__() is expected


@pytest.mark.parametrize("supported", [False, True])
def test_units_of_the_cpu_with_an_older_torch(monkeypatch, supported):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert precision.cpu_has_bf16.__wrapped__() is supported


def test_weights_and_gradients_stay_in_float32():
    layer, device = nn.Linear(3, 2), torch.device("cpu")
    with autocast("bf16", device):
        output = layer(torch.ones(1, 3))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.weight.dtype == torch.float32
    with autocast("fp32", device):
        assert layer(torch.ones(1, 3)).dtype == torch.float32


def test_a_run_resolves_auto_once_and_records_what_it_used(monkeypatch, make_config, make_run, tmp_path):
    on_cpu_with(monkeypatch, True)
    auto = {f"{section}__precision": "auto" for section in precision.SECTIONS}
    config = resolved(make_config(tmp_path, **auto))
    assert (config.score.precision, config.distill.precision, config.evaluate.precision) == ("bf16",) * 3
    run = make_run(tmp_path / "run", **auto)
    assert run.pipeline.config.score.precision == "bf16"  # what executors get
    assert run.pipeline.context.requested.score.precision == "auto"
    run.stages("ingest", "score", "select", "distill", "evaluate")
    assert json.loads((run.dir / "run.json").read_text(encoding="utf-8"))["config"]["score"]["precision"] == "auto"
    used = {"score": "score.precision", "distill": "distill.precision", "evaluate": "evaluate.precision"}
    export(run.config, [tmp_path / "scores.csv"], [], {}, Display.silent())  # accepts what auto made
    assert (tmp_path / "scores.csv").exists()
    before = {stage: run.pipeline.inputs(stage).fingerprint for stage in used}
    for stage, key in used.items():
        assert run.pipeline.dir.record(stage)["config"][key] == "bf16"

    on_cpu_with(monkeypatch, False)  # the same folder on a machine without bf16 units
    elsewhere = make_run(tmp_path / "run", **auto).pipeline
    for stage in used:
        assert elsewhere.inputs(stage).fingerprint != before[stage]
    with pytest.raises(OtherConfiguration, match=r"score\.precision"):
        elsewhere.run(("score",))

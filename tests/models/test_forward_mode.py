"""How a stage runs its network: compiled or not, in which precision, and what happens without a compiler."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch import nn

from distill_at_scale.distillation.methods.base import USUAL_WORKERS
from distill_at_scale.models import precision
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec, last_linear

CPU, SPEC = torch.device("cpu"), NetworkSpec("convnet", (3, 32, 32), 10, width=32)
HALF_OF_CIFAR10 = 25_000


def mode(choice="always", wanted="auto", on_gpu=False, **work):
    return ForwardMode(SPEC, choice, wanted, on_gpu, **work)


def told(images, used):
    """A function that shows which precision it got."""
    return torch.full((1,), 16.0 if used == "bf16" else 32.0)


@pytest.fixture
def units(monkeypatch):
    """A CPU with bf16 units."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)


def test_small_work_is_not_compiled_and_large_work_is():
    assert not mode("auto", trained=1000).compiled
    assert not mode("never", trained=1e12).compiled
    assert mode("auto", trained=1e8).compiled
    assert mode("auto", passed=1e8).compiled
    assert mode("always").compiled


def test_one_narrow_proxy_and_the_unpruned_control_of_the_digits_are_not_compiled_and_several_proxies_are(units):
    digits = NetworkSpec("convnet", (1, 8, 8), 10, width=64)
    real_images = 200 * 1347  # 200 steps with all training samples
    assert not mode("auto", trained=HALF_OF_CIFAR10).compiled
    assert mode("auto", trained=4 * HALF_OF_CIFAR10).compiled
    assert not ForwardMode(digits, "auto", "auto", False, trained=real_images, processes=USUAL_WORKERS).compiled


def test_the_note_says_what_was_decided_and_why(units):
    assert mode("never").note == "fp32, not compiled"
    assert mode("always").note == "bf16, compiled"
    assert mode("auto", trained=1e6).note.startswith("bf16, compiled (saves about ")
    assert mode("auto", trained=10).note.startswith("fp32, not compiled (")


@pytest.mark.parametrize("wanted", ["auto", "bf16"])
def test_bf16_on_a_cpu_is_for_compiled_code_only(wanted, units, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    images = torch.zeros(1)
    assert mode("never", wanted).compile(told)(images) == 32
    assert mode("always", wanted).compile(told)(images) == 16
    assert mode("always", wanted).eager(told)(images) == 32
    assert mode("always", "fp32").compile(told)(images) == 32
    for function in (ForwardMode.compile, ForwardMode.eager):
        assert function(mode("never", wanted, on_gpu=True), told)(images) == 16


def test_without_a_working_compiler_everything_runs_eagerly_in_float32(units, monkeypatch):
    failure = type("CompileError", (Exception,), {"__module__": "torch._inductor.exc"})

    def broken(images, used):
        raise failure("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    chosen = mode()
    first, second = chosen.compile(told), chosen.compile(told)
    with pytest.warns(UserWarning, match=r"does not work here \(no C\+\+ compiler\); running eagerly in fp32"):
        assert first(torch.ones(2)) == 32
    assert not chosen.compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first(torch.ones(2)) == second(torch.ones(2)) == 32  # warns once


def test_an_error_of_the_network_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        mode().compile(lambda images, used: layer(images))(torch.ones(1, 3))


def test_each_shape_gets_code_of_its_own_whatever_was_compiled_before(monkeypatch):
    """Neither torch's automatic dynamic shapes nor its limit of 8 recompilations may change what a shape runs."""
    shapes, run_eagerly = [], []

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def double(images, used):
        if not torch.compiler.is_compiling():
            run_eagerly.append(len(images))
        return images * 2

    for _ in range(2):  # two stages of one process
        forward = mode().compile(double)
        for count in range(2, 13):
            assert torch.equal(forward(torch.ones(count, 3)), torch.full((count, 3), 2.0))
    assert shapes == [[(count, 3)] for count in range(2, 13)]
    assert not run_eagerly


IN_A_PROCESS = """
import sys, warnings, torch
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.precision import autocast
from distill_at_scale.models.spec import NetworkSpec, last_linear
torch.set_num_threads(1)
spec = NetworkSpec("mlp", (3, 8, 8), 2, width=4, depth=1)
network, device = spec.build(0), torch.device("cpu")
mode = ForwardMode(spec, "always", "bf16", False)
def run(images, precision):
    with autocast(precision, device):
        return network(images).float()
forward = mode.compile(run)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for count in map(int, sys.argv[1:]):
        images = torch.randn(count, *spec.shape, generator=torch.Generator().manual_seed(count))
        logits = forward(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
print([str(w.message) for w in seen if "running eagerly" in str(w.message)])
print(mode.compiled, torch.equal(logits, run(images, "fp32")))
print([x.numpy().tobytes().hex() for x in (logits.detach(), *gradients)])
"""


def printed(folder, *counts, **environment):
    places = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *map(str, counts)], capture_output=True, text=True, cwd=folder, timeout=300,
        env={"PATH": "/usr/bin:/bin", "TORCHINDUCTOR_COMPILE_THREADS": "1", **places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_bytes_do_not_depend_on_what_the_process_compiled_before(tmp_path):
    fresh, later = printed(tmp_path, 5), printed(tmp_path, 3, 5)
    assert fresh[1] == later[1] == "True False"  # compiled, in bf16
    assert fresh[2] == later[2]


def test_without_a_compiler_a_run_warns_and_continues(tmp_path):
    """The real torch.compile, in a process that finds no C++ compiler."""
    warned, state, _ = printed(tmp_path, 2, 3, CXX="/nonexistent", PATH="/nonexistent")
    assert warned.count("torch.compile does not work here") == 1
    assert "C++ compiler" in warned
    assert state == "False True"  # not compiled, in float32


@pytest.mark.parametrize("name", ["convnet", "mlp", "resnet18", "torchvision:resnet18"])
def test_close_logits_do_not_become_equal_in_bf16(name):
    network = NetworkSpec(name, (3, 32, 32), 2, width=4).build(0).eval()
    head = last_linear(network)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([1.0, 1.001])
    with torch.no_grad(), autocast("bf16", CPU):
        logits = network(torch.randn(3, 3, 32, 32))
    assert logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == [1, 1, 1]


def test_the_float32_layer_follows_shapes_on_the_meta_device():
    network = SPEC.build(0).to("meta")
    assert network(torch.zeros(2, *SPEC.shape, device="meta")).shape == (2, 10)

"""Networks by name: their shapes, their seeds, and how a batch goes through them in parts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from distill_at_scale import networks
from distill_at_scale.errors import UserError
from distill_at_scale.networks import (
    NETWORKS,
    ConvNet,
    NetworkSpec,
    default_depth,
    in_parts,
    maybe_compile,
    mixes_samples,
)

SMALLEST = {"convnet": 8, "alexnet": 8, "vgg11": 8, "resnet18": 16, "resnet18_bn": 16}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_classifies_its_features(name, channels):
    side = SMALLEST[name]
    network = NetworkSpec(name, (channels, side, side), 5, width=8).build(0)
    images = torch.randn(2, channels, side, side)
    features = network.embed(images)
    assert features.dim() == 2
    assert network(images).shape == (2, 5)
    assert torch.allclose(network.eval()(images), network.classifier(network.embed(images)), atol=1e-6)


def test_a_seed_decides_the_weights_and_leaves_the_default_generator_alone():
    spec = NetworkSpec("convnet", (1, 8, 8), 3, width=4)
    before = torch.random.get_rng_state()
    first, same, other = (spec.build(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_the_convnet_is_the_standard_one():
    """Three blocks of conv, instance norm, ReLU, pool: 320,010 parameters at width 128, 32 x 32, 10 classes."""
    network = ConvNet((3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == 320_010
    assert [type(m).__name__ for m in network.features] == ["Conv2d", "GroupNorm", "ReLU", "AvgPool2d"] * 3 + [
        "Flatten"
    ]
    assert all(m.num_groups == m.num_channels and m.affine for m in network.modules() if isinstance(m, nn.GroupNorm))


def test_the_convnet_pads_mnist_to_32():
    assert ConvNet((1, 28, 28), 10).embed(torch.zeros(1, 1, 28, 28)).shape == (1, 128 * 4 * 4)


@pytest.mark.parametrize(
    ("pixels", "depth"), [(4, 1), (8, 2), (16, 2), (28, 3), (32, 3), (64, 4), (128, 5), (224, 6), (256, 6)]
)
def test_depth_grows_with_the_resolution(pixels, depth):
    assert default_depth(pixels) == depth


def test_what_does_not_fit_the_pixels_is_refused():
    with pytest.raises(UserError, match="too deep"):
        NetworkSpec("convnet", (1, 8, 8), 3, depth=4).build(0)
    with pytest.raises(UserError, match="at least 16"):
        NetworkSpec("resnet18", (1, 8, 8), 3).build(0)


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(UserError, match="did you mean convnet"):
        NetworkSpec("convnett", (1, 8, 8), 3).build(0)


def test_only_batch_norm_mixes_samples():
    assert {name for name in NETWORKS if mixes_samples(NetworkSpec(name, (3, 16, 16), 2, 8).build(0))} == {
        "resnet18_bn"
    }


@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11", "resnet18"])
def test_samples_do_not_see_each_other(name):
    network = NetworkSpec(name, (1, 16, 16), 3, width=8).build(0).train()
    images = torch.randn(4, 1, 16, 16)
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_parts_of_one_size_give_the_same_as_the_whole(count):
    sizes = []

    def double(part):
        sizes.append(len(part))
        return part * 2

    images = torch.randn(count, 2)
    assert torch.equal(in_parts(double, images, 4), images * 2)
    assert all(size == 4 for size in sizes) or count <= 4


def test_small_jobs_are_not_compiled():
    network = nn.Linear(2, 2)
    assert maybe_compile(network, "never", 10**9) is network
    assert maybe_compile(network, "auto", 1000) is network


def test_without_a_working_compiler_the_network_runs_as_it_is(monkeypatch):
    failure = type("CompileError", (Exception,), {"__module__": "torch._inductor.exc"})

    def no_compiler(network):
        def broken(images):
            raise failure("no C++ compiler")

        return broken

    monkeypatch.setattr(networks.torch, "compile", no_compiler)
    forward = maybe_compile(nn.Identity(), "always", 1)
    with pytest.warns(UserWarning, match="does not work here"):
        assert torch.equal(forward(torch.ones(2)), torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(forward(torch.ones(2)), torch.ones(2))  # said once


def test_an_error_of_the_network_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(networks.torch, "compile", lambda network: network)
    with pytest.raises(RuntimeError):
        maybe_compile(nn.Linear(2, 2), "always", 1)(torch.ones(1, 3))

"""Networks by name: their shapes, their seeds, and how a batch goes through them in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_at_scale.core.errors import UserError
from distill_at_scale.models.image import ConvNet, FastAvgPool2d, default_depth
from distill_at_scale.models.spec import OF_IMAGES, MemoryFormat, NetworkSpec, in_parts, mixes_samples

RESNETS = ["resnet18", "resnet18_bn", "resnet50", "resnet50_bn"]
SMALLEST = {"convnet": 8, "alexnet": 8, "vgg11": 8, "convnet_bn": 8, **dict.fromkeys(RESNETS, 16)}


@pytest.mark.parametrize("name", sorted(OF_IMAGES))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_classifies_its_features(name, channels):
    side = SMALLEST[name]
    network = NetworkSpec(name, (channels, side, side), 5, width=8).build(0)
    images = torch.randn(2, channels, side, side)
    features = network.embed(images)
    assert features.dim() == 2
    assert network(images).shape == (2, 5)
    assert torch.allclose(network.eval()(images), network.classifier(network.embed(images)), atol=1e-6)


def test_a_seed_decides_the_weights_and_does_not_touch_the_default_generator():
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
    assert [type(m).__name__ for m in network.features] == ["Conv2d", "GroupNorm", "ReLU", "FastAvgPool2d"] * 3 + [
        "Flatten"
    ]
    assert all(m.num_groups == m.num_channels and m.affine for m in network.modules() if isinstance(m, nn.GroupNorm))


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 3, 7, 7), (1, 4, 2, 2)])
def test_pooling_is_that_of_torch_in_the_values_and_their_gradients(shape):
    images = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pooled, expected = FastAvgPool2d(2)(images), torch.nn.functional.avg_pool2d(images, 2)
    assert torch.allclose(pooled, expected)
    weights = torch.rand_like(expected)
    both = [torch.autograd.grad((each * weights).square().sum(), images)[0] for each in (pooled, expected)]
    assert torch.allclose(*both)
    assert torch.autograd.gradgradcheck(FastAvgPool2d(2), (images,))


def test_pooling_rounds_bfloat16_once():
    images = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(FastAvgPool2d(2)(images), torch.nn.functional.avg_pool2d(images, 2))


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
    for name in RESNETS:
        with pytest.raises(UserError, match="at least 16"):
            NetworkSpec(name, (1, 8, 8), 3).build(0)


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(UserError, match="did you mean convnet"):
        NetworkSpec("convnett", (1, 8, 8), 3).build(0)


@pytest.mark.parametrize("layers", [18, 50])
def test_with_batch_norm_a_large_resnet_is_torchvisions(layers):
    """Weight for weight by name and shape, so that published weights fit; equal logits are checked in test_pretrained."""
    from torchvision.models import get_model

    ours = NetworkSpec(f"resnet{layers}_bn", (3, 224, 224), 1000).skeleton().state_dict()
    theirs = get_model(f"resnet{layers}").state_dict()
    named = {key.removeprefix("net.").replace("classifier.", "fc."): value.shape for key, value in ours.items()}
    assert named == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(("side", "kernel"), [(64, 3), (65, 7)])
@pytest.mark.parametrize("name", RESNETS)
def test_up_to_64_pixels_a_resnet_has_the_small_stem(name, side, kernel):
    network = NetworkSpec(name, (3, side, side), 2).skeleton()
    assert network.net.conv1.kernel_size == (kernel, kernel)
    assert isinstance(network.net.maxpool, nn.Identity) == (kernel == 3)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_x_400mf"])
def test_torchvisions_classifiers_are_built_by_name(name):
    from torchvision.models import get_model

    actual = NetworkSpec(f"torchvision:{name}", (3, 32, 32), 7).build(0).state_dict()
    expected = get_model(name, num_classes=7).state_dict()
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}


def test_torchvision_networks_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match=r"'torchvision:mobilenet_v3_smal' is no classifier.*mean mobilenet_v3_small"):
        NetworkSpec("torchvision:mobilenet_v3_smal", (3, 32, 32), 7).build(0)
    with pytest.raises(UserError, match="is no classifier"):  # torchvision has it, for segmentation
        NetworkSpec("torchvision:fcn_resnet50", (3, 32, 32), 7).build(0)
    with pytest.raises(UserError, match="outputs besides its logits"):
        NetworkSpec("torchvision:inception_v3", (3, 299, 299), 7).build(0)
    with pytest.raises(UserError, match="takes 3 channels, the data has 1"):
        NetworkSpec("torchvision:resnet18", (1, 32, 32), 7).build(0)


@pytest.mark.parametrize(
    ("name", "side", "floats"),
    [
        ("convnet", 64, 8 * 64 * 64),
        ("alexnet", 32, 128 * 32 * 32),
        ("vgg11", 64, 64 * 64 * 64),
        ("resnet18", 32, 64 * 32 * 32),
        ("resnet18_bn", 224, 64 * 112 * 112),
        ("resnet50_bn", 64, 256 * 64 * 64),
        ("resnet50", 224, 64 * 112 * 112),
        ("torchvision:resnet18", 224, 64 * 112 * 112),
    ],
)
def test_work_is_the_widest_layer(name, side, floats):
    assert NetworkSpec(name, (3, side, side), 5, width=8).activation_bytes(3) == 3 * 4 * floats


def test_the_work_of_a_network_that_looks_at_its_numbers_is_measured_on_the_cpu():
    assert NetworkSpec("test_networks:Suspicious", (2, 3, 5), 4).activation_bytes(1) == 6 * 3 * 5 * 4


def Suspicious(spec):
    class Network(nn.Conv2d):
        def forward(self, images):
            return super().forward(images) * float(self.weight.detach().sum())

    network = Network(spec.shape[0], 6, 1)
    assert float(network.weight.detach().abs().sum()) > 0
    return network


def test_a_core_takes_as_many_images_as_keep_a_layer_close():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert NetworkSpec("convnet", (3, 32, 32), 10).microbatch(cpu) == 16
    assert NetworkSpec("resnet50_bn", (3, 224, 224), 10).microbatch(cpu) == 4
    assert NetworkSpec("resnet50_bn", (3, 224, 224), 10).microbatch(gpu) == 167


def test_only_batch_norm_mixes_samples():
    assert {name for name in OF_IMAGES if mixes_samples(NetworkSpec(name, (3, 16, 16), 2, 8).build(0))} == {
        "convnet_bn",
        "resnet18_bn",
        "resnet50_bn",
    }


@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11", "resnet18", "resnet50"])
def test_samples_do_not_see_each_other(name):
    network = NetworkSpec(name, (1, 16, 16), 3, width=8).build(0).train()
    images = torch.randn(4, 1, 16, 16)
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-3)  # 2 x 2 pixels magnify rounding


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_parts_of_one_size_give_the_same_as_the_whole(count):
    sizes = []

    def double(part):
        sizes.append(len(part))
        return part * 2

    images = torch.randn(count, 2)
    assert torch.equal(in_parts(double, images, 4), images * 2)
    assert all(size == 4 for size in sizes) or count <= 4
    sizes.clear()
    assert torch.equal(in_parts(double, images, 4, one_shape=True), images * 2)
    assert all(size == 4 for size in sizes) or not count


@pytest.mark.parametrize("name", sorted(OF_IMAGES))
@torch.no_grad()
def test_the_layout_in_memory_does_not_change_the_logits(name):
    spec = NetworkSpec(name, (3, 32, 32), 3, width=8)
    network, images = spec.build(0).eval(), torch.randn(2, 3, 32, 32)
    expected = network(images)
    actual = MemoryFormat(spec, True).network(network)(MemoryFormat(spec, True).images(images))
    assert torch.allclose(actual, expected, atol=1e-4)


def test_a_network_of_one_frame_takes_clips_of_a_stated_kind():
    spec = NetworkSpec("frame:convnet", (4, 3, 16, 16), 5, width=4, kind="clips")
    assert spec.build(0)(torch.zeros(2, *spec.shape)).shape == (2, 5)

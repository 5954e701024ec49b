"""Distance and gradients of gradient matching against a reference that goes layer by layer, channel by channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matching_cases import of_one_class, reference_distance, reference_gradient

from distill_at_scale.distillation.methods.shared import class_gradients as classwise
from distill_at_scale.distillation.methods.shared import gradient_distance
from distill_at_scale.models.spec import NetworkSpec

SPEC = NetworkSpec("convnet", (3, 8, 8), 4, width=6)
class_distance = of_one_class(gradient_distance.cosine_distance)


def images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_what_is_matched_are_the_weights_with_two_sides():
    network = SPEC.build(0)
    shapes = [tuple(p.shape) for p in gradient_distance.matched_parameters(network)]
    assert shapes == [(6, 3, 3, 3), (6, 6, 3, 3), (4, 24)]


def test_the_distance_and_its_image_gradient_match_the_reference():
    network, real = SPEC.build(0), images(7)
    synthetic = images(2, seed=1).requires_grad_(True)
    actual = class_distance(
        gradient_distance.real_gradient(network, real, 2, 3),
        gradient_distance.synthetic_gradient(network, synthetic, 2),
    )
    expected = reference_distance(
        reference_gradient(network, real, 2), reference_gradient(network, synthetic, 2, create_graph=True)
    )
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    fast, slow = torch.autograd.grad(actual, synthetic)[0], torch.autograd.grad(expected, synthetic)[0]
    assert slow.abs().max() > 1e-3
    assert torch.allclose(fast, slow, rtol=1e-3, atol=1e-5 * float(slow.abs().max()))


def test_the_constant_sits_on_the_product_of_the_norms():
    """A channel with tiny gradients on both sides counts as orthogonal, though the directions agree."""
    real, synthetic = torch.tensor([[1e-4, 0.0], [1.0, 0.0]]), torch.tensor([[1e-4, 0.0], [1.0, 0.0]])
    actual = class_distance([real], [synthetic]).item()
    assert actual == pytest.approx(1 - 1e-8 / (1e-8 + 1e-6), abs=1e-5)


def test_parallel_orthogonal_and_opposite_gradients():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert class_distance([a], [3 * a]).item() == pytest.approx(0, abs=1e-5)
    assert class_distance([a], [b]).item() == pytest.approx(1)
    assert class_distance([a], [-a]).item() == pytest.approx(2, abs=1e-5)
    assert class_distance([a, a], [b, b]).item() == pytest.approx(2)


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_the_gradient_in_parts_is_autograds_on_the_whole_batch(at_once):
    network, batch = SPEC.build(0), images(7)
    loss = F.cross_entropy(network(batch), torch.full((7,), 1))
    gradients = torch.autograd.grad(loss, gradient_distance.matched_parameters(network))
    for actual, expected in zip(gradient_distance.real_gradient(network, batch, 1, at_once), gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)
        assert not actual.requires_grad


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_losses_are_each_samples_own(at_once):
    network, batch = SPEC.build(0), images(5)
    actual = gradient_distance.sample_losses(network, batch, torch.full((5,), 3), at_once)
    assert actual.tolist() == pytest.approx(
        [F.cross_entropy(network(image[None]), torch.tensor([3])).item() for image in batch]
    )
    assert not actual.requires_grad


KINDS = {
    "images": NetworkSpec("convnet", (3, 8, 8), 4, width=6),
    "clips": NetworkSpec("convnet3d", (4, 3, 8, 8), 4, width=6),
    "resnet18, with strides": NetworkSpec("resnet18", (3, 16, 16), 4),
    "alexnet, with padding": NetworkSpec("alexnet", (3, 16, 16), 4),
}
WAYS = {"groups": classwise.GROUPED, "unfolding": classwise.UNFOLDED}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_several_classes_at_once_equal_those_of_each_class(kind, way, monkeypatch):
    monkeypatch.setattr(classwise, "implementation_for", lambda device: WAYS[way])
    spec = KINDS[kind]
    network, chance = spec.build(0), torch.Generator().manual_seed(0)
    images = torch.randn(6, *spec.shape, generator=chance).requires_grad_(True)
    actual = classwise.class_gradients(network, images, [1, 3], torch.full((6,), 1 / 3), differentiable=True)
    expected = [
        gradient_distance.synthetic_gradient(network, images[3 * k : 3 * k + 3], c) for k, c in enumerate((1, 3))
    ]
    targets = [torch.randn(g.shape, generator=chance) for g in actual]
    together = gradient_distance.cosine_distance(targets, actual)
    alone = torch.stack([class_distance([t[k] for t in targets], expected[k]) for k in range(2)])
    for layer, gradient in enumerate(actual):
        for k in range(2):
            scale = float(expected[k][layer].detach().abs().max())
            assert torch.allclose(gradient[k], expected[k][layer], atol=1e-4 * scale)
    assert torch.allclose(together, alone, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(d.sum(), images)[0] for d in (together, alone))
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_gradients_are_rounded_and_float32(way, monkeypatch):
    monkeypatch.setattr(classwise, "implementation_for", lambda device: WAYS[way])
    spec = KINDS["images"]
    network, images = spec.build(0), torch.randn(6, *spec.shape, generator=torch.Generator().manual_seed(0))
    exact = classwise.class_gradients(network, images, [1, 3], torch.full((6,), 1 / 3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classwise.class_gradients(network, images, [1, 3], torch.full((6,), 1 / 3))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        assert not torch.equal(a, b)
        assert float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.99


def test_parameters_stay_trainable():
    network = KINDS["images"].build(0)
    classwise.class_gradients(network, torch.zeros(2, 3, 8, 8), [0, 1], torch.ones(2), differentiable=True)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_signals_with_any_stride_and_padding(stride, padding, way):
    layer = torch.nn.Conv1d(2, 5, 4, stride, padding)
    x = torch.randn(6, 2, 19, generator=torch.Generator().manual_seed(0))
    outputs = layer(x)
    g = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    actual = WAYS[way].products(x, g, 3, layer)
    kernels = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    for_x, for_g = WAYS[way].derivatives(x, g, kernels, 3, layer, True)
    assert WAYS[way].derivatives(x, g, kernels, 3, layer, False)[0] is None
    for k in range(3):
        part = slice(2 * k, 2 * k + 2)
        expected = torch.autograd.grad((layer(x[part]) * g[part]).sum(), layer.weight)[0]
        assert torch.allclose(actual[k], expected, atol=1e-5)
        assert torch.allclose(for_g[part], F.conv1d(x[part], kernels[k], None, stride, padding), atol=1e-5)
        pulled = torch.nn.grad.conv1d_input(x[part].shape, kernels[k], g[part], stride, padding)
        assert torch.allclose(for_x[part], pulled, atol=1e-5)


class Twice(torch.nn.Module):
    """A layer used twice, a weight used outside of its layer, or dropout: not supported."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner, self.outer = kind, torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        x = self.inner(x).tanh()
        if self.kind == "twice":
            x = self.inner(x)
        if self.kind == "beside":
            x = x + F.linear(x, self.inner.weight)
        return self.outer(F.dropout(x, 0.5) if self.kind == "chance" else x)


@pytest.mark.parametrize(("kind", "right"), [("plain", True), ("twice", False), ("beside", False), ("chance", False)])
def test_a_network_that_does_not_fit_is_seen(kind, right):
    assert classwise.supports_class_gradients(Twice(kind), (6,), 3, torch.device("cpu")) is right


def test_layers_of_another_kind_do_not_fit():
    for layer in (torch.nn.Conv2d(2, 4, 3, groups=2), torch.nn.Conv2d(2, 4, 3, dilation=2), torch.nn.Bilinear(2, 2, 3)):
        with pytest.raises(classwise.UnsupportedNetwork):
            classwise.matched_layers(torch.nn.Sequential(layer))


def test_squares_and_absolutes_leave_the_last_layer_out():
    real, synthetic = [torch.zeros(2, 3, 4), torch.zeros(2, 5, 1)], [torch.full((2, 3, 4), 2.0), torch.ones(2, 5, 1)]
    assert gradient_distance.squared_distance(real, synthetic).tolist() == [48, 48]
    assert gradient_distance.absolute_distance(real, synthetic).tolist() == [24, 24]

"""The size of a real sample's effect on the synthetic gradient, against leaving it out and recomputing."""

from __future__ import annotations

import pytest
import torch
from matching_cases import of_one_class
from scipy.stats import spearmanr
from torch import nn

from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.shared import treatment_effect
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    cosine_distance,
    real_gradient,
    squared_distance,
    synthetic_gradient,
)
from distill_at_scale.distillation.methods.shared.treatment_effect import (
    SampleGradients,
    feature_effects,
    gradient_effects,
)
from distill_at_scale.distillation.multi_formation import split_parts
from distill_at_scale.models.spec import NetworkSpec

SHAPE, LABEL = (1, 8, 8), 1
MANY = 200  # directions: more than there are, so nothing is estimated


DISTANCES = {"cosine": cosine_distance, "squares": squared_distance}
ROTATED = Augmentation("rotate").draw(torch.Generator().manual_seed(3))
VIEWS = {"as it is": lambda x: x, "rotated": ROTATED.apply, "in parts": lambda x: split_parts(x, 2)}


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def a_network(seed=0, shape=SHAPE, name="convnet"):
    return NetworkSpec(name, shape, 3, width=8).build(seed)


def samples(n=60, shape=SHAPE, seed=1):
    """Samples around one common image, at different distances from it."""
    rng = chance(seed)
    common, spread = torch.randn(1, *shape, generator=rng), torch.rand(n, *[1] * len(shape), generator=rng)
    return common + 2 * spread * torch.randn(n, *shape, generator=rng)


def effects_of(network, real, images, view, distance, probes, rng, at_once, joint=True):
    samples = SampleGradients(network, LABEL, at_once, joint)
    return gradient_effects(samples, real, images, view, distance, probes, rng)[0]


@pytest.fixture
def all_images(monkeypatch):
    """All images are considered, so nothing is estimated from a few of them."""
    monkeypatch.setattr(treatment_effect, "PERTURBED", 100)


def rank(a, b):
    return float(spearmanr(a, b)[0])


def gradient_cases(network, real, images, view, metric):
    """Sizes by leaving a sample out, and to first order by one product per sample."""
    metric = of_one_class(metric)
    each = [real_gradient(network, x[None], LABEL, 1) for x in real]
    n, mean = len(real), [torch.stack(layer).mean(0) for layer in zip(*each, strict=True)]
    leaf = images.clone().requires_grad_(True)
    synthetic = synthetic_gradient(network, view(leaf), LABEL)

    def gradient(target):
        return torch.autograd.grad(metric(target, synthetic), leaf, retain_graph=True)[0]

    full = gradient(mean)
    out = [full - gradient([(n * m - g) / (n - 1) for m, g in zip(mean, own, strict=True)]) for own in each]
    target = [m.clone().requires_grad_(True) for m in mean]
    slopes = torch.autograd.grad(metric(target, synthetic), synthetic, create_graph=True, allow_unused=True)
    first = []
    for own in each:  # the change of the slopes by a mixed product, then back to the images
        tilts = [None if s is None else torch.zeros_like(s, requires_grad=True) for s in slopes]
        used = [k for k, s in enumerate(slopes) if s is not None]
        turned = torch.autograd.grad(
            [slopes[k] for k in used], [target[k] for k in used], [tilts[k] for k in used], create_graph=True
        )
        change = torch.autograd.grad(turned, [tilts[k] for k in used], [own[k] - mean[k] for k in used])
        first.append(torch.autograd.grad([synthetic[k] for k in used], leaf, change, retain_graph=True)[0] / (n - 1))
    return torch.stack([x.norm() for x in out]), torch.stack([x.norm() for x in first])


def feature_cases(network, real, images, view):
    features = network.embed(view(real)).detach()
    leaf, n = images.clone().requires_grad_(True), len(real)
    mine = network.embed(view(leaf)).mean(0)

    def gradient(target):
        return torch.autograd.grad((target - mine).square().sum(), leaf, retain_graph=True)[0]

    full, mean = gradient(features.mean(0)), features.mean(0)
    out = torch.stack([(full - gradient((n * mean - f) / (n - 1))).norm() for f in features])
    first = [torch.autograd.grad(mine, leaf, 2 * (f - mean), retain_graph=True)[0].norm() / (n - 1) for f in features]
    return features, out, torch.stack(first)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_first_order_ranks_as_leaving_one_out_does_under_gradient_matching(name):
    out, first = gradient_cases(a_network(), samples(), samples(2, seed=5), VIEWS["as it is"], DISTANCES[name])
    assert rank(out, first) >= 0.95


def test_the_first_order_is_leaving_one_out_under_feature_matching():
    _, out, first = feature_cases(a_network(), samples(), samples(3, seed=5), VIEWS["as it is"])
    assert torch.allclose(out, first, rtol=1e-2)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DISTANCES)
def test_with_all_directions_the_size_is_that_of_the_first_order(all_images, name, view):
    network, real, images = a_network(), samples(40), samples(2, seed=5)
    _, first = gradient_cases(network, real, images, VIEWS[view], DISTANCES[name])
    actual = effects_of(network, real, images, VIEWS[view], DISTANCES[name], MANY, chance(), 7)
    assert torch.allclose(actual, first, rtol=2e-2, atol=2e-3 * float(first.max()))


@pytest.mark.parametrize("view", ["as it is", "rotated"])
def test_with_all_directions_the_size_is_that_of_the_first_order_for_features_too(view):
    network, images = a_network(), samples(2, seed=5)
    features, _, first = feature_cases(network, samples(40), images, VIEWS[view])
    actual = feature_effects(network.embed, features, images, VIEWS[view], MANY, chance(), 7)
    assert torch.allclose(actual, first, rtol=2e-2, atol=2e-3 * float(first.max()))


@pytest.mark.parametrize("name", DISTANCES)
def test_few_directions_rank_nearly_as_leaving_one_out_does(name):
    network, real, images = a_network(), samples(), samples(8, seed=5)
    out, _ = gradient_cases(network, real, images, VIEWS["as it is"], DISTANCES[name])
    actual = effects_of(network, real, images, VIEWS["as it is"], DISTANCES[name], 16, chance(), 16)
    assert rank(out, actual) >= 0.85


def test_few_directions_rank_nearly_as_leaving_one_out_does_for_features_too():
    network, images = a_network(), samples(10, seed=5)
    features, out, _ = feature_cases(network, samples(), images, VIEWS["as it is"])
    assert rank(out, feature_effects(network.embed, features, images, VIEWS["as it is"], 16, chance(), 16)) >= 0.7


def test_the_sizes_do_not_depend_on_the_parts_and_are_drawn_from_the_generator():
    network, real, images = a_network(), samples(20), samples(3, seed=5)

    def actual(at_once, seed=0):
        return effects_of(network, real, images, VIEWS["rotated"], cosine_distance, 4, chance(seed), at_once)

    assert torch.equal(actual(5), actual(5))
    assert torch.allclose(actual(5), actual(100), rtol=1e-2)
    assert not torch.allclose(actual(5), actual(5, seed=1), rtol=1e-2)
    features = network.embed(real).detach()
    parts = [feature_effects(network.embed, features, images, ROTATED.apply, 4, chance(), k) for k in (1, 5, 100)]
    assert torch.allclose(parts[0], parts[1], rtol=1e-2)
    assert torch.allclose(parts[1], parts[2], rtol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_digits_of_the_samples_do_not_decide_the_sizes(seed):
    """Workers that train a network together agree only up to rounding and must drop the same samples."""
    network, real, images = a_network(seed), samples(60, seed=seed), samples(2, seed=seed + 5)

    def actual(real):
        return effects_of(network, real, images, lambda x: x, cosine_distance, 8, chance(), 1000)

    torch.testing.assert_close(actual(real * (1 + 1e-6)), actual(real), rtol=1e-4, atol=0)


def test_one_direction_is_one_in_which_samples_have_effects():
    network, real, images = a_network(), samples(60), samples(1, seed=5)
    images = images * torch.tensor([0.0, *[1.0] * 7])  # the first pixels see no sample
    seen = effects_of(network, real, images, lambda x: x * (images != 0), cosine_distance, 1, chance(), 1000)
    assert bool((seen > 0).all())


def test_no_more_images_go_through_the_network_at_once_than_asked():
    network, real, images, sizes = a_network(), samples(20), samples(30, seed=5), []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    effects_of(network, real, images, lambda x: x, cosine_distance, 4, chance(), 5)
    assert max(sizes) == 5


def test_a_sample_alone_or_like_all_others_has_no_effect():
    network, images = a_network(), samples(2, seed=5)
    for real in (samples(1), samples(1).expand(4, *SHAPE)):
        actual = effects_of(network, real, images, VIEWS["as it is"], cosine_distance, 4, chance(), 4)
        assert actual.shape == (len(real),)
        assert float(actual.max()) < 1e-4
        actual = feature_effects(network.embed, network.embed(real), images, VIEWS["as it is"], 4, chance(), 4)
        assert actual.shape == (len(real),)
        assert float(actual.max()) < 1e-4


def test_a_dead_channel_does_not_spoil_the_sizes():
    network, images = a_network(), samples(2, seed=5)
    with torch.no_grad():
        network.features[1].bias[0] = -1e3
    actual = effects_of(network, samples(10), images, VIEWS["as it is"], cosine_distance, 4, chance(), 4)
    assert torch.isfinite(actual).all()
    assert float(actual.max()) > 0


def test_the_images_are_left_alone():
    network, images = a_network(), samples(2, seed=5).requires_grad_(True)
    before = images.detach().clone()
    effects_of(network, samples(6), images, VIEWS["as it is"], cosine_distance, 4, chance(), 4)
    assert images.grad is None
    assert torch.equal(images, before)
    assert all(p.grad is None for p in network.parameters())


def test_clips_have_effects_too(all_images):
    shape = (4, 1, 8, 8)
    network, real, images = a_network(shape=shape, name="convnet3d"), samples(12, shape), samples(2, shape, 5)
    _, first = gradient_cases(network, real, images, ROTATED.apply, cosine_distance)
    actual = effects_of(network, real, images, ROTATED.apply, cosine_distance, MANY, chance(), 5)
    assert torch.allclose(actual, first, rtol=2e-2, atol=5e-3 * float(first.max()))


def test_images_that_the_view_leaves_out_have_no_effects():
    actual = effects_of(
        a_network(), samples(6), samples(2, seed=5), lambda x: x[:1] * 0 + 1, cosine_distance, 4, chance(), 4
    )
    assert torch.equal(actual, torch.zeros(6))


class Odd(nn.Module):
    """Layers of every kind: strides, groups, an in-place activation, a layer used twice, a bare parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.overwrites = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.rows = nn.Linear(2, 3)
        self.last = nn.Linear(24, 3)

    def forward(self, images):
        x = self.overwrites(self.first(images))
        x = self.twice(torch.tanh(self.twice(x)))
        x = torch.einsum("nchw,cd->ndhw", self.grouped(x), self.own)
        return self.last(torch.tanh(self.rows(x)).flatten(1))


def one_dimension():
    return nn.Sequential(nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


@pytest.mark.parametrize(
    ("make", "shape", "joint"), [(Odd, SHAPE, False), (a_network, SHAPE, True), (one_dimension, (2, 16), True)]
)
def test_each_sample_has_its_own_gradient(make, shape, joint):
    network, real = make(), samples(5, shape)
    actual = SampleGradients(network, LABEL, 2, joint)(real)
    for k, image in enumerate(real):
        for own, expected in zip(actual, real_gradient(network, image[None], LABEL, 1), strict=True):
            assert torch.allclose(own[k], expected, rtol=1e-3, atol=1e-5)


def test_a_network_whose_samples_pass_one_by_one_gives_the_same_effects():
    network, real, images = a_network(), samples(12), samples(2, seed=5)
    one, many = (
        effects_of(network, real, images, lambda x: x, cosine_distance, 4, chance(), 5, joint)
        for joint in (False, True)
    )
    assert torch.allclose(one, many, rtol=1e-2)

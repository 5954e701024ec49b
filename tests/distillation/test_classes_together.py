"""Gradient matching of several classes in one graph: equal to class by class, for any number of classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Calls, FixedNetwork, as_if_compiled
from matching_cases import (
    CPU,
    assert_close,
    image_gradient,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.methods.shared import class_gradients as classwise
from distill_at_scale.distillation.methods.shared import gradient_matching
from distill_at_scale.models.spec import NetworkSpec


def moved(method: str, spec, runtime=None, pool=None, labels=None, **options) -> torch.Tensor:
    pool = pool or pool_of(spec)
    options = {"image_lr": 1.0, "image_momentum": 0.0, "augment": "none", **options}
    values = {k: options.pop(k, v) for k, v in {"ipc": 1, "precision": "auto"}.items()} | {
        "method": method,
        method: options,
    }
    config = configuration.validate({"distill": values, "runtime": runtime or {}})
    labels = list(range(spec.classes)) if labels is None else labels
    matcher = METHODS[method](
        MethodContext(config, spec, [str(c) for c in range(spec.classes)], labels, SingleProcess(), CPU, 1)
    )
    matcher.prepare(pool)
    return image_gradient(matcher)[1]


def pool_of(spec, held=lambda c: 2) -> ClassSampler:
    chance = torch.Generator().manual_seed(1)
    pixels = {
        c: torch.randint(256, (held(c), *spec.shape), dtype=torch.uint8, generator=chance) for c in range(spec.classes)
    }
    channels = spec.shape[-3]
    return ClassSampler(pixels, Normalization((0.5,) * channels, (0.3,) * channels), seed=0)


SPECS = {
    "images": NetworkSpec("convnet", (3, 8, 8), 5, width=6),
    "clips": NetworkSpec("convnet3d", (4, 1, 8, 8), 4, width=4),
    "a hundred classes": NetworkSpec("convnet", (1, 8, 8), 100, width=4),
}


@pytest.mark.parametrize("method", ["dc", "dsa"])
@pytest.mark.parametrize("kind", SPECS)
def test_classes_together_move_as_class_by_class(method, kind, monkeypatch):
    spec = FixedNetwork(SPECS[kind], at_once=7)
    options = {"outer": 1, "augment": SIAMESE_AUGMENT if method == "dsa" else "none"}
    called = []
    original = gradient_matching.class_gradients
    monkeypatch.setattr(gradient_matching, "class_gradients", lambda *a, **k: (called.append(1), original(*a, **k))[1])
    together = moved(method, spec, **options)
    assert called
    monkeypatch.setattr(gradient_matching, "supports_class_gradients", lambda *_: False)
    assert_close(together, moved(method, spec, **options))


@pytest.mark.parametrize("device_few", [2, 100])
def test_unequal_masks_together_are_those_of_each_class(device_few, monkeypatch):
    """Classes of 1 to 5 samples; runtime pruning keeps a different number of each."""
    spec = FixedNetwork(SPECS["images"], at_once=20)
    pool, runtime = pool_of(spec, held=lambda c: c + 1), {"rule": "loss", "drop": 0.5, "refresh": 1}
    monkeypatch.setattr(gradient_matching, "CPU_IMAGES", device_few)
    together = moved("dc", spec, runtime, pool, outer=1)
    monkeypatch.setattr(gradient_matching, "supports_class_gradients", lambda *_: False)
    assert_close(together, moved("dc", spec, runtime, pool, outer=1))


def test_a_class_too_large_for_one_graph_is_matched_in_parts(monkeypatch):
    spec = FixedNetwork(SPECS["images"])
    together = moved("dc", spec, outer=1, ipc=5)
    monkeypatch.setitem(gradient_matching.MEMORY, "cpu", gradient_matching.SECOND_ORDER * spec.activation_bytes(1) * 2)
    in_parts = []
    real = gradient_matching.MatchingMethod._backward_in_parts
    monkeypatch.setattr(
        gradient_matching.MatchingMethod, "_backward_in_parts", lambda *a: (in_parts.append(1), real(*a))[1]
    )
    assert_close(moved("dc", spec, outer=1, ipc=5), together)
    assert len(in_parts) == spec.classes


def test_the_real_images_in_memory_do_not_grow_with_the_classes(monkeypatch):
    """Small networks match many classes at once, as far as their real batches fit into memory."""
    spec, held, most = SPECS["a hundred classes"], 8, 10
    each = gradient_matching.COPIES * 4 * held * math.prod(spec.shape)
    together = moved("dc", spec, outer=1, real_batch=held, pool=pool_of(spec, lambda c: held))
    sizes = []
    real = gradient_matching.MatchingMethod._real_batches
    monkeypatch.setattr(
        gradient_matching.MatchingMethod, "_real_batches", lambda *a: (sizes.append(len(a[2])), real(*a))[1]
    )
    monkeypatch.setitem(gradient_matching.MEMORY, "cpu", most * each)
    monkeypatch.setattr(gradient_matching, "SECOND_ORDER", 1)
    assert_close(moved("dc", spec, outer=1, real_batch=held, pool=pool_of(spec, lambda c: held)), together)
    assert sizes == [most] * 10


def test_the_number_of_images_in_a_graph_does_not_grow_with_the_classes(monkeypatch):
    sizes = []
    original = gradient_matching.class_gradients
    monkeypatch.setattr(
        gradient_matching, "class_gradients", lambda n, x, *a, **k: (sizes.append(len(x)), original(n, x, *a, **k))[1]
    )
    moved("dc", FixedNetwork(SPECS["a hundred classes"], at_once=7), outer=1)
    assert max(sizes) == 7


@pytest.mark.parametrize("held", [2, 9])
def test_compiled_code_sees_one_shape_and_changes_nothing(held, monkeypatch):
    """Batches of all sizes, after runtime pruning, and the training of the network: parts of one size."""
    spec, options = FixedNetwork(SPECS["images"], at_once=4), {"outer": 2, "inner": 1, "ipc": 3}
    pool = pool_of(spec, held=lambda c: held - c // 3)
    runtime = {"rule": "loss", "drop": 0.3, "refresh": 1}
    expected = moved("dc", spec, runtime, pool, **options)
    seen = as_if_compiled(monkeypatch)
    assert_close(moved("dc", spec, runtime, pool, precision="fp32", **options), expected, 1e-5)
    assert {len(images) for images in seen} == {2 if held == 2 else 3}  # 9 samples in three parts
    rounded = moved("dc", spec, runtime, pool, precision="bf16", **options)
    assert not torch.equal(rounded, expected)
    assert float(F.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0)) > 0.9


def test_code_that_is_not_compiled_stays_in_float32():
    """On a CPU; eager code is slower in bf16."""
    spec = FixedNetwork(SPECS["images"])
    assert torch.equal(moved("dc", spec, outer=1, precision="bf16"), moved("dc", spec, outer=1, precision="fp32"))


@pytest.mark.parametrize("method", ["dc", "dsa", "idc"])
def test_a_step_on_a_gpu_calls_as_many_operators_for_100_classes_as_for_10(method, monkeypatch):
    """The code for a GPU, run on the CPU; it reads numbers from the device once, with `tolist`."""
    monkeypatch.setattr(classwise, "implementation_for", lambda device: classwise.UNFOLDED)
    counts = []
    for classes in (10, 100):
        spec = NetworkSpec("convnet", (1, 8, 8), classes, width=4)
        loops = {"inner": 1} if method == "idc" else {"outer": 1}
        section = {**loops, "augment": "none" if method == "dc" else "color_crop"}
        config = configuration.validate({"distill": {"method": method, "ipc": 2, method: section}})
        names = [str(c) for c in range(classes)]
        matcher = METHODS[method](MethodContext(config, spec, names, list(range(classes)), SingleProcess(), CPU, 1))
        monkeypatch.setattr(matcher, "on_cpu", False)
        matcher.second_order_images = matcher.first_order_images = 1000
        matcher.prepare(pool_of(spec, lambda c: 8))
        with Calls() as calls:
            matcher.step(0)
        assert calls.counts.pop("randperm") == classes  # rows of the real batches, drawn on the host
        # NumPy's arrays as tensors and back, and the number of each class's loss, on the host too
        for name in ("lift_fresh", "detach"):
            calls.counts.pop(name, None)
        assert "_local_scalar_dense" not in calls.counts  # float(x), bool(x): a GPU would be waited for
        counts.append(calls.counts)
    assert counts[0] == counts[1]


BATCH_NORM = NetworkSpec("resnet18_bn", (3, 16, 16), 3)


@pytest.mark.parametrize("method", ["dc", "dsa", "idc"])
def test_batch_norm_is_set_from_real_samples_and_then_kept(method):
    """One warning; afterwards the output for a sample does not depend on the batch."""
    options = {"inner": 1} if method == "idc" else {"outer": 1}
    with pytest.warns(UserWarning, match="'resnet18_bn' has batch norm: a real batch of several classes sets"):
        assert moved(method, FixedNetwork(BATCH_NORM), **options).abs().max() > 0
    assert METHODS[method].batch_norm == "any"


@pytest.mark.filterwarnings("ignore:distill.network")
def test_samples_are_independent_under_settled_batch_norm():
    spec = FixedNetwork(BATCH_NORM)
    config = configuration.validate({"distill": {"method": "dc", "dc": {"outer": 1}}})
    method = METHODS["dc"](MethodContext(config, spec, ["a", "b", "c"], [0, 1, 2], SingleProcess(), CPU, 1))
    method.prepare(pool_of(spec))
    real_draw, asked = method.real.draw, []
    method.real.draw = lambda labels, n, purpose, *index: (
        asked.append(DrawRequest(tuple(labels), n, purpose, index)), real_draw(labels, n, purpose, *index))[1]  # fmt: skip
    method.step(3)
    assert asked == list(method.draws(3))
    assert len(asked) == spec.classes + 1  # the real batches of all classes at one time
    method.new_network(0)
    network = method.net
    method.set_batch_norm_statistics(0, 0)
    images = method._norm_batch(0, 0)
    assert len(images) == 3 * gradient_matching.NORM_PER_CLASS  # repeated, where fewer are kept
    assert torch.allclose(network(images[:5])[0], network(images[:1])[0], atol=1e-4)
    features = network.net.bn1(network.net.conv1(images))
    assert float(features.mean().detach().abs()) < 1e-3  # standardised by this very batch
    assert float(features.var().detach()) == pytest.approx(1, abs=0.01)

"""The methods against reference steps: DC, DSA and DM on a fixed network, with and without runtime pruning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Calls, FixedNetwork, as_if_compiled
from matching_cases import (
    CLASSES,
    CPU,
    HELD,
    all_images_of,
    assert_close,
    image_gradient,
    make_method,
    make_sampler,
    reference_distance,
    reference_gradient,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.augment import FAMILIES
from distill_at_scale.distillation.methods import METHODS, dc
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.methods.shared import class_gradients as classwise
from distill_at_scale.distillation.methods.shared import gradient_matching
from distill_at_scale.distillation.methods.shared.gradient_distance import cosine_distance, real_gradient
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec


def reference_dc_gradient(network, real, images):
    """The gradient of the summed distances in the images [classes, ipc, *shape]."""
    images = images.clone().requires_grad_(True)
    total = torch.zeros(())
    for label in range(len(images)):
        target = reference_gradient(network, real[label], label)
        total = total + reference_distance(target, reference_gradient(network, images[label], label, create_graph=True))
    return torch.autograd.grad(total, images)[0]


def test_a_dc_step_matches_the_reference():
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, inner=1)
    before, actual = image_gradient(method)
    real = [all_images_of(pool, label) for label in range(CLASSES)]
    assert_close(actual, reference_dc_gradient(method.context.spec.network, real, before))


@pytest.mark.parametrize("kept", [-1, 2, 1])
def test_the_gradient_of_the_kept_samples_follows_from_that_of_all(kept):
    """All but one, few and one of them are kept."""
    pool = make_sampler()
    method, images = make_method("dc", pool), all_images_of(pool, 1)
    method.new_network(0)
    network, mask = method.net, torch.arange(len(images)) < kept % len(images)
    actual = method._gradient_of_kept(images, 1, mask, real_gradient(network, images, 1, 100))
    for own, expected in zip(actual, real_gradient(network, images[mask], 1, 100), strict=True):
        assert_close(own, expected)


def test_the_inner_loop_trains_the_network_on_the_synthetic_set():
    """Two outer iterations: the second gradient belongs to a network that made three epochs of plain SGD."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=2, inner=3, network_lr=0.5)
    before = method.images.detach().clone()
    method.step(0)
    network = method.context.spec.build(0)
    real = [all_images_of(pool, label) for label in range(CLASSES)]
    middle = before - reference_dc_gradient(network, real, before)
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(middle.flatten(0, 1)), torch.arange(CLASSES).repeat_interleave(2)).backward()
        optimizer.step()
    last = middle - reference_dc_gradient(network, real, middle)
    assert_close(method.images.detach() - middle, last - middle, 1e-2)


def test_the_inner_loop_sees_every_image_once_per_epoch_in_small_batches():
    """Three batches of two of six images: at a rate near zero, their gradients add up to three times the mean's."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, inner=1, network_lr=1e-3, network_batch=2)
    method.new_network(0)
    network = method.net
    before = [p.detach().clone() for p in network.parameters()]
    images, labels = method.images.detach().flatten(0, 1), torch.arange(CLASSES).repeat_interleave(2)
    expected = torch.autograd.grad(3 * F.cross_entropy(network(images), labels), list(network.parameters()))
    method._train_network(0, 0, 1)
    for parameter, old, gradient in zip(network.parameters(), before, expected, strict=True):
        assert torch.allclose((old - parameter.detach()) / 1e-3, gradient, rtol=0.1, atol=2e-2)


def test_momentum_is_that_of_sgd():
    pool = make_sampler()
    plain, heavy = make_method("dc", pool, outer=1), make_method("dc", pool, outer=1, image_momentum=0.5)
    start = plain.images.detach().clone()
    plain.step(0)
    heavy.step(0)
    assert torch.equal(plain.images, heavy.images)
    first = start - plain.images.detach()
    plain.step(1)
    heavy.step(1)
    assert_close(plain.images.detach() - heavy.images.detach(), 0.5 * first)


@pytest.mark.parametrize(("ipc", "loops"), [(1, (1, 1)), (5, (1, 1)), (10, (10, 50)), (50, (50, 10)), (100, (50, 10))])
def test_the_default_loops_are_the_official_ones(ipc, loops):
    assert dc.default_loops(ipc) == loops


def test_the_defaults_are_the_official_ones():
    config = configuration.Config()
    assert [METHODS[m].default_steps for m in ("dc", "dsa", "dm", "idc")] == [1000, 1000, 20_000, 2000]
    assert [METHODS[m].init_of(config) for m in ("dc", "dsa", "dm")] == ["noise", "real", "real"]
    assert METHODS["dc"].protocol(config) == TrainingProtocol(300)
    assert METHODS["dsa"].protocol(config) == TrainingProtocol(1000, SIAMESE_AUGMENT)
    assert METHODS["dm"].protocol(config).epochs == 1000
    assert (config.distill.dc.image_lr, config.distill.dc.image_momentum, config.distill.dc.network_lr) == (
        0.1,
        0.5,
        0.01,
    )


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.99])
def test_the_masked_gradient_is_autograds_on_the_kept_samples(drop):
    """Rule loss: of each class the floor(drop n) samples with the largest loss do not count; at least one stays."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, runtime={"rule": "loss", "drop": drop, "refresh": 1})
    before, actual = image_gradient(method)
    network, kept = method.context.spec.network, []
    for label in range(CLASSES):
        batch = all_images_of(pool, label)
        order = sorted(
            range(HELD), key=lambda k: F.cross_entropy(network(batch[k][None]), torch.tensor([label])).item()
        )
        kept.append(batch[order[: max(1, HELD - math.floor(drop * HELD))]])
    assert_close(actual, reference_dc_gradient(network, kept, before))


def test_dropping_changes_the_gradient():
    pool = make_sampler()
    _, full = image_gradient(make_method("dc", pool, outer=1))
    _, masked = image_gradient(make_method("dc", pool, outer=1, runtime={"rule": "loss", "drop": 0.5}))
    assert float((full - masked).abs().max()) > 0.01 * float(full.abs().max())


def test_a_dm_step_matches_the_reference():
    pool = make_sampler()
    method = make_method("dm", pool)
    before, actual = image_gradient(method)
    images = before.clone().requires_grad_(True)
    loss = torch.zeros(())
    for label in range(CLASSES):
        feature = torch.stack([method.context.spec.network.embed(x[None])[0] for x in all_images_of(pool, label)]).mean(
            0
        )
        mine = torch.stack([method.context.spec.network.embed(x[None])[0] for x in images[label]]).mean(0)
        loss = loss + ((feature - mine) ** 2).sum()
    assert_close(actual, torch.autograd.grad(loss, images)[0])


@pytest.mark.parametrize("drop", [0.3, 0.99])
def test_dm_drops_the_samples_farthest_from_the_real_mean_and_nearest_to_it(drop):
    pool = make_sampler()
    method = make_method("dm", pool, runtime={"rule": "loss", "drop": drop})
    before, actual = image_gradient(method)
    images, embed = before.clone().requires_grad_(True), method.context.spec.network.embed
    loss = torch.zeros(())
    for label in range(CLASSES):
        features, mine = embed(all_images_of(pool, label)).detach(), embed(images[label]).mean(0)
        order = sorted(range(HELD), key=lambda k: (features[k] - features.mean(0)).square().sum().item())
        dropped = min(math.floor(drop * HELD), HELD - 1)
        kept = order[dropped // 2 : HELD - dropped + dropped // 2]
        loss = loss + (features[kept].mean(0) - mine).square().sum()
    assert_close(actual, torch.autograd.grad(loss, images)[0])


def test_dm_embeds_only_samples_forecast_to_count_between_full_observations():
    pool = make_sampler()
    method = make_method("dm", pool, runtime={"rule": "loss", "drop": 0.34, "refresh": 3})
    shares = [method.step(i)["real_share"] for i in range(4)]
    assert shares == pytest.approx([1, 6 / 9, 6 / 9, 1])


def test_dsa_is_dc_with_its_own_section():
    pool, options = make_sampler(), {"outer": 1, "inner": 1, "init": "real"}
    plain, siamese = make_method("dc", pool, **options), make_method("dsa", pool, **options)
    plain.step(0)
    siamese.step(0)
    assert torch.equal(plain.images, siamese.images)


@pytest.mark.parametrize("method", ["dsa", "dm"])
def test_real_and_synthetic_images_get_the_same_draw(method):
    """If the synthetic images are the real batch, one shared augmentation leaves nothing to match."""
    pool = make_sampler(held=4)
    matcher = make_method(method, pool, ipc=4, init="real", augment=SIAMESE_AUGMENT, image_lr=1e-12)
    pairs = []

    def spy(real, synthetic):
        pairs.append((real, synthetic))
        return cosine_distance(real, synthetic)

    if method == "dsa":
        matcher.distance = spy
    for step in range(6):
        metrics = matcher.step(step)
        if method == "dm":
            assert metrics["loss"] < 1e-9
    assert len(pairs) >= (6 if method == "dsa" else 0)
    for real, synthetic in pairs:
        for a, b in zip(real, synthetic, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", ["dsa", "dm"])
def test_every_class_and_step_has_a_draw_of_its_own(method, monkeypatch):
    seen = []
    for name, family in FAMILIES.items():
        monkeypatch.setitem(
            FAMILIES,
            name,
            lambda images, u, family=family: (seen.extend(set(map(tuple, u.tolist()))), family(images, u))[1],
        )
    options = {"outer": 1} if method == "dsa" else {}
    matcher = make_method(method, make_sampler(), augment=SIAMESE_AUGMENT, **options)
    for step in range(3):
        matcher.step(step)
    assert len(seen) == 2 * CLASSES * 3  # real and synthetic
    assert len(set(seen)) == CLASSES * 3


@pytest.mark.parametrize("method", ["dsa", "dm"])
def test_no_flip_where_the_strategy_has_none(method, monkeypatch):
    monkeypatch.setitem(FAMILIES, "flip", lambda images, u: pytest.fail("flipped"))
    matcher = make_method(method, make_sampler(), augment="color_crop_cutout_scale_rotate")
    for step in range(8):
        matcher.step(step)


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_images_start_from_noise_or_from_distinct_real_samples(method):
    pool = make_sampler()
    real, noise = (make_method(method, pool, ipc=3, init=init).images.detach() for init in ("real", "noise"))
    for label in range(CLASSES):
        places = [
            int((all_images_of(pool, label) - image).abs().flatten(1).max(1).values.argmin()) for image in real[label]
        ]
        assert torch.allclose(all_images_of(pool, label)[places], real[label])
        assert len(set(places)) == 3
    assert 0.8 < float(noise.std()) < 1.2
    assert not torch.equal(noise[0], noise[1])


def test_too_few_real_samples_to_start_from_are_refused():
    with pytest.raises(UserError, match=r"'zero' has 2 samples, fewer than distill\.ipc = 3"):
        make_method("dm", make_sampler(held=2), ipc=3, init="real")


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_a_class_does_not_depend_on_which_other_classes_a_worker_owns(method):
    """As long as nothing is shared (one outer iteration), a class's images do not depend on the other classes."""
    pool, options = make_sampler(), {"outer": 1} if method == "dc" else {}
    together, alone = make_method(method, pool, **options), make_method(method, pool, labels=[2], **options)
    for step in range(2):
        together.step(step)
        alone.step(step)
    assert torch.allclose(together.images[2], alone.images[0], atol=1e-4)


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_a_state_moves_between_backends_with_other_classes(method):
    pool, runtime = make_sampler(), {"rule": "loss", "drop": 0.4, "refresh": 2}
    options = {"outer": 1, "image_momentum": 0.5} if method == "dc" else {"image_momentum": 0.5}
    together = make_method(method, pool, runtime=runtime, **options)
    together.step(0)
    state = {key: value.clone() for key, value in together.state_dict().items()}
    part = make_method(method, pool, runtime=runtime, labels=[0, 2], **options)
    part.load_state_dict(state)
    together.step(1)
    part.step(1)
    assert torch.allclose(part.images, together.images[[0, 2]], atol=1e-4)
    assert sorted(part.state_dict()) == sorted(key for key in together.state_dict() if not key.endswith("/1"))


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_non_finite_values_leave_the_images_unchanged_and_name_class_and_step(method):
    matcher = make_method(method, make_sampler())
    with torch.no_grad():
        matcher.images[1, 0, 0, 0, 0] = float("nan")
    before = matcher.images.detach().clone()
    with pytest.raises(
        DistillationDiverged, match=f"class 'one' is not finite at step 7, image learning rate 1.*{method}.image_lr"
    ):
        matcher.step(7)
    assert torch.equal(matcher.images.detach().nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_a_step_that_overflows_is_not_taken(method, monkeypatch):
    """The rate is finite, the gradient is finite, their product is not."""
    matcher = make_method(method, make_sampler(), image_lr=3e38, init="real")
    with torch.no_grad():
        matcher.images.mul_(1e-3)
    before = matcher.images.detach().clone()
    update = matcher.update

    def steeper(losses, step):
        matcher.images.grad.mul_(1e6)
        return update(losses, step)

    monkeypatch.setattr(matcher, "update", steeper)
    with pytest.raises(DistillationDiverged):
        matcher.step(0)
    assert torch.equal(matcher.images.detach(), before)


def test_finish_gives_images_and_labels_in_class_order():
    method = make_method("dc", make_sampler(), labels=[0, 2])
    images, labels = method.snapshot()
    assert labels.tolist() == [0, 0, 2, 2]
    assert torch.equal(images, method.images.detach().flatten(0, 1))


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

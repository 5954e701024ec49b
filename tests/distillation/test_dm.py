"""Distribution matching against a reference step, with groups of classes, and with runtime pruning."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Calls, as_if_compiled
from matching_cases import (
    CLASSES,
    CPU,
    HELD,
    all_images_of,
    assert_close,
    image_gradient,
    make_method,
    make_sampler,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import DistillationDiverged
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods import dm
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.models.spec import NetworkSpec

RULES = {"none": {}, "loss": {"rule": "loss", "drop": 0.4}, "ite": {"rule": "ite", "drop": 0.4, "probes": 4}}


def many_classes(
    classes: int,
    ipc: int,
    shape=(3, 64, 64),
    runtime: dict | None = None,
    network="convnet",
    precision="auto",
    **options,
):
    """DM on `classes` classes with four samples each."""
    rng = torch.Generator().manual_seed(0)
    pixels = {c: torch.randint(256, (4, *shape), dtype=torch.uint8, generator=rng) for c in range(classes)}
    distill = {"method": "dm", "ipc": ipc, "precision": precision, "dm": options}
    config = configuration.validate({"distill": distill, "runtime": runtime or {}})
    spec = NetworkSpec(network, shape, classes, width=4)
    context = MethodContext(
        config, spec, [str(c) for c in range(classes)], list(range(classes)), SingleProcess(), CPU, 1
    )
    method = dm.DM(context)
    method.prepare(ClassSampler(pixels, Normalization((0.5,), (0.3,)), seed=0))
    return method


@pytest.mark.parametrize("rule", RULES)
def test_a_step_does_not_depend_on_how_classes_are_grouped(rule):
    moved, metrics = [], []
    for group in (1, 2, 3):
        method = make_method("dm", make_sampler(), runtime=RULES[rule], augment=SIAMESE_AUGMENT)
        method.group_size = group
        metrics.append([method.step(i) for i in range(3)])
        moved.append(method.images.detach())
    for other, other_metrics in zip(moved[1:], metrics[1:], strict=True):
        assert torch.allclose(moved[0], other, atol=1e-4)
        assert other_metrics == [pytest.approx(m, rel=1e-3) for m in metrics[0]]


def test_groups_are_as_large_as_the_stated_memory_allows(monkeypatch):
    sizes = []
    for megabytes in (1, 20, 1000):
        monkeypatch.setitem(dm.GROUP_BYTES, "cpu", megabytes * 2**20)
        sizes.append(many_classes(5, ipc=2, shape=(1, 16, 16), real_batch=64, init="noise").group_size)
    assert sizes[0] < sizes[1] < sizes[2]
    monkeypatch.setitem(dm.GROUP_BYTES, "cpu", 1)
    assert many_classes(5, ipc=2, shape=(1, 16, 16), init="noise").group_size == 1


def test_no_forward_pass_sees_more_than_a_group(monkeypatch):
    method = many_classes(7, ipc=2, shape=(1, 8, 8), init="noise", augment="none")
    method.group_size, seen = 2, []
    embed = method.embed_syn
    method.embed_syn = lambda images: (seen.append(len(images)), embed(images))[1]
    method.step(0)
    assert seen == [4, 4, 4, 2]


def test_rule_ite_drops_what_has_the_largest_and_the_smallest_effect():
    """Against effects by leaving one out: exactly the samples in both tails are dropped."""
    pool = make_sampler()
    method = make_method("dm", pool, runtime={"rule": "ite", "drop": 0.5, "tail": 0.5, "probes": 64})
    embed = method.context.spec.network.embed
    before, actual = image_gradient(method)
    images, expected = before.clone().requires_grad_(True), torch.zeros(())
    for label in range(CLASSES):
        features, mine = embed(all_images_of(pool, label)).detach(), embed(images[label]).mean(0)
        sizes = torch.stack(
            [
                torch.autograd.grad(mine, images, 2 * (f - features.mean(0)), retain_graph=True)[0].norm()
                for f in features
            ]
        ).log()
        standard = (sizes - sizes.mean()) / sizes.std(correction=0)
        kept = standard.abs() <= 0.6745  # the quartiles of the normal distribution
        assert 0 < int(kept.sum()) < len(kept)
        expected = expected + (features[kept].mean(0) - mine).square().sum()
    assert_close(actual, torch.autograd.grad(expected, images)[0])


def test_rule_ite_without_a_rate_equals_no_pruning_bit_for_bit():
    plain, zero = (
        make_method("dm", make_sampler()),
        make_method("dm", make_sampler(), runtime={"rule": "ite", "drop": 0.0}),
    )
    for step in range(2):
        assert plain.step(step) == zero.step(step)
    assert torch.equal(plain.images, zero.images)
    assert plain.state_dict().keys() == zero.state_dict().keys()


def test_rule_ite_embeds_less_between_full_steps_and_resumes_to_the_same_bytes():
    runtime = {"rule": "ite", "drop": 0.4, "refresh": 3, "probes": 4}
    one = make_method("dm", make_sampler(), runtime=runtime, augment=SIAMESE_AUGMENT, image_momentum=0.5)
    shares = [one.step(i)["real_share"] for i in range(2)]
    assert shares[0] == 1
    assert shares[1] < 0.9
    again = make_method("dm", make_sampler(), runtime=runtime, augment=SIAMESE_AUGMENT, image_momentum=0.5)
    again.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    for i in range(2, 5):
        assert one.step(i) == again.step(i)
    state, other = one.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_features_that_are_not_finite_stop_the_run_with_the_name_of_their_class(bad):
    """All classes are averaged in one matrix product, where 0 x inf must not spoil the others."""
    method = many_classes(3, ipc=1, shape=(1, 8, 8), init="noise", augment="none")
    embed, before = method.embed_real, method.images.detach().clone()
    method.embed_real = lambda images: embed(images).index_fill(0, torch.tensor([5]), bad)  # of four per class
    labels, real = list(range(3)), method.augmentation.draw_each(torch.Generator(), 3)
    means, _ = method._real_means(method.images.detach(), labels, real, 0)
    assert means.isfinite().all(1).tolist() == [True, False, True]
    with pytest.raises(DistillationDiverged, match="of class '1' is not finite at step 0"):
        method.step(0)
    assert torch.equal(method.images, before)


@pytest.mark.parametrize("rule", RULES)
def test_clips_are_matched_under_every_rule(rule):
    method = many_classes(
        2, ipc=2, shape=(4, 1, 8, 8), runtime={**RULES[rule], "refresh": 2}, network="convnet3d", init="noise"
    )
    before = method.images.detach().clone()
    for step in range(2):
        method.step(step)
    assert torch.isfinite(method.images).all()
    assert not torch.equal(before, method.images.detach())


def test_a_step_calls_as_many_operators_for_100_classes_as_for_10_and_reads_numbers_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (reads.append(tensor), tolist(tensor))[1])
    counts = []
    for classes in (10, 100):
        method = many_classes(classes, ipc=2, shape=(1, 8, 8), init="noise", augment="color_crop", real_batch=3)
        reads.clear()
        with Calls() as calls:
            method.step(0)
        assert calls.counts.pop("randperm") == classes  # rows of the real batches, drawn on the host
        del calls.counts["lift_fresh"], calls.counts["detach"]  # NumPy's arrays as tensors and back, on the host too
        assert "_local_scalar_dense" not in calls.counts  # float(x), bool(x): a GPU would be waited for
        assert len([t for t in reads if t.is_floating_point()]) == 1
        counts.append(calls.counts)
    assert counts[0] == counts[1]


def test_bf16_changes_the_real_side_of_a_step_by_little(monkeypatch):
    as_if_compiled(monkeypatch)
    gradients = []
    for precision in ("fp32", "bf16"):
        method = many_classes(2, ipc=1, shape=(1, 16, 16), init="noise", augment="none", precision=precision)
        method.step(0)
        gradients.append(method.images.grad)
    assert not torch.equal(*gradients)
    assert float((gradients[0] - gradients[1]).norm()) < 0.03 * float(gradients[0].norm())


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

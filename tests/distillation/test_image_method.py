"""What methods of images share: augmentation, initial images, state, and steps that diverge; for DC, DSA and DM."""

from __future__ import annotations

import pytest
import torch
from matching_cases import (
    CLASSES,
    all_images_of,
    make_method,
    make_sampler,
)

from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.distillation.augment import FAMILIES
from distill_at_scale.distillation.methods.shared.gradient_distance import cosine_distance


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

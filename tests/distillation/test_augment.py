"""Siamese augmentation: each family against a slow reference, one draw for all images, and gradients through it."""

from __future__ import annotations

import math

import pytest
import torch

from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation import augment
from distill_at_scale.distillation.augment import FAMILIES, Augmentation, AugmentParams, apply_each

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))


def slow_color(image, u):
    image = image + (u[0] - 0.5)
    grey = image.mean(0)
    image = torch.stack([(channel - grey) * (2 * u[1]) + grey for channel in image])
    return (image - image.mean()) * (u[2] + 0.5) + image.mean()


def slow_crop(image, u):
    down, right = int(u[0] * 3) - 1, int(u[1] * 3) - 1  # an eighth of 8 pixels: up to one
    out = torch.zeros_like(image)
    for y in range(8):
        for x in range(8):
            if 0 <= y + down < 8 and 0 <= x + right < 8:
                out[:, y, x] = image[:, y + down, x + right]
    return out


def slow_cutout(image, u):
    top, left = int(u[0] * 9) - 2, int(u[1] * 9) - 2  # a hole of 4 x 4 whose centre lies anywhere
    out = image.clone()
    for y in range(max(0, top), max(0, top + 4)):
        for x in range(max(0, left), max(0, left + 4)):
            if y < 8 and x < 8:
                out[:, y, x] = 0
    return out


def slow_flip(image, u):
    return torch.stack([image[:, :, 7 - x] for x in range(8)], 2) if u[0] < 0.5 else image


def bilinear(image, matrix):
    """Sample at matrix @ (x, y), both from -1 (the first pixel's centre) to 1 (the last's); zero outside."""
    out = torch.zeros_like(image)
    for row in range(8):
        for column in range(8):
            x, y = 2 * column / 7 - 1, 2 * row / 7 - 1
            u = (matrix[0][0] * x + matrix[0][1] * y + 1) * 3.5
            v = (matrix[1][0] * x + matrix[1][1] * y + 1) * 3.5
            for i in (math.floor(v), math.floor(v) + 1):
                for j in (math.floor(u), math.floor(u) + 1):
                    if 0 <= i < 8 and 0 <= j < 8:
                        out[:, row, column] += image[:, i, j] * (1 - abs(u - j)) * (1 - abs(v - i))
    return out


def slow_scale(image, u):
    factors = [float(v) * (1.2 - 1 / 1.2) + 1 / 1.2 for v in u[:2]]
    return bilinear(image, [[factors[0], 0], [0, factors[1]]])


def slow_rotate(image, u):
    angle = math.radians((float(u[0]) * 2 - 1) * 15)
    return bilinear(image, [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


SLOW = {
    "color": slow_color,
    "crop": slow_crop,
    "cutout": slow_cutout,
    "flip": slow_flip,
    "scale": slow_scale,
    "rotate": slow_rotate,
}


def fixed(family: str, *numbers: float) -> AugmentParams:
    return AugmentParams(family, torch.tensor([[*numbers, *[0.0] * (4 - len(numbers))]]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_agrees_with_a_slow_reference(family):
    fast = AugmentParams(family, NUMBERS).apply(IMAGES)
    slow = torch.stack([SLOW[family](image, u) for image, u in zip(IMAGES, NUMBERS, strict=True)])
    assert torch.allclose(fast, slow, atol=1e-5)
    assert fast.is_contiguous()  # a network on a CPU is slower where channels are last
    assert not torch.allclose(fast, IMAGES, atol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_draw_treats_all_images_alike(family):
    draw = AugmentParams(family, NUMBERS[:1])
    assert torch.allclose(draw.apply(IMAGES), torch.cat([draw.apply(image[None]) for image in IMAGES]), atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_flow_through_every_family(family):
    images = IMAGES[:2].double().requires_grad_(True)
    draw = AugmentParams(family, NUMBERS[:1].double())
    assert torch.autograd.gradcheck(draw.apply, (images,))
    assert torch.autograd.grad(draw.apply(images).square().sum(), images)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("color", (0.5, 0.5, 0.5)),
        ("crop", (0.5, 0.5)),
        ("flip", (0.5,)),
        ("rotate", (0.5,)),
        ("scale", ((1 - 1 / 1.2) / (1.2 - 1 / 1.2),) * 2),
    ],
)
def test_the_neutral_parameters_leave_an_image_as_it_is(family, numbers):
    assert torch.allclose(fixed(family, *numbers).apply(IMAGES), IMAGES, atol=1e-5)


def test_a_cutout_is_a_square_of_half_the_side_with_its_centre_in_the_image():
    for size, sizes in ((8, {2, 3, 4}), (10, {3, 4, 5})):
        ones = torch.ones(500, 1, size, size)
        holes = AugmentParams("cutout", torch.rand(500, 4, generator=torch.Generator().manual_seed(2))).apply(ones) == 0
        heights, widths = holes.any(3).sum((1, 2)), holes.any(2).sum((1, 2))
        assert torch.equal(holes.sum((1, 2, 3)), heights * widths)  # a full rectangle
        assert set(heights.tolist()) == sizes
        assert set(widths.tolist()) == sizes


def test_a_crop_shifts_by_at_most_an_eighth_in_every_direction():
    point = torch.zeros(400, 1, 16, 16)
    point[:, :, 8, 8] = 1
    moved = AugmentParams("crop", torch.rand(400, 4, generator=torch.Generator().manual_seed(3))).apply(point)
    places = {(int(i) // 16 - 8, int(i) % 16 - 8) for i in moved.flatten(1).argmax(1)}
    assert places == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_half_of_the_images_are_flipped():
    images = IMAGES[:1].expand(2000, -1, -1, -1)
    draw = Augmentation("flip").draw(torch.Generator().manual_seed(0), per_image=2000)
    flipped = (draw.apply(images) != images).flatten(1).any(1)
    assert 0.45 < flipped.float().mean() < 0.55


def test_a_strategy_draws_each_of_its_families_and_no_other():
    strategy = Augmentation(SIAMESE_AUGMENT.replace("_flip", ""))
    drawn = {strategy.draw(torch.Generator().manual_seed(seed)).family for seed in range(200)}
    assert drawn == {"color", "crop", "cutout", "scale", "rotate"}


def test_without_flip_in_the_strategy_nothing_is_flipped(monkeypatch):
    monkeypatch.setitem(FAMILIES, "flip", lambda images, numbers: pytest.fail("flipped"))
    strategy = Augmentation("crop_cutout")
    for seed in range(50):
        strategy.draw(torch.Generator().manual_seed(seed), per_image=6).apply(IMAGES)


def test_the_whole_strategy_is_what_the_method_names():
    assert set(Augmentation(SIAMESE_AUGMENT).families) == set(FAMILIES)
    constants = (augment.FLIP, augment.SCALE, augment.ROTATE, augment.CROP, augment.CUTOUT)
    assert constants == (0.5, 1.2, 15.0, 0.125, 0.5)
    assert (augment.BRIGHTNESS, augment.SATURATION, augment.CONTRAST) == (1.0, 2.0, 0.5)


def test_a_draw_is_decided_by_its_generator():
    first, same, other = (Augmentation(SIAMESE_AUGMENT).draw(torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert first.family == same.family
    assert torch.equal(first.numbers, same.numbers)
    assert not torch.equal(first.numbers, other.numbers)


def test_none_is_the_identity():
    assert Augmentation("none").draw(torch.Generator(), per_image=6).apply(IMAGES) is IMAGES


def test_an_unknown_family_is_named():
    with pytest.raises(UserError, match="'flop'"):
        Augmentation("color_flop")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_frames_of_a_clip_change_alike(family):
    image = torch.randn(3, 1, 2, 16, 16)
    clips = image.expand(3, 4, 2, 16, 16).clone()  # four equal frames each
    draw = AugmentParams(family, torch.rand(3, 4, generator=torch.Generator().manual_seed(1)))
    changed = draw.apply(clips)
    assert changed.shape == clips.shape
    for frame in range(4):
        torch.testing.assert_close(changed[:, frame], draw.apply(image[:, 0]))


@pytest.mark.parametrize("strategy", [SIAMESE_AUGMENT, "rotate", "none"])
@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 2, 8, 8)])
def test_batches_augmented_in_one_call_equal_each_on_its_own(strategy, shape):
    params = Augmentation(strategy).draw_each(torch.Generator().manual_seed(1), 9)
    counts = [2, 1, 3, 2, 0, 2, 1, 2, 4]
    images = torch.randn(sum(counts), *shape, requires_grad=True)
    together = apply_each(params, images, counts)
    alone = torch.cat([p.apply(own) for p, own in zip(params, images.split(counts), strict=True) if len(own)])
    assert torch.allclose(together, alone, atol=1e-6)
    gradients = [torch.autograd.grad(x.square().sum(), images)[0] for x in (together, alone)]
    assert torch.allclose(*gradients, atol=1e-5)

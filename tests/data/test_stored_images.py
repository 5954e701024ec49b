"""Images in the prepared data: stored as JPEGs, and read again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from image_cases import decibels, encoded, in_full, photo, picture
from PIL import Image

from distill_at_scale.data.codecs.image import ImageDecoder, SampleRejected, decode_stored, encode


def pixels(channels: int = 3, height: int = 60, width: int = 45) -> np.ndarray:
    image = photo(width, height)
    return np.asarray(image.convert("L"))[None] if channels == 1 else np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(60, 45), (16, 16), (1, 1), (7, 130)])
def test_a_stored_image_decodes_nearly_unchanged_into_its_own_memory(channels, height, width):
    image = pixels(channels, height, width)
    decoded = decode_stored(encode(image, 95), image.shape)
    assert (decoded.shape, decoded.dtype, decoded.flags.c_contiguous, decoded.flags.writeable) == (
        image.shape,
        np.uint8,
        1,
        1,
    )
    assert decibels(decoded, image) >= 35


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stored_image_reads_bit_for_bit_as_pillow_reads_it(channels):
    image = pixels(channels, 224, 224)
    data = encode(image, 90)
    decoded = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(
        decode_stored(data, image.shape), decoded[None] if channels == 1 else decoded.transpose(2, 0, 1)
    )


def test_storing_is_deterministic_and_a_better_quality_is_larger_and_nearer():
    image = pixels()
    assert encode(image, 90) == encode(image.copy(), 90) == encode(np.ascontiguousarray(image), 90)
    coarse, fine = encode(image, 70), encode(image, 95)
    assert len(coarse) < len(fine)
    assert decibels(decode_stored(coarse, image.shape), image) < decibels(decode_stored(fine, image.shape), image)


def test_noise_is_stored_at_every_quality():
    noise = np.random.default_rng(0).integers(0, 256, (3, 96, 96), np.uint8)
    assert all(decode_stored(encode(noise, quality), noise.shape).std() > 50 for quality in (50, 90, 95, 100))


def test_colour_detail_survives_storing():
    image = np.zeros((3, 32, 32), np.uint8)
    image[0, :, ::2], image[2, :, 1::2] = 255, 255  # columns of red and blue, one pixel each
    assert np.abs(decode_stored(encode(image, 90), image.shape).astype(int) - image).mean() < 12


@pytest.mark.parametrize("channels", [1, 3])
def test_a_damaged_stored_image_is_rejected(channels):
    image = pixels(channels)
    data = encode(image, 90)
    for end in range(len(data)):
        with pytest.raises(SampleRejected, match="stored image is damaged"):
            decode_stored(data[:end], image.shape)
    for rubbish in (b"\0" * 500, encoded(picture())):
        with pytest.raises(SampleRejected, match="stored image is damaged"):
            decode_stored(rubbish, image.shape)


@pytest.mark.parametrize("shape", [(3, 45, 60), (1, 60, 45), (3, 60, 46)])
def test_a_stored_image_of_another_shape_is_rejected_and_both_are_named(shape):
    with pytest.raises(SampleRejected) as caught:
        decode_stored(encode(pixels(), 90), shape)
    assert str(caught.value) == f"stored image has the shape (3, 60, 45) (C, H, W), not {shape}"


def test_real_photos_scale_within_38_decibels_and_are_stored_in_a_quarter_of_their_original_size(shared_data):
    paths = sorted((shared_data / "imagenette" / "val").rglob("*.JPEG"))[::40]
    stored = []
    for path in paths:
        raw = path.read_bytes()
        assert decibels(ImageDecoder(64)(raw), in_full(raw, 64)) >= 38
        image = ImageDecoder(224)(raw)
        stored.append(encode(image, 90))
        assert decibels(decode_stored(stored[-1], image.shape), image) >= 36
    assert sum(map(len, stored)) / len(stored) < 110_000 / 4

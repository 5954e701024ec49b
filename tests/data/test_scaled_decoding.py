"""Photos that are decoded at a smaller scale, against the full decode."""

from __future__ import annotations

import numpy as np
import pytest
from image_cases import decibels, encoded, in_full, photo
from PIL import Image

from distill_at_scale.data.codecs.image import ImageDecoder


@pytest.mark.parametrize(
    ("width", "height", "size", "decoded"),
    [
        (500, 375, 64, (125, 94)),  # a quarter: 93.75 is at least 1.25 x 64
        (500, 375, 128, (250, 188)),
        (500, 375, 224, (500, 375)),  # half of it would be too small
        (258, 258, 64, (129, 129)),  # a quarter would leave 64.5 pixels, hardly more than asked
        (320, 320, 64, (80, 80)),
        (2000, 90, 64, (2000, 90)),  # the shorter side decides
        (2000, 170, 64, (1000, 85)),
        (90, 2000, 64, (90, 2000)),
        (40, 30, 64, (40, 30)),
    ],
)
@pytest.mark.parametrize("resize", ["square", "crop"])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_a_margin_on_its_shorter_side(
    width, height, size, decoded, resize
):
    raw = encoded(photo(width, height), "JPEG")
    assert ImageDecoder(size, resize=resize)._open(raw)[0].size == decoded


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (501, 379), (322, 330), (1500, 120), (97, 801)])
@pytest.mark.parametrize("resize", ["square", "crop"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_scaled_decoding_stays_within_39_decibels_of_the_full_decode(shape, resize, size):
    raw = encoded(photo(*shape), "JPEG", quality=90)
    decoded = ImageDecoder(size, resize=resize)(raw)
    assert decibels(decoded, in_full(raw, size, crop=resize == "crop")) >= 39  # mean error below two levels


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [64, 300])
def test_progressive_jpegs_and_restart_markers_are_read(options, size):
    raw = encoded(photo(), "JPEG", quality=90, **options)
    assert decibels(ImageDecoder(size)(raw), in_full(raw, size)) >= 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "resize"), [("JPEG", "square"), ("JPEG", "crop"), ("PNG", "crop")])
def test_all_eight_orientations_are_followed_when_a_photo_is_scaled_down(orientation, kind, resize):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(photo(500, 374), kind, exif=exif)  # an odd crop would differ by the one pixel that is left over
    decoded, expected = ImageDecoder(64, resize=resize)(raw), in_full(raw, 64, crop=resize == "crop")
    assert decibels(decoded, expected) >= 40
    others = [np.rot90(expected, k, (1, 2)) for k in (1, 2, 3)] + [expected[:, ::-1], expected[:, :, ::-1]]
    assert all(decibels(decoded, other) < 30 for other in others)

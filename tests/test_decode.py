"""Raw samples become uint8 images of one shape, or are rejected with a reason; nothing else ever comes out."""

from __future__ import annotations

import contextlib
import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from distill_at_scale.data.decode import FORMATS, ImageDecoder, Rejected


def picture(width: int = 12, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_shape(kind, channels):
    found = ImageDecoder(6, channels)(encoded(picture(), kind))
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((channels, 6, 6), np.uint8, True)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = picture(8, 8)
    assert np.array_equal(ImageDecoder(8)(encoded(image)), np.asarray(image).transpose(2, 0, 1))


def test_an_array_is_taken_as_it_is():
    raw = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(ImageDecoder(8, 1)(raw)[0], raw)
    assert np.array_equal(ImageDecoder(8, 3)(raw), np.stack([raw] * 3))


def test_square_stretches_and_crop_cuts_the_centre():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    stretched, cropped = (
        ImageDecoder(8)(encoded(Image.fromarray(wide))),
        ImageDecoder(8, resize="crop")(encoded(Image.fromarray(wide))),
    )
    assert cropped.min() == 255
    assert stretched[0, 0, 0] == 0
    assert stretched[0, 0, 4] > 200


def test_the_orientation_of_a_photo_is_followed():
    image, exif = picture(8, 8), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = ImageDecoder(8)(encoded(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.asarray(image.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_every_colour_mode_is_converted(mode):
    image = picture(8, 8).convert(mode)
    raw = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert ImageDecoder(8)(raw).shape == (3, 8, 8)


def test_sixteen_bits_per_pixel_keep_their_brightness():
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = ImageDecoder(8, 1)(encoded(Image.fromarray(grey)))[0]
    assert np.abs(found.astype(int) - (grey / 257).round().astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"this is text, not a picture", "not an image"),
        (b"\x00" * 100, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encoded(picture(64, 64), "JPEG")[:400], "damaged"),
        (encoded(picture(64, 64), "PNG")[:400], "damaged"),
    ],
    ids=["empty", "text", "zeros", "svg", "half a jpeg", "half a png"],
)
def test_a_broken_sample_is_rejected_with_its_reason(raw, reason):
    with pytest.raises(Rejected, match=reason):
        ImageDecoder(8)(raw)


def test_a_decompression_bomb_is_rejected_unopened():
    raw = encoded(Image.new("1", (3000, 3000)))
    assert len(raw) < 10_000
    with pytest.raises(Rejected, match=r"3000 x 3000 pixels, more than data\.max_pixels = 1000000"):
        ImageDecoder(8, max_pixels=1_000_000)(raw)


def test_what_is_far_beyond_pillows_own_limit_is_rejected_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Rejected, match="bomb"):
        ImageDecoder(8)(encoded(Image.new("1", (100, 100))))


def test_damaged_metadata_does_not_stop_the_work():
    raw = encoded(picture(), "WEBP", exif=b"Exif\0\0garbage!!")
    with contextlib.suppress(Rejected):
        assert ImageDecoder(8)(raw).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_the_bytes_are_they_decode_or_are_rejected(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(picture(30, 20), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    chance, decoder = random.Random(kind), ImageDecoder(8, max_pixels=1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2000):
            raw = bytearray(good)
            for _ in range(chance.randint(1, 6)):
                raw[chance.randrange(min(len(raw), chance.choice([64, 300, len(raw)])))] = chance.randrange(256)
            try:
                found = decoder(bytes(raw[: chance.choice([len(raw), chance.randrange(1, len(raw))])]))
            except Rejected:
                continue
            assert found.shape == (3, 8, 8)

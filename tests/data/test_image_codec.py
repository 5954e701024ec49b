"""Raw samples become uint8 images of one shape or are rejected with a reason."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_cases import decibels, encoded, in_full, photo, picture
from PIL import Image

from distill_at_scale.data.codecs.image import FORMATS, ImageDecoder, SampleRejected


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_shape(kind, channels):
    decoded = ImageDecoder(6, channels)(encoded(picture(), kind))
    assert (decoded.shape, decoded.dtype, decoded.flags.c_contiguous) == ((channels, 6, 6), np.uint8, True)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = picture(8, 8)
    assert np.array_equal(ImageDecoder(8)(encoded(image)), np.asarray(image).transpose(2, 0, 1))


def test_an_array_is_taken_as_it_is():
    raw = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(ImageDecoder(8, 1)(raw)[0], raw)
    assert np.array_equal(ImageDecoder(8, 3)(raw), np.stack([raw] * 3))


def test_a_crop_that_needs_no_resize_keeps_its_pixels():
    image = photo(75, 60)
    expected = np.asarray(image)[:, 7:67].transpose(2, 0, 1)  # 15 columns too many: 7 go on the left, 8 on the right
    assert np.array_equal(ImageDecoder(60, resize="crop")(encoded(image)), expected)


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
    decoded = ImageDecoder(8, 1)(encoded(Image.fromarray(grey)))[0]
    assert np.abs(decoded.astype(int) - (grey / 257).round().astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"this is text, not a picture", "not an image"),
        (b"\x00" * 100, "not an image: it holds only zeros, .*; download it again"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of pixels but an SVG drawing; convert it"),
        (b"\n<!DOCTYPE html><title>404</title>", "not an image but an HTML page, .*; download it again"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "not an image but XML text, .*; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer to it; fetch .* `git lfs pull`",
        ),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "^an AVIF image, which cannot be used here; convert it to JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "^a HEIC image, which cannot be used here; convert it to JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom", "^an MP4 or MOV video, which cannot be used here"),
        (b"\xfe\x01" * 50, "^not an image in a known format; convert it to JPEG or PNG, or remove it"),
        (b"\x89PNG\r\n\x1a\n" + b"\1" * 50, "damaged: .*; replace"),
        (b"II*\0" + b"\xff" * 50, "damaged: it begins like a TIFF image, .*; replace it"),
        (encoded(picture(64, 64), "JPEG")[:400], "damaged"),
        (encoded(picture(64, 64), "PNG")[:400], "damaged"),
    ],
    ids=[
        "empty",
        "text",
        "zeros",
        "svg",
        "html",
        "xml",
        "lfs",
        "avif",
        "heic",
        "mp4",
        "unknown",
        "broken png",
        "broken tiff",
        "half a jpeg",
        "half a png",
    ],
)
def test_a_broken_sample_is_rejected_with_its_reason(raw, reason):
    with pytest.raises(SampleRejected, match=reason):
        ImageDecoder(8)(raw)


def test_a_decompression_bomb_is_rejected_unopened():
    raw = encoded(Image.new("1", (3000, 3000)))
    assert len(raw) < 10_000
    with pytest.raises(SampleRejected, match=r"3000 x 3000 pixels, more than data\.max_pixels = 1000000"):
        ImageDecoder(8, max_pixels=1_000_000)(raw)


def test_what_is_far_beyond_pillows_own_limit_is_rejected_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SampleRejected, match="bomb"):
        ImageDecoder(8)(encoded(Image.new("1", (100, 100))))


@pytest.mark.parametrize("kind", FORMATS)
def test_any_bytes_decode_or_are_rejected(kind):
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
                decoded = decoder(bytes(raw[: chance.choice([len(raw), chance.randrange(1, len(raw))])]))
            except SampleRejected:
                continue
            assert decoded.shape == (3, 8, 8)


@pytest.mark.parametrize("value", [0, 9, 6000])
def test_an_orientation_that_does_not_exist_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    image = picture(8, 8)
    assert np.array_equal(ImageDecoder(8)(encoded(image, exif=exif)), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_with_damaged_metadata_is_used_as_it_stands(kind):
    raw = encoded(photo(), kind, exif=b"Exif\0\0garbage!!")
    assert decibels(ImageDecoder(64)(raw), in_full(encoded(photo(), kind), 64)) >= 40


@pytest.mark.parametrize("size", [8, 64])
def test_the_inverted_inks_of_a_cmyk_jpeg_give_the_right_colours(size):
    flat = Image.new("RGB", (100, 100), (200, 40, 90))
    raw = encoded(flat.convert("CMYK"), "JPEG", quality=95)
    assert (b"Adobe" in raw, Image.open(io.BytesIO(raw)).mode) == (True, "CMYK")
    assert np.abs(ImageDecoder(size)(raw).astype(int) - np.array([200, 40, 90])[:, None, None]).max() <= 3


def test_a_grey_jpeg_has_three_equal_channels_or_one():
    raw = encoded(photo().convert("L"), "JPEG")
    colour, grey = ImageDecoder(64)(raw), ImageDecoder(64, 1)(raw)
    assert np.array_equal(colour, np.repeat(grey, 3, 0))
    assert decibels(grey, in_full(raw, 64, "L")) >= 40


@pytest.mark.parametrize("size", [64, 300])
def test_grey_from_a_colour_jpeg_is_the_grey_of_its_colours(size):
    raw, decoder = encoded(photo(), "JPEG", quality=90), ImageDecoder(size, 1)
    assert decibels(decoder(raw), in_full(raw, size, "L")) >= 40
    assert decoder._open(raw)[0].mode == "L"  # colours are never computed: that takes a third of the time and more


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_dropped_not_blended(kind):
    image = picture(8, 8)
    image.putalpha(1)
    decoded = ImageDecoder(8)(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert np.array_equal(decoded, np.asarray(picture(8, 8)).transpose(2, 0, 1))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_a_palette_gives_its_colours_with_any_transparency_and_no_warning(transparency):
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    image.putdata([0, 1, 2, 1] * 16)
    raw = encoded(image, **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = ImageDecoder(8)(raw)
    assert decoded[:, 0, :4].T.tolist() == [[10, 20, 30], [200, 100, 50], [0, 255, 0], [200, 100, 50]]


def test_sixteen_bits_per_colour_keep_their_brightness():
    levels = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts]
    decoded = ImageDecoder(8)(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).transpose(1, 2, 0)
    assert np.abs(decoded.astype(int) - levels // 257).max() <= 1


@pytest.mark.parametrize(
    ("greys", "reason"),
    [
        (np.array([[-1000, 0], [400, 1000]], np.int32), "grey levels from -1,000 to 1,000, outside 0..65,535; scale"),
        (np.array([[0, 65536], [7, 7]], np.int32), "grey levels from 0 to 65,536, outside 0..65,535; scale"),
        (np.array([[0, 0.5], [1, 1]], np.float32), "floating-point pixels; convert the image to 8 or 16 bits"),
    ],
    ids=["signed", "wide", "float"],
)
def test_grey_levels_that_do_not_fit_are_rejected_with_their_range(greys, reason):
    with pytest.raises(SampleRejected, match=reason):
        ImageDecoder(2)(encoded(Image.fromarray(greys), "TIFF"))


def test_unsigned_grey_levels_of_32_bits_are_named_without_a_sign():
    values = np.array([[0, 4_000_000_000], [5, 6]], np.uint32).tobytes()
    tags = [(256, 2), (257, 2), (258, 32), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 16), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    raw = b"II*\0" + struct.pack("<I", 24) + values + struct.pack("<H", len(tags)) + entries + bytes(4)
    with pytest.raises(SampleRejected, match="grey levels from 0 to 4,000,000,000, outside"):
        ImageDecoder(2)(raw)


def test_wide_grey_levels_within_sixteen_bits_keep_their_brightness():
    greys = np.array([[0, 257], [32896, 65535]], np.int32)
    assert ImageDecoder(2, 1)(encoded(Image.fromarray(greys), "TIFF"))[0].tolist() == [[0, 1], [128, 255]]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("before_the_pixels", [True, False])
def test_a_png_with_large_texts_and_a_large_profile_keeps_its_pixels_and_orientation(before_the_pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(photo(), exif=exif)
    packed = zlib.compress(bytes(3 * 2**20))  # beyond Pillow's limit of 1 MiB
    texts = (
        chunk(b"zTXt", b"prompt\0\0" + packed)
        + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed)
        + chunk(b"iCCP", b"wide\0\0" + packed)
    )
    cut = 33 if before_the_pixels else plain.index(b"IEND") - 4  # after the header, or before the end
    raw = plain[:cut] + texts + plain[cut:]
    if before_the_pixels:
        with pytest.raises(ValueError, match="MAX_TEXT"):
            Image.open(io.BytesIO(raw)).load()
    assert np.array_equal(ImageDecoder(64)(raw), ImageDecoder(64)(plain))
    with pytest.raises(SampleRejected, match="damaged: "):
        ImageDecoder(64)(raw[: len(raw) // 2] if not before_the_pixels else raw[:-2000])


def test_damaged_metadata_gives_no_warning():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0"
    raw = encoded(photo(), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(raw)).getexif()
        assert caught  # Pillow warns
        caught.clear()
        ImageDecoder(64)(raw)
    assert not caught


def test_a_png_in_a_file_called_jpeg_is_read_since_only_the_bytes_count(tmp_path):
    path = tmp_path / "n02105855_2933.JPEG"
    photo().save(path, "PNG")
    assert np.array_equal(ImageDecoder(375, resize="crop")(path.read_bytes())[:, 0, 0], np.asarray(photo())[0, 62])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_a_jpeg_cut_anywhere_is_rejected_and_never_filled_with_grey(options, size):
    raw, decoder = encoded(photo(200, 150), "JPEG", quality=90, **options), ImageDecoder(size)
    decoder(raw)
    for end in [*range(3, len(raw), 97), *range(len(raw) - 40, len(raw))]:  # the last: only half of the end marker
        with pytest.raises(SampleRejected):
            decoder(raw[:end])


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_trailing_bytes_after_a_complete_jpeg_change_nothing(options):
    raw, decoder = encoded(photo(200, 150), "JPEG", **options), ImageDecoder(32)
    assert np.array_equal(decoder(raw + b"\0rubbish\xff" * 500), decoder(raw))


def test_a_jpeg_that_claims_too_many_pixels_is_rejected_before_it_is_decoded():
    raw = bytearray(encoded(photo(200, 150), "JPEG"))
    place = raw.index(b"\xff\xc0") + 5  # height and width in the frame header
    raw[place : place + 4] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(SampleRejected, match=r"9000 x 9000 pixels, more than data\.max_pixels = 80000000"):
        ImageDecoder(32, max_pixels=80_000_000)(bytes(raw))


@pytest.mark.parametrize(("shape", "channels"), [((16, 16, 3), 3), ((16, 16), 1), ((16, 16), 3), ((16, 16, 1), 1)])
def test_an_array_of_the_right_shape_is_copied_without_pillow(monkeypatch, shape, channels):
    raw = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    raw.flags.writeable = False
    monkeypatch.setattr(Image, "fromarray", None)
    decoded = ImageDecoder(16, channels)(raw)
    expected = np.broadcast_to(raw.reshape(16, 16, -1).transpose(2, 0, 1), (channels, 16, 16))
    assert np.array_equal(decoded, expected)
    assert (decoded.flags.c_contiguous, decoded.flags.writeable, np.shares_memory(decoded, raw)) == (True, True, False)


@pytest.mark.parametrize(
    ("raw", "channels"),
    [
        (np.asarray(picture(12, 12)), 3),
        (np.asarray(picture(8, 8)), 1),
        (np.asarray(picture(8, 8).convert("RGBA")), 3),
        (np.asarray(picture(12, 12).convert("L")), 3),
    ],
    ids=["another size", "colour to grey", "with alpha", "grey of another size"],
)
def test_other_arrays_are_converted_like_files(raw, channels):
    expected = ImageDecoder(8, channels)(encoded(Image.fromarray(raw)))
    assert np.array_equal(ImageDecoder(8, channels)(raw), expected)

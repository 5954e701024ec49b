"""Broken images: an accepted image equals Pillow's plain decode and has the requested shape."""

from __future__ import annotations

import io
import random
import struct
import zlib

import mutating
import numpy as np
import pytest
from PIL import Image, ImageOps

from distill_at_scale.data.codecs.image import FORMATS, ImageDecoder, SampleRejected, decode_stored, encode

SIDE = 24
DECODERS = {channels: ImageDecoder(SIDE, channels, max_pixels=1_000_000) for channels in (1, 3)}


def picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def saved(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return saved("JPEG", exif=tags.tobytes())


def seeds() -> list[bytes]:
    plain = [saved(kind) for kind in FORMATS]
    others = [saved("PNG", mode) for mode in ("P", "L", "I;16", "RGBA", "1")]
    others += [saved("JPEG", progressive=True), saved("JPEG", "CMYK"), saved("TIFF", compression="tiff_lzw"), turned()]
    return plain + others + [saved("WEBP", lossless=True), saved("GIF", "L"), saved("TIFF", compression="jpeg")]


def chunks(data: bytes) -> list[bytes]:
    """The chunks of a PNG, without their lengths and checksums."""
    parts, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        parts.append(data[at + 4 : at + 8 + size])
        at += 12 + size
    return parts


def broken_png(data: bytes, chance: random.Random) -> bytes:
    """Chunks in disorder or broken inside, their lengths and checksums right, so that decoders get to see them."""
    if not data.startswith(b"\x89PNG"):
        return mutating.flip(data, chance)
    parts = mutating.shuffled(chunks(data), chance)
    return data[:8] + b"".join(
        struct.pack(">I", max(0, len(part) - 4)) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def broken_jpeg(data: bytes, chance: random.Random) -> bytes:
    if not data.startswith(b"\xff\xd8"):
        return mutating.edge(data, chance)
    first, *rest = data.split(b"\xff")
    return b"\xff".join([first, *mutating.shuffled(rest, chance)])


def plainly(raw: bytes, channels: int) -> np.ndarray | None:
    """Pillow's decode without our steps, where the image needs no other one than to be turned."""
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if (
        image.size != (SIDE, SIDE)
        or image.mode not in ("RGB", "L")
        or (channels, image.mode) != (len(image.mode) or 1, image.mode)
    ):
        return None
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata counts as none
        return None
    pixels = np.asarray(upright)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.filterwarnings("ignore")
def test_broken_images_are_refused_or_what_pillow_sees():
    def attempt(raw: bytes) -> bool:
        decoded = {}
        for channels, decoder in DECODERS.items():
            try:
                decoded[channels] = decoder(raw)
            except SampleRejected:
                continue
            assert (decoded[channels].shape, decoded[channels].dtype) == (decoder.shape, np.uint8)
            if (expected := plainly(raw, channels)) is not None:
                assert np.array_equal(decoded[channels], expected)
        return bool(decoded)

    mutating.run("images", 0.38, seeds(), attempt, [broken_png, broken_png, broken_jpeg])


def test_broken_stored_images_are_refused_or_of_their_shape():
    shape = (3, SIDE, SIDE)
    stored = encode(np.asarray(picture()).transpose(2, 0, 1), 90)

    def attempt(raw: bytes) -> bool:
        try:
            decoded = decode_stored(raw, shape)
        except SampleRejected:
            return False
        assert (decoded.shape, decoded.dtype) == (shape, np.uint8)
        return True

    mutating.run("stored", 0.05, [stored], attempt, [broken_jpeg])

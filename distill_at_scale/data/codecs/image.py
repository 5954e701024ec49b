"""Raw sample -> uint8 image of a fixed shape, or the reason why not; and the compressed form of large prepared images.

Reading. Pillow decodes, and decides what is damaged. A JPEG is scaled down inside its inverse DCT to at least 1.25
times the size asked on both sides, and the rest is antialiased bicubic on the exact, fractional extent of the scaled
image. For 500 x 375 JPEGs that is 3 times (64 pixels) and 2 times (128 pixels) the rate of a full decode, 45 and 49
dB from its result, and 40 dB where 1.25 is just met (`data/codecs/image.py`). A margin of 1 falls to 35 dB, one
of 1.5 or 2 makes this most common size of ImageNet a third to a half slower, ignoring the fraction costs 14 dB.
simplejpeg at the same scale is 1.0 to 1.1 times as fast, as the resize remains: not worth a second path. torch's
resize is vectorised, which at 224 pixels is 2.6 times the rate in all, but processes that only decode shall not load
torch. One channel is decoded from the JPEG's own grey, twice as fast at 224 pixels.

Storing. Above 128 pixels raw tensors outgrow the original files (193 GB against 140 GB for ImageNet-1K at 224
pixels), so images are kept as JPEG, 4:4:4. On scaled-down photos quality 90 is 23 KB an image (30 GB) at 39 dB; 4:2:0
needs quality 95 and a fifth more bytes to come as near. There is no resize here, so simplejpeg pays: 1.25 to 1.5
times Pillow's rate with the same bits. WebP and PNG decode at a third of the rate or less.

Left out: clips (`data/codecs/clip.py`), alpha (dropped, as in torchvision, not blended), animations (the first frame
counts), colour profiles, and a JPEG that was cut and closed again with an end marker (Pillow cannot tell it from a
whole one).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MARGIN = 1.25  # a JPEG is decoded at no less than this many times the target size
REDUCING_GAP = 3.0  # what is 6 or more times too large is first averaged in whole steps
MOST_SCANS = 100  # of a progressive JPEG; encoders make about 10, and each one costs a pass over all pixels
SCAN = b"\xff\xda"  # cannot occur within the pixels' own bytes
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class SampleRejected(Exception):
    """A sample that cannot be used; the message is the reason that goes to rejected.parquet."""


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes, orients, converts to grey or RGB and resizes; the result has shape (channels, size, size)."""

    size: int
    channels: int = 3
    resize: str = "square"  # stretch to a square, or "crop" the centre square
    max_pixels: int = 100_000_000

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __call__(self, raw: bytes | Array) -> Array:
        """An encoded image, or pixels uint8 [H, W] or [H, W, 3 or 4] -> new uint8 [channels, size, size].

        Raises Rejected for whatever is wrong with the sample.
        """
        if isinstance(raw, np.ndarray) and (ready := self._ready(raw)) is not None:
            return ready
        try:
            return _planes(self._image(raw))
        except (SampleRejected, MemoryError):
            raise
        except UnidentifiedImageError:
            raise SampleRejected(f"not an image in a known format ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:
            raise SampleRejected(f"decompression bomb: {error}") from None
        except Exception as error:  # a decoder fed with damaged bytes raises almost anything
            raise SampleRejected(f"damaged: {str(error) or type(error).__name__}") from None

    def _ready(self, raw: Array) -> Array | None:
        """Pixels that need no work but a copy: sets of tiny images come as millions of these."""
        if raw.dtype != np.uint8 or raw.shape[:2] != (self.size, self.size):
            return None
        if raw.ndim == 2:
            return np.repeat(raw[None], self.channels, axis=0)
        return raw.transpose(2, 0, 1).copy() if raw.shape[2:] == (self.channels,) else None

    def _image(self, raw: bytes | Array) -> Image.Image:
        if isinstance(raw, np.ndarray):
            image = Image.fromarray(raw)
            return self._fit(image, self._box(*image.size))
        image, box = self._open(raw)
        turn = TURNS.get(_orientation(image))
        image = self._fit(image, box)
        return image if turn is None else image.transpose(turn)  # the small square is the cheaper one to turn

    def _open(self, raw: bytes) -> tuple[Image.Image, Box]:
        """The decoded image, a JPEG perhaps scaled down, and the part of it to use."""
        if not raw:
            raise SampleRejected("empty file")
        image: Image.Image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
        if width * height > self.max_pixels:
            raise SampleRejected(f"{width} x {height} pixels, more than data.max_pixels = {self.max_pixels}")
        if image.format == "JPEG" and raw.count(SCAN) > MOST_SCANS:
            raise SampleRejected(
                f"a JPEG of {raw.count(SCAN)} scans, more than {MOST_SCANS}, which take time without end"
            )
        least = math.ceil(MARGIN * self.size)
        drafted = image.draft("L" if self.channels == 1 else None, (least, least))  # None for all but JPEG
        image.load()
        return image, self._box(width, height, width / drafted[1][2] if drafted else 1)

    def _box(self, width: int, height: int, scale: float = 1) -> Box:
        """The part to use: cut in whole pixels of the original, given in pixels of its `scale` times smaller form."""
        left, top, right, bottom = 0, 0, width, height
        if self.resize == "crop":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            right, bottom = left + side, top + side
        return left / scale, top / scale, right / scale, bottom / scale

    def _fit(self, image: Image.Image, box: Box) -> Image.Image:
        image.info.pop("transparency", None)  # alpha is dropped, and Pillow would warn about some palettes
        image, mode = _eight_bits(image), "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box, REDUCING_GAP)


def encode(pixels: Array, quality: int) -> bytes:
    """uint8 [C, H, W], C = 1 or 3 -> the stored form; the same bytes for the same pixels. `quality`: 1 to 100."""
    buffer, rows = io.BytesIO(), pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(rows)).save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def decode_stored(data: bytes, shape: Sequence[int]) -> Array:
    """What `encode` returned, and the shape (C, H, W) it must have -> new uint8 [C, H, W].

    Raises Rejected where the bytes are cut or damaged, or hold another shape.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        found, wanted = (1 if space == "Gray" else 3, height, width), tuple(shape)
        if found != wanted:
            raise SampleRejected(f"stored image has the shape {found} (C, H, W), not {wanted}")
        image = simplejpeg.decode_jpeg(data, "GRAY" if shape[0] == 1 else "RGBX", fastdct=False)
    except ValueError as error:
        raise SampleRejected(f"stored image is damaged: {error}") from None
    if shape[0] == 1:
        return image.reshape(shape)
    words = image.view("<u4")[..., 0]  # R, G, B and padding: taking planes out of words is faster than out of bytes
    planes = np.empty(shape, np.uint8)
    for i in range(3):
        planes[i] = words >> (8 * i) if i else words
    return planes


def _planes(image: Image.Image) -> Array:
    """An image in mode L or RGB -> uint8 [1 or 3, height, width]."""
    pixels = np.asarray(image, np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation 1..8; 1 (upright) where the metadata is damaged or says nothing sensible."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # as for pixels: damaged bytes raise almost anything
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey levels become 8-bit ones; Pillow's own conversion would clip them to white."""
    if image.mode == "F":
        raise SampleRejected("floating-point pixels; convert the image to 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) // 257).astype(np.uint8))

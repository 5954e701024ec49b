"""Decodes a sample to a uint8 image of a fixed shape, or rejects it with a reason; stores large prepared images as JPEG.

Pillow decodes and decides what is damaged. A JPEG is scaled down inside its inverse DCT to at least MARGIN times the target
size; antialiased bicubic on the exact, fractional extent does the rest. Stored images are JPEG, 4:4:4. `data/README.md` has
the measurements behind these choices and the cases that are not covered.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from distill_at_scale.data.codecs import foreign_files

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
KINDS = tuple(f"a {name} image" for name in ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"))
MAX_GREY = 65_535  # of 16 bits
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks with texts and colour profiles; the pixels do not need them
MARGIN = 1.25  # a JPEG is decoded at no less than this many times the target size
REDUCING_GAP = 3.0  # an image 6 or more times too large is first averaged in whole steps
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10, and each one costs a pass over all pixels
SCAN = b"\xff\xda"  # cannot occur within the pixels' own bytes
ORIENTATION = 0x0112  # the EXIF tag
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # tags of TIFF; format 1 is unsigned
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

        Raises SampleRejected for anything wrong with the sample.
        """
        # sets of tiny images are millions of arrays that only need a copy
        if isinstance(raw, np.ndarray) and raw.dtype == np.uint8 and raw.shape[:2] == (self.size, self.size):
            if raw.ndim == 2:
                return np.repeat(raw[None], self.channels, axis=0)
            if raw.shape[2:] == (self.channels,):
                return raw.transpose(2, 0, 1).copy()
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow warns about damaged metadata, which is not used
                if isinstance(raw, np.ndarray):
                    return self.fit(Image.fromarray(_checked(raw)))
                return self.fit(*(self._open_png(raw) if raw.startswith(PNG_SIGNATURE) else self._open(raw)))
        except (SampleRejected, MemoryError):
            raise
        except UnidentifiedImageError:
            assert isinstance(raw, bytes)
            raise SampleRejected(foreign_files.describe(raw, "an image", KINDS, "JPEG or PNG")) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            reason = f"decompression bomb: more than {limit:,} pixels, Pillow's limit; make the image smaller"
            raise SampleRejected(reason) from None
        except Exception as error:  # a decoder fed with damaged bytes raises almost anything
            words = (str(error) or type(error).__name__).rstrip(".")
            raise SampleRejected(f"damaged: {words}; replace the file") from None

    def _open_png(self, raw: bytes) -> tuple[Image.Image, Box]:
        """As `_open`. Pillow refuses texts and colour profiles that unpack to more than 1 MiB; they are cut out then."""
        try:
            return self._open(raw)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            return self._open(_without_texts(raw))

    def fit(self, image: Image.Image, box: Box | None = None) -> Array:
        """A decoded image, or the `box` of it to use -> new uint8 [channels, size, size].

        Raises SampleRejected for floating-point pixels and for grey levels that 16 bits do not hold.
        """
        turn = TURNS.get(_orientation(image))
        image = self._fit(image, box or self._box(*image.size))
        image = image if turn is None else image.transpose(turn)  # cheaper after the resize
        pixels = np.asarray(image, np.uint8)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def _open(self, raw: bytes) -> tuple[Image.Image, Box]:
        """The decoded image (a JPEG may be scaled down), and the part of it to use."""
        if not raw:
            raise SampleRejected("empty file; replace it")
        image: Image.Image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
        if width * height > self.max_pixels:
            problem = f"{width} x {height} pixels, more than data.max_pixels = {self.max_pixels}"
            raise SampleRejected(f"{problem}; raise data.max_pixels, or make the image smaller")
        if image.format == "JPEG" and (scans := raw.count(SCAN)) > MAX_SCANS:
            problem = f"a JPEG of {scans} scans, more than {MAX_SCANS}, which take time without end"
            raise SampleRejected(f"{problem}; save it again as a baseline JPEG")
        least = math.ceil(MARGIN * self.size)
        drafted = image.draft("L" if self.channels == 1 else None, (least, least))  # None for other formats
        image.load()
        return image, self._box(width, height, width / drafted[1][2] if drafted else 1)

    def _box(self, width: int, height: int, scale: float = 1) -> Box:
        """The part to use: cut at whole pixels of the original, in pixels of the `scale` times smaller image."""
        left, top, right, bottom = 0, 0, width, height
        if self.resize == "crop":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            right, bottom = left + side, top + side
        return left / scale, top / scale, right / scale, bottom / scale

    def _fit(self, image: Image.Image, box: Box) -> Image.Image:
        image.info.pop("transparency", None)  # alpha is dropped, and Pillow would warn about some palettes
        if image.mode == "F":
            raise SampleRejected("floating-point pixels; convert the image to 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits to white
            greys = np.asarray(image)
            if greys.dtype == np.int32 and _is_unsigned_tiff(image):
                greys = greys.view(np.uint32)  # Pillow has no mode for these
            low, high = int(greys.min()), int(greys.max())
            if low < 0 or high > MAX_GREY:
                problem = f"grey levels from {low:,} to {high:,}, outside 0..{MAX_GREY:,}"
                raise SampleRejected(f"{problem}; scale the image to 8 or 16 bits without a sign")
            image = Image.fromarray((greys // 257).astype(np.uint8))
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box, REDUCING_GAP)


def _checked(pixels: Array) -> Array:
    """Pixels as Pillow takes them. Raises SampleRejected for another type or shape."""
    wide, grey = pixels.dtype == np.uint16, pixels.ndim == 2
    colors = pixels.dtype == np.uint8 and (grey or pixels.shape[2:] in ((1,), (3,), (4,)))
    if not ((wide and grey) or colors) or not pixels.size:
        allowed = "uint8 [H, W], [H, W, 1] or [H, W, 3]"
        raise SampleRejected(f"an array of {pixels.dtype} {list(pixels.shape)}; the pixels of an image are {allowed}")
    return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation 1..8; 1 (upright) if the metadata is missing or damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # as for pixels: damaged bytes raise almost anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def _is_unsigned_tiff(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", {})
    return tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,)


def _without_texts(png: bytes) -> bytes:
    """A PNG without the chunks of PNG_TEXTS; bytes that are no whole chunk stay, for the decoder to judge."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")  # length, kind, content, checksum
        if png[at + 4 : at + 8] not in PNG_TEXTS:
            kept.append(png[at:end])
        at = end
    return b"".join([*kept, png[at:]])


def encode(pixels: Array, quality: int) -> bytes:
    """uint8 [C, H, W], C = 1 or 3 -> JPEG; the same bytes for the same pixels. `quality`: 1 to 100."""
    buffer, rows = io.BytesIO(), pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(rows)).save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def decode_stored(data: bytes, shape: Sequence[int]) -> Array:
    """The output of `encode` -> new uint8 of `shape`, (C, H, W). Raises SampleRejected for damage and for another shape."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        actual, expected = (1 if space == "Gray" else 3, height, width), tuple(shape)
        if actual != expected:
            raise SampleRejected(f"stored image has the shape {actual} (C, H, W), not {expected}")
        image = simplejpeg.decode_jpeg(data, "GRAY" if shape[0] == 1 else "RGBX", fastdct=False)
    except ValueError as error:
        raise SampleRejected(f"stored image is damaged: {error}") from None
    if shape[0] == 1:
        return image.reshape(shape)
    words = image.view("<u4")[..., 0]  # R, G, B and padding: splitting words into planes is faster than splitting bytes
    planes = np.empty(shape, np.uint8)
    for i in range(3):
        planes[i] = words >> (8 * i) if i else words
    return planes

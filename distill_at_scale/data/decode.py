"""Raw sample -> uint8 image of a fixed shape, or the reason why not.

Left out: clips (`T x C x H x W`) and the fast decoders for large JPEG sets.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


class Rejected(Exception):
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

    def __call__(self, raw: bytes | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Raises Rejected for whatever is wrong with the sample."""
        try:
            image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else self._open(raw)
            image = self._fit(_eight_bits(image).convert("L" if self.channels == 1 else "RGB"))
        except (Rejected, MemoryError):
            raise
        except UnidentifiedImageError:
            raise Rejected(f"not an image in a known format ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:
            raise Rejected(f"decompression bomb: {error}") from None
        except Exception as error:  # a decoder fed with damaged bytes raises almost anything
            raise Rejected(f"damaged: {str(error) or type(error).__name__}") from None
        pixels = np.asarray(image, np.uint8)
        return np.ascontiguousarray(pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1))

    def _open(self, raw: bytes) -> Image.Image:
        if not raw:
            raise Rejected("empty file")
        image: Image.Image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
        if width * height > self.max_pixels:
            raise Rejected(f"{width} x {height} pixels, more than data.max_pixels = {self.max_pixels}")
        image.draft(None, (2 * self.size, 2 * self.size))  # a large JPEG is decoded at a fraction of its size
        image.load()
        return ImageOps.exif_transpose(image)

    def _fit(self, image: Image.Image) -> Image.Image:
        target = (self.size, self.size)
        if image.size == target:
            return image
        if self.resize == "crop":
            return ImageOps.fit(image, target, Image.Resampling.BICUBIC)
        return image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey levels become 8-bit ones; Pillow's own conversion would clip them to white."""
    if image.mode == "F":
        raise Rejected("floating-point pixels; convert the image to 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) // 257).astype(np.uint8))


def encode(pixels: np.ndarray[Any, Any], quality: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def decode_stored(data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)

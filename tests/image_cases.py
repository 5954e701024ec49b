"""Artificial photos, and a full decode to compare with."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps


def picture(width: int = 12, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 500, height: int = 375) -> Image.Image:
    """Smooth colours, waves of all lengths down to 6 pixels, a little noise: like a photo, no two corners alike."""
    y, x = np.mgrid[:height, :width].astype(float)
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    waves = [np.sin(x / 2 + y / 5), np.cos(y / 1.5 - x / 9), np.sin((x + y) / 30)]
    ramps = [x / width, y / height, 1 - x / width]
    image = np.stack([25 * wave + 40 + 150 * ramp for wave, ramp in zip(waves, ramps, strict=True)], -1) + noise
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def in_full(raw: bytes, size: int, mode: str = "RGB", crop: bool = False) -> np.ndarray:
    """The reference: every pixel decoded, turned, and resized in one antialiased bicubic step."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert(mode)
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side) if crop else (0, 0, width, height)
    decoded = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(decoded)[None] if mode == "L" else np.asarray(decoded).transpose(2, 0, 1)


def decibels(decoded: np.ndarray, expected: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(((decoded.astype(float) - expected) ** 2).mean()), 1e-3))

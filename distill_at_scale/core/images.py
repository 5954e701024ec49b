"""uint8 pixels to PIL images: a still, the frames of a clip, or a grid of either; and their bytes as (animated) PNG or WebP.

An image is [C, H, W], a clip [T, C, H, W]; one channel is grey, three are RGB. Other arrays become pixels by `to_pixels`.
All results are lists of frames, of length one for images. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

FRAMES_PER_SECOND = 8  # of animations and exported videos
COLORS = 256  # of a palette
WEBP_QUALITY = 75
PLOT, LARGEST_SHEET = 96, 256  # side in pixels of a signal's plot, and of an array shown as an image
# colours of a signal's channels
LINES = ("#2f5fd0", "#d9962b", "#12927f", "#b03a6b", "#66717f", "#7a4fd0", "#3d8b3d", "#8a5a2b")

Array = np.ndarray[Any, Any]
Frames = list[Image.Image]


def to_pixels(samples: Array) -> Array:
    """Float arrays [n, *shape] to uint8 pixels [n, C, H, W] with one scale for all; uint8 arrays stay as they
    are. A signal, [L] or [C, L] with few channels, becomes a line plot, others a grey image with the last axis as rows.
    """
    if samples.dtype == np.uint8 or not len(samples):
        return samples
    low, high = np.nanmin(samples), np.nanmax(samples)
    shares = np.nan_to_num((samples - low) / (high - low if high > low else 1.0), posinf=1.0, neginf=0.0)
    signals = shares[:, None] if shares.ndim == 2 else shares
    if signals.ndim == 3 and signals.shape[1] <= len(LINES):
        return np.stack([_plot(signal) for signal in signals])
    sheets = (255 * shares.reshape(len(shares), -1, shares.shape[-1])).round().astype(np.uint8)
    tall, wide = (math.ceil(side / LARGEST_SHEET) for side in sheets.shape[1:])
    return np.ascontiguousarray(sheets[:, None, ::tall, ::wide])


def _plot(signal: Array) -> Array:
    """Values 0..1 [C, L] -> uint8 [3, PLOT, PLOT], a line per channel, drawn at twice the size and reduced."""
    side = 2 * PLOT
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    across = np.linspace(4, side - 5, max(2, signal.shape[1]))
    for values, color in zip(signal, LINES, strict=False):
        down = (side - 5) - np.resize(values, len(across)) * (side - 9)
        pen.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=color, width=3)
    return np.asarray(image.resize((PLOT, PLOT), Image.Resampling.BOX)).transpose(2, 0, 1)


def to_image(pixels: Array) -> Image.Image:
    """uint8 [C, H, W] -> an image; [T, C, H, W] -> its middle frame."""
    still = pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels
    return Image.fromarray(still[0] if len(still) == 1 else np.ascontiguousarray(still.transpose(1, 2, 0)))


def to_frames(pixels: Array, limit: int | None = None) -> Frames:
    """uint8 [C, H, W] -> one frame, [T, C, H, W] -> T frames; sides longer than `limit` are reduced to it."""
    frames = [to_image(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    for frame in frames:
        if limit is not None and max(frame.size) > limit:
            frame.thumbnail((limit, limit), Image.Resampling.BOX)
    return frames


def grid(pixels: Array, columns: int, side: int, gap: int = 2) -> Frames:
    """uint8 [n, C, H, W] -> one RGB image of n tiles, row by row; [n, T, C, H, W] -> T such images. Tiles are enlarged
    by a whole factor, without smoothing, to at least `side` pixels.
    """
    factor = max(1, math.ceil(side / pixels.shape[-1]))
    cell = pixels.shape[-1] * factor + gap
    size = columns * cell + gap, math.ceil(len(pixels) / columns) * cell + gap
    sheets = [Image.new("RGB", size, "white") for _ in range(pixels.shape[1] if pixels.ndim == 5 else 1)]
    for i, tile in enumerate(pixels):
        for sheet, frame in zip(sheets, to_frames(tile), strict=True):
            enlarged = frame.resize((cell - gap, cell - gap), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (i % columns * cell + gap, i // columns * cell + gap))
    return sheets


def png(frames: Sequence[Image.Image], optimize: bool = False) -> bytes:
    """Lossless; several frames become an animation in an endless loop, of which plain PNG readers show the first."""
    return _encoded(frames, "PNG", optimize=optimize)


def palette_png(frames: Sequence[Image.Image]) -> bytes:
    """Like `png` with at most COLORS colours over all frames: a third of the bytes. Grey images stay lossless."""
    if frames[0].mode == "L":
        return png(frames)
    width, height = frames[0].size
    tall = Image.new(frames[0].mode, (width, height * len(frames)))
    for i, frame in enumerate(frames):
        tall.paste(frame, (0, i * height))
    tall = tall.quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return png([tall.crop((0, i * height, width, (i + 1) * height)) for i in range(len(frames))])


def webp(frames: Sequence[Image.Image]) -> bytes:
    """Lossy, colour at half the resolution; for real scenes it takes a third of the bytes of `palette_png`."""
    return _encoded(frames, "WEBP", quality=WEBP_QUALITY)


def _encoded(frames: Sequence[Image.Image], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:], "duration": 1000 // FRAMES_PER_SECOND, "loop": 0}
    frames[0].save(buffer, format=kind, **options)
    return buffer.getvalue()

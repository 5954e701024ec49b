"""The embedded video set: scikit-learn's digits moving in one of eight directions, as real mp4 files.

The class is the direction. A digit starts anywhere on a square without borders (what leaves on one side comes back on
the other) and keeps its direction and speed, so its place in any single frame is uniform and says nothing about
the class; nor does the digit, which is drawn at random. The files are encoded on first use below `data.path`, in the layout
train/<direction>/<number>.mp4 and test/..., and then read like any folder of videos. Training and test clips
show different digits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.mp4 import encode_mp4
from distill_at_scale.data.sources.video.videofolder import VideoFolder
from distill_at_scale.storage.filesystem import is_uri

DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
TEST_EVERY = 3  # of three digits one is for testing
SIDE, DIGIT, FRAMES, RATE = 64, 32, 24, 12  # pixels, pixels, frames, frames per second
SLOWEST, FASTEST = 2.0, 3.5  # pixels per frame
ENCODER = {"crf": "12", "preset": "fast"}
PLACE = "runs/moving_digits_videos"

Array = np.ndarray[Any, Any]


class MovingDigits(VideoFolder):
    """Raises UserError where the files cannot be put below `data.path`."""

    def __init__(self, config: DataSection) -> None:
        config = config if config.path else config.model_copy(update={"path": PLACE})
        assert config.path is not None
        if is_uri(config.path):
            raise UserError(f"the source moving_digits makes its own files and needs a local folder, not {config.path}")
        folder = Path(config.path)
        if not (folder / "train").is_dir():
            _make(folder)
        super().__init__(config)


def _make(folder: Path) -> None:
    """Encode every clip, and let the finished folder appear at once."""
    if folder.exists():
        raise UserError(f"{folder} is there and holds no moving digits; name a new folder in data.path, or remove it")
    images, splits = digits()
    with publish(folder) as temporary:
        for number, (image, split) in enumerate(zip(images, splits, strict=True)):
            direction = DIRECTIONS[number // TEST_EVERY % len(DIRECTIONS)]
            target = temporary / split / direction / f"{number:04d}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encode_mp4(clip(image, path(direction, number)), RATE, ENCODER))


def digits() -> tuple[Array, list[str]]:
    """uint8 [1797, 8, 8], in an order that mixes all ten, and the split of each."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = images[rng.numpy_generator(0, "moving digits").permutation(len(images))]
    return images, ["test" if number % TEST_EVERY == 0 else "train" for number in range(len(images))]


def path(direction: str, number: int) -> Array:
    """Where the digit's corner is in every frame: rows and columns, float [FRAMES, 2], in [0, SIDE)."""
    draw = rng.numpy_generator(0, "moving digits", number)
    start, speed = draw.uniform(0, SIDE, 2), draw.uniform(SLOWEST, FASTEST)
    angle = DIRECTIONS.index(direction) * math.pi / 4
    step = speed * np.array([math.sin(angle), math.cos(angle)])
    return (start + np.arange(FRAMES)[:, None] * step) % SIDE


def clip(image: Array, places: Array) -> Array:
    """A digit uint8 [8, 8] on its path [FRAMES, 2] -> uint8 [FRAMES, SIDE, SIDE, 3]."""
    from scipy.ndimage import shift, zoom

    canvas = np.zeros((SIDE, SIDE), np.float32)
    canvas[:DIGIT, :DIGIT] = zoom(image.astype(np.float32), DIGIT / len(image), order=1, grid_mode=True, mode="nearest")
    frames = [shift(canvas, place, order=1, mode="grid-wrap") for place in places]
    return np.repeat(np.stack(frames).clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)

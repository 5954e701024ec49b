"""The built-in video set: scikit-learn's digits moving in one of eight directions, as mp4 files. The class is the direction.

A digit starts anywhere on a square without borders (what leaves on one side returns on the other) and keeps direction and
speed. Its position in a single frame is therefore uniform and says nothing about the class; nor does the digit, which is
random. The files are encoded on first use below `data.path` as train/<direction>/<number>.mp4 and test/..., and then read
like any folder of videos. Training and test clips show different digits.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import Array
from distill_at_scale.data.codecs.mp4 import encode_mp4
from distill_at_scale.data.sources.folders import VideoFolder
from distill_at_scale.data.sources.image.digits import load_digits
from distill_at_scale.storage.filesystem import is_uri

DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
TEST_EVERY = 3  # every third digit is for testing
SIDE, DIGIT, FRAMES, RATE = 64, 32, 24, 12  # pixels, pixels, frames, frames per second
MIN_SPEED, MAX_SPEED = 2.0, 3.5  # pixels per frame
ENCODER = {"crf": "12", "preset": "fast"}
DEFAULT_PATH = "runs/moving_digits_videos"


class MovingDigits(VideoFolder):
    """Raises UserError if the files cannot be written below `data.path`."""

    def __init__(self, config: DataSection) -> None:
        config = config if config.path else config.model_copy(update={"path": DEFAULT_PATH})
        assert config.path is not None
        if is_uri(config.path):
            raise UserError(f"the source moving_digits writes files and needs a local folder, not {config.path}")
        folder = Path(config.path)
        if (folder / "train").is_dir():
            return super().__init__(config)
        if folder.exists():
            raise UserError(f"{folder} exists and holds no moving digits; name a new folder in data.path, or remove it")
        images, splits = digits()
        with publish(folder) as temporary:  # the finished folder appears at once
            for number, (image, split) in enumerate(zip(images, splits, strict=True)):
                direction = DIRECTIONS[number // TEST_EVERY % len(DIRECTIONS)]
                target = temporary / split / direction / f"{number:04d}.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(encode_mp4(clip(image, path(direction, number)), RATE, ENCODER))
        super().__init__(config)


def digits() -> tuple[Array, list[str]]:
    """uint8 [1797, 8, 8] in an order that mixes all ten digits, and the split of each."""
    images, _ = load_digits()
    images = images[rng.numpy_generator(0, "moving digits").permutation(len(images))]
    return images, ["test" if number % TEST_EVERY == 0 else "train" for number in range(len(images))]


def path(direction: str, number: int) -> Array:
    """The digit's corner in each frame: (row, column), float [FRAMES, 2], in [0, SIDE)."""
    draw = rng.numpy_generator(0, "moving digits", number)
    start, speed = draw.uniform(0, SIDE, 2), draw.uniform(MIN_SPEED, MAX_SPEED)
    angle = DIRECTIONS.index(direction) * math.pi / 4
    step = speed * np.array([math.sin(angle), math.cos(angle)])
    return (start + np.arange(FRAMES)[:, None] * step) % SIDE


def clip(image: Array, places: Array) -> Array:
    """Draws a digit uint8 [8, 8] on its path [FRAMES, 2]; returns uint8 [FRAMES, SIDE, SIDE, 3]."""
    from scipy.ndimage import shift, zoom

    canvas = np.zeros((SIDE, SIDE), np.float32)
    canvas[:DIGIT, :DIGIT] = zoom(image.astype(np.float32), DIGIT / len(image), order=1, grid_mode=True, mode="nearest")
    frames = [shift(canvas, place, order=1, mode="grid-wrap") for place in places]
    return np.repeat(np.stack(frames).clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)

"""Encoded video -> uint8 clip of a fixed shape, or the reason why not: which frames, how large, and in which process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_at_scale.config import DataSection
from distill_at_scale.data.decode import Rejected

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes T frames of a video, converts them to grey or RGB and resizes them; the result has shape (T, C, size, size)."""

    frames: int
    size: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.channels, self.size, self.size

    def __call__(self, name: str, raw: bytes) -> tuple[Array, str | None]:
        """The bytes of a video file -> uint8 of `shape`, and a remark if it is shorter than that (its last frame repeats).

        `name` is the sample's id, which decides random draws. Raises Rejected for whatever is wrong with the sample.
        """
        raise Rejected("clips cannot be decoded yet")


def clip_decoder(data: DataSection, seed: int) -> ClipDecoder:
    assert data.frames is not None
    return ClipDecoder(data.frames, data.size, data.channels)

"""Broken videos: an accepted clip without a remark equals a plain decode of all frames, done in another process."""

from __future__ import annotations

import io
import random
import struct
from typing import Any

import av
import mutating
import numpy as np
from videos import numbered, write_video

from distill_at_scale.data.codecs.clip import ClipDecoder
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.codecs.worker_process import IsolatedFunction, WorkerDied

SIDE, FRAMES = 16, 3


def broken_boxes(data: bytes, chance: random.Random) -> bytes:
    """Boxes of an mp4 repeated, dropped, moved or broken, at some level; the lengths above them stay right."""
    parts = mutating.boxes(data)
    inner = [i for i, part in enumerate(parts) if part[4:8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")]
    if inner and chance.random() < 0.8:
        at = chance.choice(inner)
        below = broken_boxes(parts[at][8:], chance)
        parts[at] = struct.pack(">I", len(below) + 8) + parts[at][4:8] + below
        return b"".join(parts)
    return b"".join(mutating.shuffled(parts, chance))


def plainly(header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
    """For `IsolatedFunction`: the grey mean of each frame, decoded in order; empty if anything fails to decode."""
    try:
        with av.open(io.BytesIO(raw)) as container:
            frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    except (av.error.FFmpegError, ValueError, IndexError, MemoryError):
        return {"means": []}, b""
    return {"means": [float(frame.mean()) for frame in frames]}, b""


def test_broken_videos_are_refused_or_what_a_plain_decode_gives():
    frames = numbered(8, 16, 16)
    seeds = [write_video(None, frames), write_video(None, frames, gop=3, settings={"bf": "2"})]
    seeds += [write_video(None, frames, movflags="faststart"), write_video(None, frames, codec="libvpx")]
    seeds += [write_video(None, frames, codec="mpeg4"), write_video(None, frames, codec="mjpeg")]
    decoder = ClipDecoder(FRAMES, SIDE, 1, max_pixels=10_000, time_limit=20.0)
    second = IsolatedFunction(f"{__name__}:plainly")

    def attempt(raw: bytes) -> bool:
        try:
            clip, remark = decoder("x", raw)
        except SampleRejected:
            return False
        assert (clip.shape, clip.dtype) == ((FRAMES, 1, SIDE, SIDE), np.uint8)
        try:
            means = second.call({}, raw, 20.0)[0]["means"]
        except WorkerDied:  # it has no opinion
            return True
        if remark is None and len(means) >= FRAMES:
            nearest = [min(abs(float(frame.mean()) - mean) for mean in means) for frame in clip]
            assert max(nearest) < 8, f"frames that are none of the video's: {nearest}"
        return True

    mutating.run("clips", 0.05, seeds, attempt, [broken_boxes, broken_boxes])

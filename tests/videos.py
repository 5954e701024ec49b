"""Tiny real video files for tests, encoded with PyAV: whole ones, and the ways in which the files of real sets are broken.

Nothing here is read from disk or taken from anywhere; the same arguments give the same file up to what the encoder decides.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import signal
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from distill_at_scale.data.codecs.video_decoders import pyav_frames

Array = np.ndarray[Any, Any]

FORMATS = {"libx264": "mp4", "mpeg4": "avi", "libvpx": "webm", "libvpx-vp9": "webm", "gif": "gif", "mjpeg": "avi"}
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}  # all others: yuv420p


def write_video(
    path: Path | str | None,
    frames: Array,
    fps: float = 10,
    codec: str = "libx264",
    container: str | None = None,
    gop: int = 12,
    settings: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """Encode uint8 [T, H, W, 3] (RGB, H and W even); returns the file's bytes and writes them to `path` where one is given.

    `container` is FFmpeg's name of the format, by default the usual one of the codec (mp4, avi, webm); `gop` the frames
    from one key frame to the next; `settings` go to the encoder (`{"bf": "3"}`: B-frames); `options` go to the container
    (`movflags="faststart"`: the index in front, so that a cut file still has it).
    """
    with tempfile.NamedTemporaryFile() as file:  # a real one: faststart reads it again
        _encode(file.name, frames, fps, codec, container or FORMATS[codec], gop, settings or {}, options)
        return _written(path, Path(file.name).read_bytes())


def _encode(
    target: str,
    frames: Array,
    fps: float,
    codec: str,
    container: str,
    gop: int,
    settings: dict[str, str],
    options: dict[str, str],
) -> None:
    with av.open(target, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], PIXELS.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.options = {"libx264": {"preset": "ultrafast", "crf": "10"}}.get(codec, {}) | settings
        if codec != "libx264":
            stream.bit_rate = 4_000_000
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        output.mux(stream.encode())


def numbered(count: int, height: int = 48, width: int = 64) -> Array:
    """uint8 [count, height, width, 3]: frame i says its number in four grey bands (base 4), which `number_of` reads back."""
    digits = np.array([[i // 4**k % 4 for k in range(4)] for i in range(count)])  # [count, 4]
    rows = np.repeat(digits * 70 + 20, height // 4, axis=1).astype(np.uint8)  # [count, height]
    return np.broadcast_to(rows[:, :, None, None], (count, rows.shape[1], width, 3)).copy()


def number_of(frame: Array) -> int:
    """The number that a frame of `numbered`, decoded to uint8 [C, H, W] of any size, carries."""
    bands = np.array_split(frame.astype(float).mean(0), 4)  # four times [H / 4, W]
    middle = [band[len(band) // 4 : math.ceil(len(band) * 3 / 4)].mean() for band in bands]
    return sum(int(np.clip(round((value - 20) / 70), 0, 3)) * 4**k for k, value in enumerate(middle))


def write_audio(path: Path | str | None, seconds: float = 1.0) -> bytes:
    """An mp4 that holds nothing but a second of sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        samples = np.zeros((1, int(8000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return _written(path, buffer.getvalue())


def write_without_frames(path: Path | str | None) -> bytes:
    """An avi that announces a video stream and holds none of its frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    return _written(path, buffer.getvalue())


def without_index(raw: bytes) -> bytes:
    """An mp4 of `write_video` (index behind the frames) cut before its moov atom: a download that stopped."""
    assert b"moov" in raw[len(raw) // 2 :]
    return raw[: raw.rindex(b"moov") - 4]


def cut(frames: Array, share: float = 0.5, **settings: Any) -> bytes:
    """An mp4 whose index is in front and whole, but of whose frames only about a `share` is there."""
    raw = write_video(None, frames, movflags="faststart", **settings)
    start = raw.index(b"mdat")
    assert raw.index(b"moov") < start
    return raw[: start + int((len(raw) - start) * share)]


def rotated(raw: bytes, degrees: int) -> bytes:
    """The same mp4 with the note that it is to be shown turned clockwise by 90, 180 or 270 degrees, as telephones write it."""
    sine, cosine = round(math.sin(math.radians(degrees))), round(math.cos(math.radians(degrees)))
    matrix = [cosine, sine, 0, -sine, cosine, 0, 0, 0, 1]  # a, b, u, c, d, v, x, y, w of the track's header
    units = [2**16, 2**16, 2**30] * 3
    packed = b"".join((m * u & 0xFFFFFFFF).to_bytes(4, "big") for m, u in zip(matrix, units, strict=True))
    start = raw.index(b"tkhd") + 4 + 40  # behind the 40 bytes of version, flags, times, id, duration, layer, volume
    assert raw[raw.index(b"tkhd") + 4] == 0, "the long form of the header"
    return raw[:start] + packed + raw[start + 36 :]


def marked(raw: bytes, word: str) -> bytes:
    """The same mp4 with a harmless box behind it that holds a word, for `faulty`."""
    return raw + (8 + len(word)).to_bytes(4, "big") + b"free" + word.encode()


def faulty(video: Any, wanted: Any, size: int, resize: str, fast: bool) -> Array:
    """A decoder (`ClipDecoder(decoders=("videos:faulty",))`) that does to its process what the file's mark says."""
    if video.raw.endswith(b"abort"):
        os.abort()
    if video.raw.endswith(b"exit"):
        os._exit(3)
    if video.raw.endswith(b"kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if video.raw.endswith(b"spin"):
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, as decord does
    if video.raw.endswith(b"memory"):
        np.ones(2**33, np.uint8)
    return pyav_frames(video, wanted, size, resize, fast)


def loaded(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """For `IsolatedFunction`: which modules its process has loaded, and the bytes back."""
    return {"modules": sorted({name.split(".")[0] for name in sys.modules})}, body


def slow(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """For `IsolatedFunction`: sleeps for `header["sleep"]` seconds."""
    time.sleep(header["sleep"])
    return {}, body


def _written(path: Path | str | None, raw: bytes) -> bytes:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(raw)
    return raw

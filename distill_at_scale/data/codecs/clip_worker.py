"""One video file -> the clip that is asked for, or the reason why not: which frames, and which decoder if one fails.

This runs in the child process of a `ClipDecoder`, behind `data/codecs/worker_process.py`; it knows neither the configuration nor torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_at_scale.core import rng
from distill_at_scale.data.codecs.video_decoders import Decoder, Failed, Fewer, NotAsked, decord_frames, pyav_frames
from distill_at_scale.data.codecs.video_probe import Unusable, Video, opened

Array = np.ndarray[Any, Any]

DECODERS = {"decord": ("decord", decord_frames), "pyav": ("PyAV", pyav_frames)}  # as people call it, and the function
TOO_LARGE = "needs too much memory"  # more than `Isolated` allows
LUMA = np.array([19595, 38470, 7471], np.uint32)  # of 65536; BT.601, as Pillow's conversion to grey


@dataclass(frozen=True)
class Wanted:
    """A clip; the values of the configuration's keys, and what decides random draws."""

    frames: int
    size: int
    channels: int
    resize: str
    sampling: str
    stride: int
    short: str
    seek: str
    max_pixels: int
    max_seconds: float
    seed: int
    name: str


def answer(header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
    """For `Isolated`: {"decoders": names to try in turn, "wanted": fields of Wanted} and a file -> about the clip, the clip.

    The clip is uint8 [T, C, size, size]; with {"rejected": reason} there is none.
    """
    wanted = Wanted(**header["wanted"])
    try:
        with opened(raw, wanted.max_pixels, wanted.max_seconds) as video:
            frames, said = _decode(video, header["decoders"], wanted)
    except Unusable as error:
        return {"rejected": str(error)}, b""
    except MemoryError:
        return {"rejected": TOO_LARGE}, b""
    except Exception as error:  # libraries fed with damaged bytes raise almost anything
        return {"rejected": f"damaged: {str(error) or type(error).__name__}"}, b""
    short = wanted.frames - len(frames)
    clip = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)]) if short else frames
    return {**said, "remark": _remark(video, short, wanted)}, _planes(clip, wanted.channels).tobytes()


def _decode(video: Video, names: Sequence[str], wanted: Wanted) -> tuple[Array, dict[str, Any]]:
    """Distinct frames, at most T, and who decoded them. Raises Unusable if no decoder can."""
    failures: list[str] = []
    foreseen = True
    for label, decoder in map(_resolve, names):
        try:
            frames = _with(decoder, video, wanted)
        except (Failed, MemoryError) as error:
            foreseen = foreseen and isinstance(error, NotAsked)
            failures.append(f"{label} {error if isinstance(error, Failed) else TOO_LARGE}")
        else:
            return frames, {"decoder": label, "failures": failures, "foreseen": foreseen}
    raise Unusable("; ".join(failures) + (" (data.decoder = auto would ask PyAV)" if names == ["decord"] else ""))


def _with(decoder: Decoder, video: Video, wanted: Wanted) -> Array:
    indices = choose(video.frames, wanted)
    try:
        return decoder(video, indices, wanted.size, wanted.resize, wanted.seek == "fast")
    except Fewer as error:
        video.frames, video.times = error.frames, None
        return _with(decoder, video, wanted)


def _resolve(name: str) -> tuple[str, Decoder]:
    if name in DECODERS:
        return DECODERS[name]
    module, _, attribute = name.partition(":")
    return name, getattr(importlib.import_module(module), attribute)


def choose(n: int, wanted: Wanted) -> list[int]:
    """Ascending, distinct indices into n frames: T of them, or all of a shorter video.

    Raises Unusable where there is but one frame, or too few and `short` is "reject".
    """
    count = wanted.frames
    if n < 2:
        raise Unusable("a single frame, not a video" if n else "no frames")
    if n < count and wanted.short == "reject":
        raise Unusable(f"{n} frames, fewer than data.frames = {count} (data.short = reject)")
    if n <= count:
        return list(range(n))
    if wanted.sampling == "uniform":
        return [int((i + 0.5) * n / count) for i in range(count)]
    draw = rng.numpy_generator(wanted.seed, "frames", wanted.name)
    if wanted.sampling == "segment":
        return [int(draw.integers(i * n // count, (i + 1) * n // count)) for i in range(count)]
    stride = min(wanted.stride, (n - 1) / (count - 1))  # as near to the one asked as the video allows
    start = int(draw.integers(n - int((count - 1) * stride)))
    return [start + int(i * stride) for i in range(count)]


def _remark(video: Video, short: int, wanted: Wanted) -> str | None:
    """What is to be said of a clip that is used."""
    if video.cut:
        there = len([packet for packet in video.packets if not packet.is_discard])
        return f"cut: {there} of {video.frames} frames are there, among them all that are wanted"
    if video.errors:
        return f"damaged: {video.errors} packets do not decode, and frames that build on them may look wrong"
    if short:
        return f"{video.frames} frames, fewer than data.frames = {wanted.frames}: the last one repeats {short} times"
    return None


def _planes(clip: Array, channels: int) -> Array:
    """uint8 [T, H, W, 3] -> [T, 3, H, W], or grey [T, 1, H, W]."""
    if channels == 1:
        return ((clip @ LUMA + 32768) >> 16).astype(np.uint8)[:, None]
    return np.ascontiguousarray(clip.transpose(0, 3, 1, 2))

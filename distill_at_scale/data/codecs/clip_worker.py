"""Decodes one video file to a clip: chooses the frames and falls back to the next decoder if one fails.

This runs in the child process of a `ClipDecoder` (`worker_process.py`); it imports neither the configuration nor torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_at_scale.core import rng
from distill_at_scale.data.codecs import video_decoders
from distill_at_scale.data.codecs.video_probe import Video, VideoRejected, open_video

Array = np.ndarray[Any, Any]

# name -> display name, function
DECODERS = {"decord": ("decord", video_decoders.decord_frames), "pyav": ("PyAV", video_decoders.pyav_frames)}
TOO_LARGE = "needs too much memory; make the video smaller"  # more than `IsolatedFunction` allows
LUMA = np.array([19595, 38470, 7471], np.uint32)  # of 65536; BT.601, as Pillow's conversion to grey


@dataclass(frozen=True)
class ClipRequest:
    """The clip to decode: values of the configuration's keys, and the seed and sample id of random frame choices."""

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


def decode_clip(header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Called through `IsolatedFunction` with {"decoders": names, "request": fields of ClipRequest} and a video file.

    Returns facts about the clip and its bytes, uint8 [T, C, size, size]; {"rejected": reason} comes without a clip.
    """
    request = ClipRequest(**header["request"])
    try:
        with open_video(raw, request.max_pixels, request.max_seconds) as video:
            frames, facts = _decode(video, header["decoders"], request)
    except VideoRejected as error:
        return {"rejected": str(error)}, b""
    except MemoryError:
        return {"rejected": TOO_LARGE}, b""
    except Exception as error:  # libraries fed with damaged bytes raise almost anything
        return {"rejected": f"damaged: {str(error) or type(error).__name__}; replace the file"}, b""
    missing = request.frames - len(frames)
    clip = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]) if missing else frames
    if request.channels == 1:
        planes = ((clip @ LUMA + 32768) >> 16).astype(np.uint8)  # [T, H, W]
    else:
        planes = np.ascontiguousarray(clip.transpose(0, 3, 1, 2))
    remark = None
    if video.cut:
        present = len([packet for packet in video.packets if not packet.is_discard])
        remark = f"cut: {present} of {video.frames} frames are there, among them all that are wanted"
    elif video.errors:
        remark = f"damaged: {video.errors} packets do not decode, and frames that build on them may look wrong"
    elif missing:
        count = f"{video.frames} frames, fewer than data.frames = {request.frames}"
        remark = f"{count}: the last one repeats {missing} times"
    return {**facts, "remark": remark}, planes.tobytes()


def _decode(video: Video, names: Sequence[str], request: ClipRequest) -> tuple[Array, dict[str, Any]]:
    """At most T distinct frames, and who decoded them. Raises VideoRejected if no decoder succeeds."""
    failures: list[str] = []
    expected = True
    for name in names:
        label, decoder = DECODERS[name] if name in DECODERS else (name, pkgutil.resolve_name(name))
        try:
            frames = _frames(decoder, video, request)
        except (video_decoders.DecoderFailed, MemoryError) as error:
            expected = expected and isinstance(error, video_decoders.DecoderSkipped)
            failures.append(f"{label} {error if isinstance(error, video_decoders.DecoderFailed) else TOO_LARGE}")
        else:
            return frames, {"decoder": label, "failures": failures, "expected": expected}
    hint = " (data.decoder = auto would ask PyAV)" if names == ["decord"] else ""
    raise VideoRejected("; ".join(failures) + hint)


def _frames(decoder: video_decoders.Decoder, video: Video, request: ClipRequest) -> Array:
    indices = frame_indices(video.frames, request)
    try:
        return decoder(video, indices, request.size, request.resize, request.seek == "fast")
    except video_decoders.FewerFrames as error:
        video.frames, video.times = error.frames, None
        return _frames(decoder, video, request)


def frame_indices(n: int, request: ClipRequest) -> list[int]:
    """Ascending, distinct indices into n frames: T of them, or all of a shorter video.

    Raises VideoRejected for a single frame, and for too few frames if `short` is "reject".
    """
    count = request.frames
    if n < 2:
        raise VideoRejected(f"{'a single frame, not a video' if n else 'no frames'}; replace or remove the file")
    if n < count and request.short == "reject":
        raise VideoRejected(f"{n} frames, fewer than data.frames = {count}; data.short = repeat would use it")
    if n <= count:
        return list(range(n))
    if request.sampling == "uniform":
        return [int((i + 0.5) * n / count) for i in range(count)]
    draw = rng.numpy_generator(request.seed, "frames", request.name)
    if request.sampling == "segment":
        return [int(draw.integers(i * n // count, (i + 1) * n // count)) for i in range(count)]
    stride = min(request.stride, (n - 1) / (count - 1))  # as close to the configured one as the video allows
    start = int(draw.integers(n - int((count - 1) * stride)))
    return [start + int(i * stride) for i in range(count)]


def probe_clip(header: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Called through `IsolatedFunction` with the limits of `open_video`: codec, size, length and number of frames of a
    video, without decoding it; {"rejected": reason} for a file that is none.
    """
    try:
        with open_video(raw, header["max_pixels"], header["max_seconds"]) as video:
            width, height = video.size
            rate = float(video.stream.average_rate or 0)
            facts = {"width": width, "height": height, "frames": video.frames, "codec": video.stream.codec_context.name}
            return {**facts, "seconds": video.frames / rate if rate else 0.0}, b""
    except VideoRejected as error:
        return {"rejected": str(error)}, b""
    except Exception as error:  # libraries fed with damaged bytes raise almost anything
        return {"rejected": f"damaged: {str(error) or type(error).__name__}"}, b""

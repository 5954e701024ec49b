"""The frames of an open video at given indices, by decord or PyAV.

PyAV decodes non-reference frames only where they are wanted and skips to the next key frame after the last wanted one: the
same bits as a plain decode. decord 0.6.0 silently returns wrong frames from some files, so it decodes only kinds of files on
which it is right. Both scale in FFmpeg (bilinear, antialiased). `data/README.md` has the measurements.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np

from distill_at_scale.data.codecs.video_probe import Video, VideoRejected

Array = np.ndarray[Any, Any]
Decoder = Callable[[Video, Sequence[int], int, str, bool], Array]  # video, indices, size, data.resize, fast

# container -> codecs for which decord never returned wrong frames
DECORD_SUPPORTS = {"mov": ("h264", "hevc"), "matroska": ("vp8", "vp9")}
SKIPPING = ("h264", "hevc", "mpeg4", "vp8")  # codecs whose decoder can change `skip_frame` at any packet


class DecoderFailed(Exception):
    """One decoder failed; another may succeed. The message continues a sentence that begins with the decoder's name."""


class DecoderSkipped(DecoderFailed):
    """The decoder was not tried, because it is known to be wrong on such files."""


class FewerFrames(Exception):
    """An undamaged file whose packets show fewer frames than there are packets; choose the frames again."""

    def __init__(self, frames: int):
        super().__init__(frames)
        self.frames = frames


def fitted(video: Video, size: int, resize: str) -> tuple[int, int]:
    """Width and height to scale to: a square, or with "crop" the smallest size that covers it in the same aspect ratio."""
    if resize != "crop":
        return size, size
    width, height = video.size
    long = size + 2 * round((Fraction(size * max(width, height), min(width, height)) - size) / 2)  # equal margins
    return (long, size) if width > height else (size, long)


def _centre(frames: Array, size: int) -> Array:
    top, left = (frames.shape[-3] - size) // 2, (frames.shape[-2] - size) // 2
    return frames[..., top : top + size, left : left + size, :]


def decord_frames(video: Video, wanted: Sequence[int], size: int, resize: str, fast: bool) -> Array:
    """Frames at ascending, distinct indices as uint8 [n, size, size, 3], RGB. Raises DecoderFailed. It has no fast mode."""
    # on these files decord 0.6.0 silently returned wrong frames or none
    if video.rotated:
        raise DecoderSkipped("mixes up the pixels of turned videos")
    if video.cut:
        raise DecoderSkipped("does not say which frames of a cut video are there")
    container, codec = video.stream.container.format.name.split(",")[0], video.stream.codec_context.name
    if codec not in DECORD_SUPPORTS.get(container, ()):
        raise DecoderSkipped(f"can return other frames than asked of {codec} in {container} files")
    if video.times is not None and any(leading for _, _, leading in _groups(video.packets)):
        raise DecoderSkipped("returns other frames than asked where groups of pictures are open")
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries do not load
        raise DecoderFailed(f"cannot be imported: {error}") from None
    decord.logging.set_level(decord.logging.QUIET)
    width, height = fitted(video, size, resize)
    frames = []
    try:
        reader = decord.VideoReader(io.BytesIO(video.raw), width=width, height=height, num_threads=1)
        if len(reader) != video.frames:
            raise DecoderFailed(f"counts {len(reader)} frames where there are {video.frames}")
        for i in wanted:
            frame = reader[i].asnumpy()
            if frame.shape[:2] != (height, width) or frame.shape[2] < 3:
                raise DecoderFailed(f"returned a frame of the shape {frame.shape}, not {(height, width, 3)}")
            # decord takes the padding of narrow rows for more channels; `get_batch` then fails
            frame = frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
            frames.append(_centre(frame, size))
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        lines = str(error).strip().splitlines() or ["nothing"]
        message = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", lines[0])[:200]  # without times and places in decord's source
        raise DecoderFailed(f"said: {message}") from None
    return np.stack(frames)


def pyav_frames(video: Video, wanted: Sequence[int], size: int, resize: str, fast: bool) -> Array:
    """Frames at ascending, distinct indices as uint8 [n, size, size, 3], RGB. `fast`: without the loop filter.

    Raises VideoRejected if a wanted frame does not decode, FewerFrames if an undamaged file has fewer frames than packets.
    """
    width, height = fitted(video, size, resize)
    scaler = av.video.reformatter.VideoReformatter()

    def convert(frame: Any) -> Array:
        """-> new uint8 [size, size, 3], upright."""
        small = scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        return np.ascontiguousarray(np.rot90(_centre(small.to_ndarray(), size), round(frame.rotation / 90)))

    context = video.stream.codec_context
    if not context.is_open:
        context.thread_count = 1
        context.options = video.settings | ({"skip_loop_filter": "all"} if fast else {})
    frames: dict[int, Array] = {}
    if video.times is not None:
        times = {video.times[i]: i for i in wanted if i < len(video.times)}
        frames = {times[f.pts]: convert(f) for f in _needed(video, set(times)) if f.pts in times}
    if len(frames) < len(wanted):
        frames = _in_order(video, set(wanted), convert)
    return np.stack([frames[i] for i in wanted])


def _needed(video: Video, times: set[int]) -> Iterator[Any]:
    """Decodes as few packets as possible; the frames include all with the wanted times.

    Each stretch of packets reaches from a key frame to the last wanted frame before the next key frame. It continues through
    the next key frame if a wanted frame precedes that in time, as it then needs both.
    """
    stretches: list[tuple[int, int]] = []
    previous = 0  # start of the previous group of pictures
    for start, stop, leading in _groups(video.packets):
        if inside := [i for i in range(start, stop) if video.packets[i].pts in times]:
            begin = previous if leading.intersection(inside) else start
            if stretches and stretches[-1][1] > begin:
                begin = stretches.pop()[0]
            stretches.append((begin, inside[-1] + 1))
        previous = start
    context = video.stream.codec_context
    skipping = context.name in SKIPPING
    for start, stop in stretches:
        for packet in video.packets[start:stop]:
            context.skip_frame = "NONREF" if skipping and packet.pts not in times else "DEFAULT"
            yield from _decoded(video, packet)
        yield from _decoded(video, None)
        context.flush_buffers()
    context.skip_frame = "DEFAULT"


def _groups(packets: list[Any]) -> Iterator[tuple[int, int, set[int]]]:
    """(start, stop, leading) of each group of pictures; `leading`: packets shown before its key frame (an open group)."""
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for start, stop in pairwise([*(keys if keys[:1] == [0] else [0, *keys]), len(packets)]):
        yield start, stop, {i for i in range(start, stop) if packets[i].pts < packets[start].pts}


def _in_order(video: Video, wanted: set[int], convert: Callable[[Any], Array]) -> dict[int, Array]:
    """Decodes every packet. Times identify the frames of a damaged file, their order those of an intact one."""
    frames, count, video.errors = {}, 0, 0
    places = {time: i for i, time in enumerate(video.times)} if video.times and video.frames == len(video.times) else {}
    for packet in [*video.packets, None]:
        for frame in _decoded(video, packet):
            place = places.get(frame.pts, -1) if places else count
            count += 1
            if place in wanted:
                frames[place] = convert(frame)
    video.stream.codec_context.flush_buffers()
    identified = places or not video.errors  # a packet that does not decode shifts the order
    if len(frames) == len(wanted) and identified:
        return frames
    if video.cut or video.errors:
        raise VideoRejected(
            f"{'cut' if video.cut else 'damaged'}: {count} of {video.frames} frames decode; replace the file"
        )
    raise FewerFrames(count)


def _decoded(video: Video, packet: Any) -> list[Any]:
    """Intact frames that one packet yields (None: the last ones)."""
    try:
        frames = video.stream.codec_context.decode(packet)
    except (av.error.FFmpegError, ValueError):
        video.errors += 1
        return []
    intact = [frame for frame in frames if not frame.is_corrupt]
    video.errors += len(frames) - len(intact)
    return intact

"""The frames of an open video at given indices: decord and PyAV behind one small interface.

Exact with PyAV decodes frames on which no other frame depends only where they are wanted, and jumps over what lies between
the last wanted frame and the next key frame: bit for bit the frames of a plain decode, at 1.4 to 1.5 times decord's rate on
Kinetics (`data/codecs/video_probe.py`). `fast` also leaves out the loop filter: the same frames, 43 dB from exact at 64
pixels, 1.7 to 1.9 times decord's rate. Taking the nearest reference frame instead of the wanted one gains nothing on top and
falls to 37 dB; leaving out all B-frames is no faster and falls to 25 dB; a key frame is 56 frames away on average. Frames
that are wanted but do not come (hidden packets, damage) are looked for once more by decoding everything in order.

decord 0.6.0 is asked only where it is right. It returned other frames than those asked, without a word, from avi and mpegts
with B-frames, from H.264 in matroska and flv, from mpeg4 in mp4, and from open groups of pictures; zeros at the end of
such files; mixed up pixels of turned videos; and it loops where a file holds fewer frames than it counts (dmlc/decord
issues 195, 233, 252, 365, 373). Such files are told apart by their kind and their packets, beforehand.

Both resize while converting, in FFmpeg's scaler, bilinear with its support widened to the scale, so antialiased: that is what
decord's `width` and `height` do and cannot be changed, and their results differ by 58 dB. `crop` keeps the aspect ratio (of
the picture as shown, pixels that are not square included), rounded to whole pixels of the scaled frame.

Left out: mirrored pictures, alpha, HDR tone mapping; more threads than one, as processes use cores better.
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

from distill_at_scale.data.codecs.video_probe import Unusable, Video

Array = np.ndarray[Any, Any]
Decoder = Callable[[Video, Sequence[int], int, str, bool], Array]  # video, indices, size, data.resize, fast

RIGHT_IN = {
    "mov": ("h264", "hevc"),
    "matroska": ("vp8", "vp9"),
}  # of which decord was never seen to return other frames
SKIPPING = ("h264", "hevc", "mpeg4", "vp8")  # codecs whose decoder takes up and drops the wish to skip at any packet


class Failed(Exception):
    """One decoder's failure: another may do. The message ends a sentence that begins with the decoder's name."""


class NotAsked(Failed):
    """The decoder is known to be wrong about such files, so it was not asked."""


class Fewer(Exception):
    """An undamaged file in which fewer packets show a frame than there are packets; the frames must be chosen anew."""

    def __init__(self, frames: int):
        super().__init__(frames)
        self.frames = frames


def fitted(video: Video, size: int, resize: str) -> tuple[int, int]:
    """Width and height to scale to: a square, or with "crop" the least that covers it in the picture's own aspect ratio."""
    if resize != "crop":
        return size, size
    width, height = video.size
    long = size + 2 * round((Fraction(size * max(width, height), min(width, height)) - size) / 2)  # margins are alike
    return (long, size) if width > height else (size, long)


def _middle(frames: Array, size: int) -> Array:
    """The centre square of [..., H, W, 3]."""
    top, left = (frames.shape[-3] - size) // 2, (frames.shape[-2] - size) // 2
    return frames[..., top : top + size, left : left + size, :]


def decord_frames(video: Video, wanted: Sequence[int], size: int, resize: str, fast: bool) -> Array:
    """Frames at ascending, distinct indices as uint8 [n, size, size, 3], RGB. Raises Failed. It has no fast mode."""
    _check_for_decord(video)
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries do not load
        raise Failed(f"cannot be imported: {error}") from None
    decord.logging.set_level(decord.logging.QUIET)
    width, height = fitted(video, size, resize)
    try:
        reader = decord.VideoReader(io.BytesIO(video.raw), width=width, height=height, num_threads=1)
        if len(reader) != video.frames:
            raise Failed(f"counts {len(reader)} frames where there are {video.frames}")
        frames = [_unpadded(reader[i].asnumpy(), width, height) for i in wanted]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Failed(f"said: {_plain(str(error))}") from None
    return np.stack([_middle(frame, size) for frame in frames])


def _check_for_decord(video: Video) -> None:
    """Raises NotAsked for what it was seen to answer with other frames, or none, and without a word (decord 0.6.0)."""
    kind = video.stream.container.format.name
    if video.turned:
        raise NotAsked("mixes up the pixels of turned videos")
    if video.cut:
        raise NotAsked("does not say which frames of a cut video are there")
    kind, codec = kind.split(",")[0], video.stream.codec_context.name
    if codec not in RIGHT_IN.get(kind, ()):
        raise NotAsked(f"can return other frames than asked of {codec} in {kind} files")
    if video.times is not None and any(leading for _, _, leading in _groups(video.packets)):
        raise NotAsked("returns other frames than asked where groups of pictures are open")


def _unpadded(frame: Array, width: int, height: int) -> Array:
    """Rows of small frames are padded, which decord takes for more channels, and `get_batch` then fails."""
    if frame.shape[:2] != (height, width) or frame.shape[2] < 3:
        raise Failed(f"returned a frame of the shape {frame.shape}, not {(height, width, 3)}")
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _plain(message: str) -> str:
    """The first line of decord's message, without times and places in decord's source."""
    line = message.strip().splitlines()[0] if message.strip() else "nothing"
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", line)[:200]


def pyav_frames(video: Video, wanted: Sequence[int], size: int, resize: str, fast: bool) -> Array:
    """Frames at ascending, distinct indices as uint8 [n, size, size, 3], RGB. `fast`: without the loop filter.

    Raises Unusable where a wanted frame does not decode, Fewer where an undamaged file has fewer frames than packets.
    """
    convert = _Converter(*fitted(video, size, resize), size)
    context = video.stream.codec_context
    if not context.is_open:
        context.thread_count = 1
        context.options = video.settings | ({"skip_loop_filter": "all"} if fast else {})
    found: dict[int, Array] = {}
    if video.times is not None:
        times = {video.times[i]: i for i in wanted if i < len(video.times)}
        found = {times[f.pts]: convert(f) for f in _needed(video, set(times)) if f.pts in times}
    if len(found) < len(wanted):
        found = _in_order(video, set(wanted), convert)
    return np.stack([found[i] for i in wanted])


class _Converter:
    def __init__(self, width: int, height: int, size: int):
        self.width, self.height, self.size = width, height, size
        self.scaler = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: Any) -> Array:
        """-> new uint8 [size, size, 3], upright."""
        small = self.scaler.reformat(frame, self.width, self.height, "rgb24", interpolation="BILINEAR", threads=1)
        pixels = _middle(small.to_ndarray(), self.size)
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _needed(video: Video, times: set[int]) -> Iterator[Any]:
    """Decoded frames, among them all with the wanted times, from as few packets as possible."""
    context = video.stream.codec_context
    skipping = context.name in SKIPPING
    for start, stop in _stretches(video, times):
        for packet in video.packets[start:stop]:
            context.skip_frame = "NONREF" if skipping and packet.pts not in times else "DEFAULT"
            yield from _decoded(video, packet)
        yield from _decoded(video, None)
        context.flush_buffers()
    context.skip_frame = "DEFAULT"


def _stretches(video: Video, times: set[int]) -> list[tuple[int, int]]:
    """From a key frame to the last wanted frame before the next one; on to that where frames before it in time need both."""
    found: list[tuple[int, int]] = []
    before = 0  # where the previous group of pictures begins
    for start, stop, leading in _groups(video.packets):
        inside = [i for i in range(start, stop) if video.packets[i].pts in times]
        if inside:
            begin = before if leading.intersection(inside) else start
            if found and found[-1][1] > begin:
                begin = found.pop()[0]
            found.append((begin, inside[-1] + 1))
        before = start
    return found


def _groups(packets: list[Any]) -> Iterator[tuple[int, int, set[int]]]:
    """From each key frame to the next, and which packets between show frames before the key frame's (an open group)."""
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for start, stop in pairwise([*(keys if keys[:1] == [0] else [0, *keys]), len(packets)]):
        yield start, stop, {i for i in range(start, stop) if packets[i].pts < packets[start].pts}


def _in_order(video: Video, wanted: set[int], convert: Callable[[Any], Array]) -> dict[int, Array]:
    """Every packet is decoded. Frames are told apart by their times in a damaged file, by their order in a sound one."""
    found, count, video.errors = {}, 0, 0
    places = {time: i for i, time in enumerate(video.times)} if video.times and video.frames == len(video.times) else {}
    for packet in [*video.packets, None]:
        for frame in _decoded(video, packet):
            place = places.get(frame.pts, -1) if places else count
            count += 1
            if place in wanted:
                found[place] = convert(frame)
    video.stream.codec_context.flush_buffers()
    countable = places or not video.errors  # a packet that does not decode shifts what is told apart by order
    if len(found) == len(wanted) and countable:
        return found
    if video.cut or video.errors:
        raise Unusable(f"{'cut' if video.cut else 'damaged'}: {count} of {video.frames} frames decode")
    raise Fewer(count)


def _decoded(video: Video, packet: Any) -> list[Any]:
    """Whole frames that come out on one packet (None: the last ones)."""
    try:
        frames = video.stream.codec_context.decode(packet)
    except (av.error.FFmpegError, ValueError):
        video.errors += 1
        return []
    whole = [frame for frame in frames if not frame.is_corrupt]
    video.errors += len(frames) - len(whole)
    return whole

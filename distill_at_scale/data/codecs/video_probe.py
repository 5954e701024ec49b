"""Video files, opened without trust: what is known of one before any frame is decoded, or why it cannot be used.

FFmpeg (through PyAV) opens a file from memory, in a fixed set of formats: playlists and other formats that lead to further
files or to the network are no videos here. Length and size are taken from the header and checked first. Then the packets
are listed, about a millisecond: they say how many frames there are, and whether the end of the file is missing.

Left out: decoding (`data/codecs/video_decoders.py`), sound, subtitles, encrypted files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import av

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,m4v,mpegvideo,h264,hevc,rm,dv,mxf,ivf"
UNIT = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"  # the matrix of a track that is not turned
# PyAV before 19 refuses files whose titles are not UTF-8
OF_TITLES: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
SEGMENT = b"\x18\x53\x80\x67"  # the element of Matroska that holds all others


class Unusable(Exception):
    """The file's fault, whatever decodes it; the message is the reason for rejecting it."""


@dataclass
class Video:
    """What is known of an open file before any frame is decoded."""

    raw: bytes
    stream: Any
    packets: list[Any]  # in the order of decoding
    times: list[int] | None  # of all frames, sorted; None where packets have no times or not their own ones
    frames: int  # that it has, or had before it was cut
    cut: bool  # the end is missing
    errors: int = 0  # packets that did not decode, so far
    settings: dict[str, str] = field(default_factory=dict)  # of FFmpeg's decoder

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in square pixels, as stored."""
        aspect = float(self.stream.sample_aspect_ratio or 1)
        return max(1, round(self.stream.codec_context.width * aspect)), self.stream.codec_context.height

    @property
    def turned(self) -> bool:
        """Some track of an mp4 is to be shown turned."""
        return any(self.raw[m.end() + s : m.end() + s + 36] != UNIT for m, s in _track_headers(self.raw))


@contextmanager
def opened(raw: bytes, max_pixels: int, max_seconds: float) -> Iterator[Video]:
    """Raises Unusable for what is no video, has no frames, or exceeds a limit (pixels of a frame; seconds)."""
    try:
        container = av.open(io.BytesIO(raw), options={"format_whitelist": FORMATS}, **OF_TITLES)
    except (av.error.FFmpegError, ValueError) as error:
        raise Unusable(_no_video(raw, error)) from None
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise Unusable("no video stream")
        if stream.codec_context is None:
            raise Unusable("a video stream of a codec that FFmpeg cannot decode here")
        _check_header(container, stream, max_pixels, max_seconds)
        video = _indexed(raw, container, stream, max_seconds)
        video.settings = {"max_pixels": str(max_pixels)}
        yield video


def _no_video(raw: bytes, error: Exception) -> str:
    if raw[4:8] == b"ftyp" and b"moov" not in raw:
        return "truncated: an mp4 whose index (the moov atom) is missing; download it again"
    if isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
        return "not a video in a known format"
    return f"truncated or damaged: {getattr(error, 'strerror', None) or error}"


def _check_header(container: Any, stream: Any, max_pixels: int, max_seconds: float) -> None:
    width, height, seconds = stream.codec_context.width, stream.codec_context.height, _seconds(container, stream)
    if width * height > max_pixels:
        raise Unusable(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
    if seconds > max_seconds:
        raise Unusable(_too_long(seconds, max_seconds))


def _too_long(seconds: float, limit: float) -> str:
    return f"{seconds:,.1f} s, more than data.max_seconds = {limit:g}"


def _seconds(container: Any, stream: Any) -> float:
    """What the header claims; 0 where it says nothing."""
    own = 0.0 if stream.duration is None else stream.duration * float(stream.time_base)
    return own or (container.duration or 0) / 1_000_000


def _indexed(raw: bytes, container: Any, stream: Any, max_seconds: float) -> Video:
    packets: list[Any] = []
    with suppress(av.error.FFmpegError):  # damaged in the middle: what was read counts
        packets.extend(packet for packet in container.demux(stream) if packet.size)
    times = [packet.pts for packet in packets if not packet.is_discard]
    claimed = stream.frames or round(_seconds(container, stream) * float(stream.average_rate or 0))
    cut = len(times) < claimed and _ends_early(raw, container.format.name)
    frames = claimed if cut else len(times)
    if not frames:
        raise Unusable("no frames")
    given = [time for time in times if time is not None]
    spread = (max(given) - min(given)) * float(stream.time_base) if given else 0.0  # also where the header says nothing
    if spread > max_seconds:
        raise Unusable(_too_long(spread, max_seconds))
    # an avi says when a packet is decoded, not when its frame is shown
    known = container.format.name != "avi" and None not in times and len(set(times)) == len(times)
    return Video(raw, stream, packets, sorted(times) if known else None, frames, cut)


def _ends_early(raw: bytes, kind: str) -> bool:
    """By its own account the container is longer than the file."""
    if kind.startswith("mov"):
        return _end_of_boxes(raw) > len(raw)
    if kind == "avi":
        return int.from_bytes(raw[4:8], "little") + 8 > len(raw)
    if kind.startswith("matroska") and (at := raw.find(SEGMENT, 0, 4096) + 4) >= 4:
        length = 9 - raw[at].bit_length()
        size = int.from_bytes(raw[at : at + length], "big") - (1 << 7 * length)
        return size != (1 << 7 * length) - 1 and at + length + size > len(raw)  # all ones: unknown
    return False


def _end_of_boxes(raw: bytes) -> int:
    at = 0
    while at + 16 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        size = int.from_bytes(raw[at + 8 : at + 16], "big") if size == 1 else size
        if size < 8:  # 0: to the end of the file
            return len(raw)
        at += size
    return at


def _track_headers(raw: bytes) -> Iterator[tuple[re.Match[bytes], int]]:
    """Of each track: its header's name, and how far behind it the matrix lies (two versions)."""
    yield from ((m, 52 if raw[m.end()] else 40) for m in re.finditer(rb"tkhd(?=[\0\1]\0)", raw))

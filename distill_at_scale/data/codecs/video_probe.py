"""Opens untrusted video files and checks them before any frame is decoded.

FFmpeg (through PyAV) opens a file from memory, in a fixed set of formats: playlists and other formats that refer to further
files or to the network are rejected. The header gives length and size; the packets give the number of frames and whether the
end of the file is missing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import av

from distill_at_scale.data.codecs import foreign_files

KINDS = ("an MP4 or MOV video", "a Matroska or WebM video", "an AVI video")
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,m4v,mpegvideo,h264,hevc,rm,dv,mxf,ivf"
# the matrix of a track that is not rotated
UNROTATED = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
# PyAV before 19 rejects files whose titles are not UTF-8
TITLE_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
SEGMENT = b"\x18\x53\x80\x67"  # the element of Matroska that holds all others


class VideoRejected(Exception):
    """No decoder can use the file; the message is the reason that goes to rejected.parquet."""


@dataclass
class Video:
    """An open file before any frame is decoded."""

    raw: bytes
    stream: Any
    packets: list[Any]  # in decoding order
    times: list[int] | None  # of all frames, sorted; None if packets lack times or share them
    frames: int  # number of frames, including those that a cut file has lost
    cut: bool  # the end is missing
    errors: int = 0  # packets that failed to decode so far
    settings: dict[str, str] = field(default_factory=dict)  # options of FFmpeg's decoder

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in square pixels, as stored."""
        aspect = float(self.stream.sample_aspect_ratio or 1)
        return max(1, round(self.stream.codec_context.width * aspect)), self.stream.codec_context.height

    @property
    def rotated(self) -> bool:
        """Whether some track of an mp4 is to be shown rotated."""
        ends = (match.end() for match in re.finditer(rb"tkhd(?=[\0\1]\0)", self.raw))
        matrices = (end + (52 if self.raw[end] else 40) for end in ends)  # two versions of the header
        return any(self.raw[start : start + 36] != UNROTATED for start in matrices)


@contextmanager
def open_video(raw: bytes, max_pixels: int, max_seconds: float) -> Iterator[Video]:
    """Raises VideoRejected for a file that is not a video, has no frames, or exceeds a limit (pixels per frame; seconds)."""
    try:
        container = av.open(io.BytesIO(raw), options={"format_whitelist": FORMATS}, **TITLE_OPTIONS)
    except (av.error.FFmpegError, ValueError) as error:
        if raw[4:8] == b"ftyp" and b"moov" not in raw:
            reason = "truncated: an mp4 whose index (the moov atom) is missing; download it again"
        elif isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
            reason = foreign_files.describe(raw, "a video", KINDS, "MP4")
        else:
            reason = f"truncated or damaged: {getattr(error, 'strerror', None) or error}; replace the file"
        raise VideoRejected(reason) from None
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoRejected("no video stream, only sound or a cover; replace or remove the file")
        if stream.codec_context is None:
            raise VideoRejected("a video stream of a codec that FFmpeg cannot decode here; convert it to H.264")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            problem = f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}"
            raise VideoRejected(f"{problem}; raise data.max_pixels, or make the video smaller")
        own = 0.0 if stream.duration is None else stream.duration * float(stream.time_base)
        seconds = own or (container.duration or 0) / 1_000_000  # as the header claims; 0 if it does not say
        _check_length(seconds, max_seconds)
        packets: list[Any] = []
        with suppress(av.error.FFmpegError):  # damaged in the middle: keep what was read
            packets.extend(packet for packet in container.demux(stream) if packet.size)
        times = [packet.pts for packet in packets if not packet.is_discard]
        claimed = stream.frames or round(seconds * float(stream.average_rate or 0))
        cut = len(times) < claimed and _ends_early(raw, container.format.name)
        frames = claimed if cut else len(times)
        if not frames:
            raise VideoRejected("no frames; replace or remove the file")
        if present := [time for time in times if time is not None]:  # checked again, as the header may not say
            _check_length((max(present) - min(present)) * float(stream.time_base), max_seconds)
        # an avi says when a packet is decoded, not when its frame is shown
        known = container.format.name != "avi" and None not in times and len(set(times)) == len(times)
        settings = {"max_pixels": str(max_pixels)}
        yield Video(raw, stream, packets, sorted(times) if known else None, frames, cut, settings=settings)


def _check_length(seconds: float, limit: float) -> None:
    if seconds > limit:
        raise VideoRejected(f"{seconds:,.1f} s, more than data.max_seconds = {limit:g}; raise it, or cut the video")


def _ends_early(raw: bytes, kind: str) -> bool:
    """Whether the container says that it is longer than the file."""
    if kind.startswith("mov"):
        at = 0
        while at + 16 <= len(raw):
            size = int.from_bytes(raw[at : at + 4], "big")
            size = int.from_bytes(raw[at + 8 : at + 16], "big") if size == 1 else size
            if size < 8:  # 0: to the end of the file
                return False
            at += size
        return at > len(raw)
    if kind == "avi":
        return int.from_bytes(raw[4:8], "little") + 8 > len(raw)
    if kind.startswith("matroska") and (at := raw.find(SEGMENT, 0, 4096) + 4) >= 4:
        length = 9 - raw[at].bit_length()
        size = int.from_bytes(raw[at : at + length], "big") - (1 << 7 * length)
        return size != (1 << 7 * length) - 1 and at + length + size > len(raw)  # all ones: unknown
    return False

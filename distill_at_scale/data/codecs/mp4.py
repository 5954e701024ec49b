"""Encodes frames to an H.264 mp4 without sound, for the embedded clips and for exports."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import numpy as np

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import Array


def encode_mp4(frames: Iterable[Array], rate: int, options: Mapping[str, str], layout: str = "rgb24") -> bytes:
    """Frames in FFmpeg's pixel layout (rgb24: uint8 [H, W, 3]; sides even) -> an mp4 with `rate` frames per second, yuv420p.

    `options` are libx264's: crf 0 is best, 18 visually lossless, 51 worst. The same frames give the same bytes with the
    same build of the encoder. Raises UserError if PyAV was built without libx264.
    """
    import av  # only encoders need it

    if "libx264" not in av.codecs_available:
        raise UserError("this build of PyAV has no libx264, which encodes videos; install the wheel of `av`")
    pictures = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), layout) for frame in frames]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = pictures[0].height, pictures[0].width, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()

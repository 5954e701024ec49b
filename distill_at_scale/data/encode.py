"""Frames -> an encoded video file: for the embedded clips and for exports.

Left out: sound, and every codec but H.264.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def encode_mp4(frames: Array, rate: int, crf: int, chroma: str = "yuv420p") -> bytes:
    """uint8 [T, H, W, 3] -> an mp4 of `rate` frames per second; crf 0 is the best, 18 looks alike, 51 the worst.

    The height and the width must be even. The same frames give the same bytes with the same build of the encoder.
    """
    import av  # here, because only what encodes needs it

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], chroma
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()

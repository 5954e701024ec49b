"""Decompresses gzip files in memory up to a size limit. `gzip_tar.py` reads archives that are too large for that."""

from __future__ import annotations

import zlib

GZIP = zlib.MAX_WBITS | 16


class Bomb(ValueError):
    """The content is larger than allowed."""


def gunzip(packed: bytes, max_size: int) -> bytes:
    """Returns the content of a gzip file with one or more members.

    Raises Bomb for more than `max_size` bytes, and zlib.error or EOFError for a damaged or cut file.
    """
    content = bytearray()
    while packed:
        stream = zlib.decompressobj(GZIP)
        content += stream.decompress(packed, max_size + 1 - len(content))
        if len(content) > max_size:
            raise Bomb(f"it unpacks to more than {max_size:,} bytes")
        if not stream.eof:
            raise EOFError("it is cut")
        packed = stream.unused_data.lstrip(b"\0")
    return bytes(content)

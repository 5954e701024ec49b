"""Gzip in memory with a limit: a small file that unpacks to more than anyone asked for is refused on the way.

For files that are read whole; archives that are read in place go through `gzip_tar.py`.
"""

from __future__ import annotations

import zlib

GZIP = zlib.MAX_WBITS | 16


class Bomb(ValueError):
    """The content is larger than allowed."""


def gunzip(packed: bytes, most: int) -> bytes:
    """What a gzip file of one or more members holds, at most so many bytes.

    Raises Bomb for more than that, and zlib.error or EOFError where the file is damaged or cut.
    """
    found = bytearray()
    while packed:
        stream = zlib.decompressobj(GZIP)
        found += stream.decompress(packed, most + 1 - len(found))
        if len(found) > most:
            raise Bomb(f"it unpacks to more than {most:,} bytes")
        if not stream.eof:
            raise EOFError("it is cut")
        packed = stream.unused_data.lstrip(b"\0")
    return bytes(found)

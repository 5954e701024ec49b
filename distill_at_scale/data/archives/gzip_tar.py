"""Tars inside gzip, read in place: gzip has no random access, so everything goes forwards, from the beginning.

An index is one pass. A reader keeps its archive open where its last read ended, so that reads in the order of the archive
cost one pass in all; one that asks for something further back starts over. Nothing is unpacked to a disk or remembered.
What a tar is, and what is wrong with one, is told in `tar.py`. Other compressions are left out.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.archives import tar
from distill_at_scale.storage.filesystem import Store, unanswered

SKIPPED = 2**18  # bytes at once
REQUEST = 2**23  # bytes of each request to remote storage


class Stream(tar.Window):
    """A window that only moves forwards over a compressed file; `length` is `tar.ENDLESS` until the end is reached.

    Raises UserError, naming the file, where it is no gzip, cut or damaged, and OSError where it cannot be read.
    """

    def __init__(self, handle: Any, place: str):
        self.handle, self.place, self.length = handle, place, tar.ENDLESS
        self._start, self._bytes, self._idle = 0, b"", bytearray(SKIPPED)
        self._passed = 0  # bytes taken from the handle

    @property
    def position(self) -> int:
        """The first byte that can still be had."""
        return self._start

    def at(self, offset: int, size: int) -> bytes:
        """Some bytes, not before those of the last call; fewer where the file ends before."""
        assert offset >= self._start, "a stream goes forwards"
        kept = self._bytes[offset - self._start :]
        if len(kept) < size:
            self._skip(offset - self._passed)
            kept += self._read(size - len(kept))
        self._start, self._bytes = offset, kept
        return kept[:size]

    def close(self) -> None:
        self.handle.close()

    def _skip(self, count: int) -> None:
        while count > 0 and (done := self._next(memoryview(self._idle)[: min(count, SKIPPED)])):
            count -= done

    def _read(self, size: int) -> bytes:
        content, done = memoryview(bytearray(size)), 0
        while done < size and (more := self._next(content[done:])):
            done += more
        return bytes(content[:done])

    def _next(self, buffer: memoryview) -> int:
        """Fill some of the buffer; 0 at the end, where the length becomes known."""
        try:
            count = self.handle.readinto(buffer)
        except OSError as error:
            if unanswered(error):
                raise
            raise UserError(f"{self.place} is damaged, cut or no gzip file ({error}). {tar.AGAIN}.") from None
        self._passed += count
        if not count:
            self.length = self._passed
        return count


def open_stream(store: Store, file: str) -> Stream:
    """The content of a compressed file. Raises as `Store.open` does."""
    raw = store.open_native(file)
    raw = raw if store.local else pa.BufferedInputStream(raw, REQUEST)
    return Stream(pa.CompressedInputStream(raw, "gzip"), store.place(file))


@contextmanager
def opened(store: Store, file: str) -> Iterator[tar.Window]:
    """An archive for indexing, plain or compressed, as its name says.

    Raises Unreachable, naming the file, where it cannot be opened or where the body fails to read it.
    """
    if is_plain(file):
        with tar.opened(store, file) as window:
            yield window
        return
    try:
        with closing(open_stream(store, file)) as stream:
            yield stream
    except OSError as error:
        raise Unreachable(f"{store.place(file)} cannot be read: {error}; check the file and try again") from None


def is_plain(file: str) -> bool:
    return file.lower().endswith(".tar")


class Reader:
    """Reads members of archives, and keeps the last compressed one open. Can be pickled; threads take turns."""

    def __init__(self, store: Store):
        self.store = store
        self._lock, self._file = threading.Lock(), ""
        self._stream: Stream | None = None

    def read(self, rows: pa.Table) -> list[bytes]:
        """The bytes of some rows of a listing (location: archive, row: offset when unpacked, size), in order.

        Raises as `tar.read` does, and UserError for an archive that is damaged.
        """
        locations = rows["location"].to_pylist()
        offsets, sizes = rows["row"].to_numpy(), rows["size"].to_numpy()
        found: list[bytes] = [b""] * len(locations)
        order = sorted(range(len(locations)), key=lambda i: (locations[i], offsets[i]))
        for file, group in groupby(order, key=locations.__getitem__):
            places = list(group)
            if is_plain(file):
                contents = tar.read(self.store, rows.take(pa.array(places)))
            else:
                contents = self._forwards(file, [(int(offsets[i]), int(sizes[i])) for i in places])
            for place, content in zip(places, contents, strict=True):
                found[place] = content
        return found

    def _forwards(self, file: str, pieces: list[tuple[int, int]]) -> list[bytes]:
        with self._lock:
            stream, self._stream = self._at(file, pieces[0][0]), None  # after an error it is not used again
            contents = []
            for offset, size in pieces:
                contents.append(self.store.asked(file, partial(stream.at, offset, size)))
                if len(contents[-1]) < size:
                    raise FileNotFoundError(errno.ENOENT, "the archive ends inside the sample", self.store.place(file))
            self._file, self._stream = file, stream
            return contents

    def _at(self, file: str, offset: int) -> Stream:
        """The open archive where it is that one and not beyond, else opened anew."""
        stream, self._stream = self._stream, None
        if stream is not None and self._file == file and stream.position <= offset:
            return stream
        if stream is not None:
            stream.close()
        try:
            return open_stream(self.store, file)
        except FileNotFoundError:
            raise UserError(
                f"{self.store.place(file)} is not there any more; put it back and run the command again"
            ) from None
        except OSError as error:  # no permission for a whole archive is no matter of single samples
            raise self.store.refusal(error) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"])  # type: ignore[misc]

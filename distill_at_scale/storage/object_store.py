"""A folder on object storage (`s3://…`, `gs://…`): single files, which are there whole or not at all.

Nothing relies on renaming. What the storage refuses for a while is asked again, and said; what it refuses for good is one
error. Left out: the working copy (`storage/sync.py`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pyarrow import fs

from distill_at_scale.core.errors import Busy, Unreachable
from distill_at_scale.storage.filesystem import Store, is_uri, shown

T = TypeVar("T")
BLOCK = 8 * 2**20  # bytes, of a file that is fetched
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds before a refused request is made again; doubled each time
REFUSED_FOR_GOOD = re.compile(
    r"ACCESS_DENIED|AccessDenied|NO_SUCH_BUCKET|NoSuchBucket|INVALID_ACCESS_KEY|InvalidAccessKey|"
    r"SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|PERMISSION_DENIED|UNAUTHENTICATED"
)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # here, not of the storage

Say = Callable[[str], None]


def is_remote(path: str | Path) -> bool:
    """Whether a folder is on object storage."""
    return is_uri(str(path)) and not str(path).startswith("file://")


class ObjectStore:
    """The folder `uri`. Names are POSIX paths in it; "" is the folder itself.

    What is refused is tried again for `patience` seconds, and then is Unreachable, which says what it was.
    """

    def __init__(self, uri: str, patience: float, say: Say = lambda text: None):
        self.uri, self.patience, self.say = uri, patience, say
        self.hurry = threading.Event()  # the command ends: nothing is waited for any more
        self.barred = threading.Event()  # another command has taken the folder over: nothing is changed there any more

    @cached_property
    def store(self) -> Store:
        return Store(self.uri, "run.dir", must_exist=False)

    def place(self, name: str = "") -> str:
        """A file's address, for messages."""
        return self.store.place(name)

    def path(self, name: str) -> str:
        """A file's name in the file system."""
        return f"{self.store.root}/{name}" if name else self.store.root

    def read(self, name: str, patience: float | None = None) -> bytes | None:
        """A small file; None where there is none. `patience`: another one than the folder's, in seconds."""

        def content() -> bytes:
            with self.store.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()

        try:
            return self._tried(f"reading {name}", content, patience)
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """A file, to a path here; raises FileNotFoundError where there is none, and OSError where the disk cannot take it."""

        def copy() -> None:
            with self.store.filesystem.open_input_stream(self.path(name)) as stream, _written(target) as out:
                while block := stream.read(BLOCK):
                    out.write(block)

        self._tried(f"fetching {name}", copy)

    def write(self, name: str, content: bytes | mmap.mmap, patience: float | None = None) -> int:
        """Store a file; returns the time in ns that the storage notes of it. Raises Busy where the folder is barred.

        `patience`: another one than the folder's, in seconds.
        """
        self._need_right()

        def store() -> int:
            try:
                put(self.store.filesystem, self.path(name), content)
            except FileNotFoundError as error:  # as Google's storage says it
                self._need_bucket(f"storing {name}")
                raise OSError(str(error)) from None
            return self.store.filesystem.get_file_info(self.path(name)).mtime_ns

        return self._tried(f"storing {name}", store, patience)

    def listed(self, *names: str) -> dict[str, Any]:
        """Every file in some files and folders (default: all), by name: pyarrow.fs.FileInfo."""
        found: dict[str, Any] = {}
        for name in names or ("",):
            found |= self._tried("listing", partial(self._infos, name))
        return found

    def delete(self, name: str) -> None:
        """A file, or a folder with all that is in it; that there is none is no error. Raises Busy as `write` does."""
        self._need_right()
        system = self.store.filesystem
        kind = self._tried("looking", partial(system.get_file_info, self.path(name))).type
        remove = {fs.FileType.Directory: system.delete_dir, fs.FileType.File: system.delete_file}.get(kind)
        if remove is not None:
            with contextlib.suppress(FileNotFoundError):
                self._tried(f"removing {name}", partial(remove, self.path(name)))

    def _need_bucket(self, what: str) -> None:
        bucket = self.store.root.partition("/")[0]
        if self.store.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise Unreachable(self._refusal(what, f"there is no bucket {bucket}"))

    def _need_right(self) -> None:
        if self.barred.is_set():
            raise Busy(
                f"another command has taken over {self.place()} while this one could not be seen to live, so nothing more is "
                "stored there; wait until that one has ended, and give the same command again"
            )

    def _infos(self, name: str) -> dict[str, Any]:
        system, start = self.store.filesystem, len(self.store.root) + 1
        info = system.get_file_info(self.path(name))
        if info.type == fs.FileType.File:
            return {name: info}
        infos = system.get_file_info(fs.FileSelector(self.path(name), recursive=True, allow_not_found=True))
        return {info.path[start:]: info for info in infos if info.type == fs.FileType.File}

    def _tried(self, what: str, request: Callable[[], T], patience: float | None = None) -> T:
        """A request that is made again while the storage refuses it for a while.

        Raises FileNotFoundError where there is no such file, OSError for this machine's disk, and Unreachable.
        """
        until, pause = time.monotonic() + (self.patience if patience is None else patience), FIRST_PAUSE
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in OF_THE_DISK and error.filename:
                    raise
                reason = self.store.without_secrets(" ".join(str(error).split()))
                left = until - time.monotonic()
                if left <= 0 or self.hurry.is_set() or REFUSED_FOR_GOOD.search(reason):
                    raise Unreachable(self._refusal(what, reason)) from None
            self.say(f"  {self.place()} refuses {what} ({reason}); it is tried again for {left:.0f} s more")
            self.hurry.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _refusal(self, what: str, reason: str) -> str:
        return (
            f"run.dir = {shown(self.uri)!r}: {what} failed: {reason}. Check the address, the credentials and the network, and "
            "give the same command again; what is stored is kept (run.retry_seconds says how long a refusal is waited for)"
        )


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file here; where the disk is full, the error names it, as Python's own does not."""
    try:
        with open(path, "wb") as out:
            yield out
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def put(filesystem: Any, path: str, content: bytes | mmap.mmap) -> None:
    """One object, which appears whole or not at all: pyarrow's stream completes whatever it was given when it is closed, so
    all is given at once, and nothing that can fail comes between.

    Raises OSError where it is refused, or is not there whole afterwards.
    """
    stream = filesystem.open_output_stream(path)
    stream.write(content)
    stream.close()
    size = filesystem.get_file_info(path).size
    if size != len(content):
        raise OSError(f"{path} has {size} bytes after {len(content)} were stored")

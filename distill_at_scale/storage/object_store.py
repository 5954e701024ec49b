"""A folder in an object store (`s3://…`, `gs://…`): single files, each stored completely or not at all.

Nothing relies on renaming. Failing requests are retried with a log line; permanent refusals are one error at once.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import re
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from distill_at_scale.core.errors import Busy, Unreachable
from distill_at_scale.storage.filesystem import Store, is_uri, redact_uri

T = TypeVar("T")
BLOCK = 8 * 2**20  # bytes per read of a download
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds before a retry; doubled each time
PERMANENT = re.compile(
    r"ACCESS_DENIED|AccessDenied|NO_SUCH_BUCKET|NoSuchBucket|INVALID_ACCESS_KEY|InvalidAccessKey|"
    r"SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|PERMISSION_DENIED|UNAUTHENTICATED"
)
# errors of this machine's disk, not of the store
LOCAL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

Say = Callable[[str], None]


def is_remote(path: str | Path) -> bool:
    """Whether a folder is in an object store."""
    return is_uri(str(path)) and not str(path).startswith("file://")


class ObjectStore:
    """The folder `uri`. Names are POSIX paths in it; "" is the folder itself. Failing requests are retried for
    `retry_seconds` and then raise Unreachable with the reason.
    """

    def __init__(self, uri: str, retry_seconds: float, say: Say = lambda text: None):
        self.uri, self.retry_seconds, self.say = uri, retry_seconds, say
        self.closing = threading.Event()  # the command ends: no more retries
        self.fenced = threading.Event()  # another command holds the lock: no more changes

    @cached_property
    def store(self) -> Store:
        return Store(self.uri, "run.dir", must_exist=False)

    def place(self, name: str = "") -> str:
        """A file's address, for messages."""
        return self.store.place(name)

    def path(self, name: str) -> str:
        """A file's path in the file system."""
        return f"{self.store.root}/{name}" if name else self.store.root

    def read(self, name: str, retry_seconds: float | None = None) -> bytes | None:
        """A small file; None if it does not exist."""

        def content() -> bytes:
            with self.store.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()

        try:
            return self._retried(f"reading {name}", content, retry_seconds)
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """Download a file. Raises FileNotFoundError if there is none, OSError if the local disk cannot store it."""

        def copy() -> None:
            try:
                with self.store.filesystem.open_input_stream(self.path(name)) as stream, open(target, "wb") as out:
                    while block := stream.read(BLOCK):
                        out.write(block)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # name the file, which Python's own error does not
                    raise OSError(error.errno, error.strerror, str(target)) from None
                raise

        self._retried(f"fetching {name}", copy)

    def write(self, name: str, content: bytes | mmap.mmap, retry_seconds: float | None = None) -> int:
        """Store a file; returns its modification time in the store, in ns. Raises Busy if the folder is fenced."""
        self._check_fence()

        def store() -> int:
            try:
                put(self.store.filesystem, self.path(name), content)
            except FileNotFoundError as error:  # Google Cloud Storage reports a missing bucket this way
                bucket = self.store.root.partition("/")[0]
                if self.store.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                    raise Unreachable(self._refusal(f"storing {name}", f"there is no bucket {bucket}")) from None
                raise OSError(str(error)) from None
            return self.store.filesystem.get_file_info(self.path(name)).mtime_ns

        return self._retried(f"storing {name}", store, retry_seconds)

    def listed(self, *names: str) -> dict[str, Any]:
        """All files in some files and folders (default: everything): name -> pyarrow.fs.FileInfo."""
        system, start = self.store.filesystem, len(self.store.root) + 1

        def infos_of(name: str) -> dict[str, Any]:
            info = system.get_file_info(self.path(name))
            if info.type == fs.FileType.File:
                return {name: info}
            infos = system.get_file_info(fs.FileSelector(self.path(name), recursive=True, allow_not_found=True))
            return {info.path[start:]: info for info in infos if info.type == fs.FileType.File}

        result: dict[str, Any] = {}
        for name in names or ("",):
            result |= self._retried("listing", partial(infos_of, name))
        return result

    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it exists. Raises Busy if the folder is fenced."""
        self._check_fence()
        system = self.store.filesystem
        kind = self._retried("looking", partial(system.get_file_info, self.path(name))).type
        remove = {fs.FileType.Directory: system.delete_dir, fs.FileType.File: system.delete_file}.get(kind)
        if remove is not None:
            with contextlib.suppress(FileNotFoundError):
                self._retried(f"removing {name}", partial(remove, self.path(name)))

    def _check_fence(self) -> None:
        if self.fenced.is_set():
            raise Busy(
                f"another command has taken the lock of {self.place()} while this command sent no heartbeat; nothing more is "
                "stored there. Wait until that command has ended, and give the same command again"
            )

    def _retried(self, what: str, request: Callable[[], T], retry_seconds: float | None = None) -> T:
        """Retry a request. Raises OSError if the file is missing or the disk fails, Unreachable if the store keeps
        failing.
        """
        limit = self.retry_seconds if retry_seconds is None else retry_seconds
        until, pause = time.monotonic() + limit, FIRST_PAUSE
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in LOCAL_DISK and error.filename:
                    raise
                reason = self.store.without_secrets(" ".join(str(error).split()))
                left = until - time.monotonic()
                if left <= 0 or self.closing.is_set() or PERMANENT.search(reason):
                    raise Unreachable(self._refusal(what, reason)) from None
            self.say(f"  {what} in {self.place()} failed ({reason}); retrying for {left:.0f} s")
            self.closing.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _refusal(self, what: str, reason: str) -> str:
        return (
            f"run.dir = {redact_uri(self.uri)!r}: {what} failed: {reason}. Check the address, the credentials and the "
            "network, and give the same command again; what is stored is kept (run.retry_seconds sets how long failing "
            "requests are retried)"
        )


def put(filesystem: Any, path: str, content: bytes | mmap.mmap) -> None:
    """Store one object completely or not at all. pyarrow's stream completes the object on `close`, so all content is
    written at once, and nothing can fail in between. Raises OSError if the store refuses it or its size is wrong
    afterwards.
    """
    stream = filesystem.open_output_stream(path)
    stream.write(content)
    stream.close()
    if (size := filesystem.get_file_info(path).size) != len(content):
        raise OSError(f"{path} has {size} bytes after {len(content)} were stored")

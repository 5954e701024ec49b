"""Read access to a folder of data: a local path, or a `pyarrow.fs` URI (`s3://bucket/folder`, `gs://…`).

Files are named by their POSIX path relative to the root. Credentials and endpoints come from the cloud's usual environment
variables, or from options in the URI (`s3://bucket/folder?endpoint_override=localhost:9000&scheme=http&region=us-east-1`).
Listings leave out hidden files and what systems add, such as thumbnails and recycle bins (`is_hidden`).
A missing file raises OSError; a store that does not answer raises Unreachable. Messages show an address only through
`redact_uri`, which hides credentials.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.storage import s3

T = TypeVar("T")
READERS = 16  # threads that read many small remote files
SCANNERS = 8  # threads that list local folders, because network disks answer slowly
BLOCK = 1024  # files whose times one of these threads reads at once
MIN_SECRET = 4  # letters; shorter parts of credentials could be ordinary text
SECRET_OPTION = re.compile(r"([?&][^=&]*(?:secret|token|passw|key|sig|credential)[^=&]*=)[^&]*", re.IGNORECASE)
SERVICE_ERROR = re.compile(r"AWS Error|google::cloud|Azure Error|curl|timed? ?out", re.IGNORECASE)

SYSTEM_NAMES = frozenset({  # files and folders that systems add: macOS, Windows, Linux, network storage, Python; lower case
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "__pycache__",
    "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",
})  # fmt: skip


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a name with a leading dot or one of SYSTEM_NAMES; "." and ".." do not count."""
    names = path.split("/")
    return any((name[:1] == "." and name not in (".", "..")) or name.lower() in SYSTEM_NAMES for name in names)


def join_path(folder: str, name: str) -> str:
    """Join two relative paths; "" is the root."""
    return f"{folder}/{name}" if folder else name


def child_address(address: str, name: str) -> str:
    """The address of `name` in the folder at a path or URI. Options of the URI stay; ".." in `name` leads up."""
    base, question, options = address.partition("?") if is_uri(address) else (address, "", "")
    scheme, mark, path = base.rpartition("://")
    return scheme + mark + posixpath.normpath(f"{path}/{name}") + question + options


def is_uri(path: str) -> bool:
    return "://" in path


def redact_uri(path: str) -> str:
    """A path or URI for messages, without credentials before "@" and without secret options."""
    base, question, query = path.partition("?")
    if "@" in query and "@" not in base and ":" in base.partition("://")[2]:  # the secret contains a "?"
        base, question, query = path, "", ""
    return SECRET_OPTION.sub(r"\1***", re.sub(r"://.*@", "://", base, flags=re.DOTALL) + question + query)


def last_name(path: str) -> str:
    """The name of the folder at a path or URI, without options and credentials."""
    path = redact_uri(path)
    return PurePosixPath(path.partition("?")[0] if is_uri(path) else path).name


def is_access_error(error: OSError) -> bool:
    """Whether an error comes from the disk or the network, not from a file's content (pyarrow gives those no number)."""
    return error.errno is not None or SERVICE_ERROR.search(str(error)) is not None


@dataclass(frozen=True)
class FileInfo:
    path: str  # relative to the root
    size: int  # bytes; -1 if unknown


class Store:
    """The folder that a configuration key names. It connects on first use, so it can be pickled.

    Raises:
        Unreachable: the folder or bucket does not exist or cannot be read.
        UserError: the address is not valid.
    """

    def __init__(self, path: str, key: str = "data.path", must_exist: bool = True):
        self.path, self.key = path, key
        self.local = not is_uri(path) or path.startswith("file://")
        if must_exist:
            self.check()

    def check(self) -> None:
        """Raises Unreachable unless the folder exists and is readable."""
        if self.local:
            if not os.path.isdir(self._root):
                raise Unreachable(f"{self._named}: there is no such folder; give the data set's root folder")
        elif self._request(lambda: self.filesystem.get_file_info(self._root).type) != fs.FileType.Directory:
            raise Unreachable(f"{self._named}: there is no such folder; check bucket and prefix")

    def table(self, folder: str = "") -> tuple[pa.Array, pa.Array]:
        """Paths (string) and sizes (int64) of every file below a folder, sorted by path; without hidden files."""
        parts = list(self._local_files(folder) if self.local else self._remote_files(folder))
        paths = pa.chunked_array([paths for paths, _ in parts], pa.string()).combine_chunks()
        sizes = pa.chunked_array([sizes for _, sizes in parts], pa.int64()).combine_chunks()
        order = pc.sort_indices(paths)
        return paths.take(order), sizes.take(order)

    def files(self, folder: str = "") -> list[FileInfo]:
        """Every file below a folder, at any depth, sorted by path, without hidden files."""
        paths, sizes = self.table(folder)
        return [FileInfo(path, size) for path, size in zip(paths.to_pylist(), sizes.to_pylist(), strict=True)]

    def names(self, folder: str = "") -> tuple[list[str], list[str]]:
        """The sorted names of folders and of files directly in a folder, without hidden ones."""
        if self.local:
            scanned = self._request(lambda: _scan(self._root, folder))
            pairs = [(path.rpartition("/")[2], size is None) for path, size in scanned]
        else:
            infos = self._request(lambda: self.filesystem.get_file_info(fs.FileSelector(self._join(folder))))
            pairs = [(info.base_name, info.type == fs.FileType.Directory) for info in infos]
        visible = [(name, is_folder) for name, is_folder in sorted(pairs) if not is_hidden(name)]
        return [n for n, is_folder in visible if is_folder], [n for n, is_folder in visible if not is_folder]

    def size(self, file: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        if self.local:
            place = os.path.join(self._root, file)
            return os.path.getsize(place) if os.path.isfile(place) else None
        info = self._request(lambda: self.filesystem.get_file_info(self._join(file)))
        return info.size if info.type == fs.FileType.File else None

    def modified(self, files: Sequence[str]) -> list[int]:
        """When local files were last modified, in nanoseconds since 1970; -1 for one that does not exist.

        The time of a folder is that of its last modified file.
        """
        blocks = [files[start : start + BLOCK] for start in range(0, len(files), BLOCK)]
        with ThreadPoolExecutor(SCANNERS) as pool:
            times = pool.map(lambda block: [_modified(os.path.join(self._root, file)) for file in block], blocks)
            return [time for block in times for time in block]

    def read(self, file: str) -> bytes:
        """A file's content. Raises OSError if it cannot be read, Unreachable if the folder or store is gone."""
        with self.open(file) as handle:
            return self.request(file, handle.read)

    def read_many(self, files: Sequence[str]) -> list[bytes]:
        """The contents of files, in order; remote files in parallel. Raises what `read` raises."""
        if self.local or len(files) < 2:
            return [self.read(file) for file in files]
        with ThreadPoolExecutor(min(READERS, len(files))) as pool:
            return list(pool.map(self.read, files))

    def read_range(self, file: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`; fewer at its end."""
        with self.open(file) as handle:
            self.request(file, lambda: handle.seek(offset))
            return self.request(file, lambda: handle.read(size))

    def open(self, file: str) -> Any:
        """A file for random access: a Python file if local, else a pyarrow.NativeFile. Raises what `read` raises."""
        if not self.local:
            return self.request(file, lambda: self.filesystem.open_input_file(self._join(file)))

        def open_regular() -> Any:
            path = os.path.join(self._root, file)
            kind = os.stat(path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # pipes and devices never end
                raise OSError(errno.EISDIR, "not a regular file", path)
            return open(path, "rb")

        return self.request(file, open_regular)

    def open_native(self, file: str) -> Any:
        """Like `open`, but always a pyarrow.NativeFile, which Parquet reads without Python."""
        if self.local:
            return self.request(file, lambda: pa.OSFile(os.path.join(self._root, file), "rb"))
        return self.open(file)

    def place(self, file: str = "") -> str:
        """The address of a file for messages, without credentials."""
        base = redact_uri(self.path).partition("?")[0].rstrip("/") if is_uri(self.path) else self.path.rstrip("/")
        return f"{base}/{file}" if file else base

    @property
    def filesystem(self) -> Any:
        """The pyarrow.fs.FileSystem behind a URI; None for a plain path."""
        return self._located[0]

    @property
    def root(self) -> str:
        """The folder's path in `filesystem`."""
        return self._root.rstrip("/")

    @property
    def _named(self) -> str:
        return f"{self.key} = {redact_uri(self.path)!r}"

    def without_secrets(self, reason: str) -> str:
        """An error text of another library, without the credentials of the address."""
        reason = reason.replace(self.path, redact_uri(self.path))
        hidden = re.search(r"://(.*)@", self.path.partition("?")[0], re.DOTALL)
        for part in re.split("[:/@]", hidden[1]) if hidden else []:
            reason = reason.replace(part, "***") if len(part) >= MIN_SECRET else reason
        return reason

    @cached_property
    def _located(self) -> tuple[Any, str]:
        if not is_uri(self.path):
            return None, os.path.expanduser(self.path)
        try:
            return s3.connect(self.path) if self.path.startswith("s3://") else fs.FileSystem.from_uri(self.path)
        except OSError as error:
            raise self.unreachable(error) from None
        except (ValueError, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{self._named} cannot be opened: {self.without_secrets(str(error))}") from None

    @property
    def _root(self) -> str:
        return self._located[1]

    def _join(self, file: str) -> str:
        return f"{self.root}/{file}" if file else self._root

    def _local_files(self, folder: str) -> Iterator[tuple[pa.Array, pa.Array]]:
        waiting = [folder] if os.path.isdir(os.path.join(self._root, folder)) else []
        with ThreadPoolExecutor(SCANNERS) as pool:
            while waiting:
                level, waiting = waiting, []
                for entries in pool.map(lambda name: self._request(lambda: _scan(self._root, name)), level):
                    waiting += [path for path, size in entries if size is None]
                    yield self._arrays([(path, size) for path, size in entries if size is not None])

    def _remote_files(self, folder: str) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Like `_local_files`; top-level folders are listed in parallel, because each page of 1000 names is a round trip."""
        start = len(self.root) + 1

        def listed(path: str, recursive: bool = True) -> list[Any]:
            selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
            return self._request(lambda: self.filesystem.get_file_info(selector))

        def files_of(infos: list[Any]) -> tuple[pa.Array, pa.Array]:
            files = [(info.path[start:], info.size) for info in infos if info.type == fs.FileType.File]
            return self._arrays([(path, size) for path, size in files if not is_hidden(path)])

        infos = listed(self._join(folder), recursive=False)
        yield files_of(infos)
        folders = [info.path for info in infos if info.type == fs.FileType.Directory and not is_hidden(info.base_name)]
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda path: files_of(listed(path)), folders)

    def _arrays(self, files: list[tuple[str, int]]) -> tuple[pa.Array, pa.Array]:
        try:
            return pa.array([path for path, _ in files], pa.string()), pa.array([size for _, size in files], pa.int64())
        except UnicodeEncodeError as error:
            locale = sys.getfilesystemencoding()
            problem = "is not UTF-8; rename the file"
            if locale != "utf-8":
                problem = f"cannot be read in the encoding of the locale, {locale}; set PYTHONUTF8=1 if it is UTF-8"
            raise UserError(f"{self.place()}: the file name {error.object!r} {problem}") from None

    def _request(self, operation: Callable[[], T]) -> T:
        """Raises Unreachable if the store does not answer: no such bucket, no permission, no network."""
        try:
            return operation()
        except OSError as error:
            raise self.unreachable(error) from None

    def request(self, file: str, operation: Callable[[], T]) -> T:
        """Operate on one file. Raises OSError if only this file fails, Unreachable if the store does not answer."""
        try:
            return operation()
        except FileNotFoundError:
            self.check()  # the whole root may be gone, or the folder of the file
            folder = os.path.dirname(os.path.join(self._root, file)) if self.local else None
            if folder is not None and not os.path.isdir(folder):
                raise Unreachable(f"{folder} is not there any more; put it back and run the command again") from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.place(file)) from None
        except OSError as error:
            if self.local:
                raise
            raise self.unreachable(error) from None

    def unreachable(self, error: OSError) -> Unreachable:
        """The error for a store that does not answer."""
        reason = self.without_secrets(" ".join(str(error).split()))
        advice = "Check the permissions." if self.local else "Check the address, the credentials and the network."
        return Unreachable(f"{self._named} cannot be read: {reason}. {advice}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_located"}


def _modified(path: str) -> int:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return max((entry.stat().st_mtime_ns for entry in os.scandir(path) if entry.is_file()), default=-1)
    except OSError:
        return -1
    return status.st_mtime_ns


def _scan(root: str, folder: str) -> list[tuple[str, int | None]]:
    """(path relative to the root, size) of the entries of a folder without hidden ones; folders have the size None."""
    result: list[tuple[str, int | None]] = []
    top = os.path.join(root, folder)
    with os.scandir(top) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                is_folder = entry.is_dir()
                if is_folder and entry.is_symlink():  # a link to one of its own parent folders would never end
                    is_folder = not f"{os.path.realpath(top)}/".startswith(f"{os.path.realpath(entry.path)}/")
                size = None if is_folder else entry.stat().st_size
            except OSError:
                size = -1  # a dangling link; reading it rejects the sample
            result.append((join_path(folder, entry.name), size))
    return result

"""Where data lies: a folder on a local disk, or anything behind a `pyarrow.fs` URI (`s3://bucket/folder`, `gs://…`).

Files are named by their POSIX path relative to the root. Nothing is ever written here. Credentials and endpoints are
what `pyarrow.fs` takes: the usual environment variables of the cloud, and options in the URI
(`s3://bucket/folder?endpoint_override=localhost:9000&scheme=http&region=us-east-1`); the options for S3 are in `s3.py`.
A single file that is missing is an OSError; a storage that refuses to answer is Unreachable. Credentials in a URI are never
shown: messages name an address by `shown` alone.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.storage import s3

T = TypeVar("T")
READERS = 16  # threads for many small files on remote storage
SCANNERS = 8  # threads that list local folders; a network disk answers each slowly
LEAST_SECRET = 4  # letters; shorter parts of credentials cannot be told from other text
SECRET_OPTION = re.compile(r"([?&][^=&]*(?:secret|token|passw|key|sig|credential)[^=&]*=)[^&]*", re.IGNORECASE)
OF_A_SERVICE = re.compile(r"AWS Error|google::cloud|Azure Error|curl|timed? ?out", re.IGNORECASE)


def joined(folder: str, name: str) -> str:
    """The relative path of a file or folder in a folder; "" is the root."""
    return f"{folder}/{name}" if folder else name


def inside(address: str, name: str) -> str:
    """The address of what a folder holds, of a path or a URI, whose options it keeps; ".." in `name` leads up."""
    base, question, options = address.partition("?") if is_uri(address) else (address, "", "")
    scheme, mark, path = base.rpartition("://")
    return scheme + mark + posixpath.normpath(f"{path}/{name}") + question + options


def is_uri(path: str) -> bool:
    return "://" in path


def shown(path: str) -> str:
    """A path or URI for messages: what stands before the last "@" of the address is hidden, and so are secret options."""
    base, question, query = path.partition("?")
    if "@" in query and "@" not in base and ":" in base.partition("://")[2]:  # a secret that holds a "?"
        base, question, query = path, "", ""
    return SECRET_OPTION.sub(r"\1***", re.sub(r"://.*@", "://", base, flags=re.DOTALL) + question + query)


def last_name(path: str) -> str:
    """The name of the folder at a path or URI, without options and credentials."""
    return shown(path).partition("?")[0].rstrip("/").rpartition("/")[2]


def unanswered(error: OSError) -> bool:
    """Whether an error tells of the disk or the network, not of the bytes in a file (which pyarrow gives no number)."""
    return error.errno is not None or OF_A_SERVICE.search(str(error)) is not None


@dataclass(frozen=True)
class FileInfo:
    """A file: its path relative to the root, and its size in bytes (-1 where it cannot be looked at)."""

    path: str
    size: int


class Store:
    """The folder that a configuration key names.

    Opens connections when they are first needed, so that it can be pickled. Raises Unreachable where there is no such
    folder or bucket, or where it cannot be read, and UserError for an address that cannot be.
    """

    def __init__(self, path: str, key: str = "data.path", must_exist: bool = True):
        self.path, self.key = path, key
        self.local = not is_uri(path) or path.startswith("file://")
        if must_exist:
            self.check()

    def check(self) -> None:
        """Raises Unreachable unless the folder is there and can be read."""
        if self.local:
            if not os.path.isdir(self._root):
                raise Unreachable(f"{self._named}: there is no such folder; give the data set's root folder")
            return
        kind = self._asked(lambda: self._fs.get_file_info(self._root).type)
        if kind != fs.FileType.Directory:
            raise Unreachable(f"{self._named}: there is no such folder; check bucket and prefix")

    def table(self, folder: str = "") -> tuple[pa.Array, pa.Array]:
        """Paths (string) and sizes (int64) of every file below a folder, sorted by path; hidden ones are left out."""
        found = self._local_files(folder) if self.local else self._remote_files(folder)
        parts = list(found)
        paths = pa.chunked_array([paths for paths, _ in parts], pa.string()).combine_chunks()
        sizes = pa.chunked_array([sizes for _, sizes in parts], pa.int64()).combine_chunks()
        order = pc.sort_indices(paths)
        return paths.take(order), sizes.take(order)

    def files(self, folder: str = "") -> list[FileInfo]:
        """Every file below a folder, at any depth, sorted by path; hidden ones are left out."""
        paths, sizes = self.table(folder)
        return [FileInfo(path, size) for path, size in zip(paths.to_pylist(), sizes.to_pylist(), strict=True)]

    def names(self, folder: str = "") -> tuple[list[str], list[str]]:
        """The names of the folders and of the files right below a folder, sorted; hidden ones are left out."""
        if self.local:
            scanned = self._asked(lambda: _scan(self._root, folder))
            pairs = [(path.rpartition("/")[2], size is None) for path, size in scanned]
        else:
            infos = self._asked(lambda: self._fs.get_file_info(fs.FileSelector(self._join(folder))))
            pairs = [(info.base_name, info.type == fs.FileType.Directory) for info in infos]
        shown = [(name, is_folder) for name, is_folder in sorted(pairs) if not name.startswith(".")]
        return [n for n, is_folder in shown if is_folder], [n for n, is_folder in shown if not is_folder]

    def size(self, file: str) -> int | None:
        """Bytes of a file, or None where there is no such file."""
        if self.local:
            place = os.path.join(self._root, file)
            return os.path.getsize(place) if os.path.isfile(place) else None
        info = self._asked(lambda: self._fs.get_file_info(self._join(file)))
        return info.size if info.type == fs.FileType.File else None

    def read(self, file: str) -> bytes:
        """The whole file.

        Raises OSError (FileNotFoundError among them) where that one file cannot be read, and Unreachable where the
        whole folder is gone or a remote storage refuses.
        """
        with self.open(file) as handle:
            return self.asked(file, handle.read)

    def read_many(self, files: Sequence[str]) -> list[bytes]:
        """Whole files, in order; on remote storage many at a time. Raises what `read` raises."""
        if self.local or len(files) < 2:
            return [self.read(file) for file in files]
        with ThreadPoolExecutor(min(READERS, len(files))) as pool:
            return list(pool.map(self.read, files))

    def read_range(self, file: str, offset: int, size: int) -> bytes:
        """Some bytes of a file; fewer where it ends before."""
        with self.open(file) as handle:
            self.asked(file, lambda: handle.seek(offset))
            return self.asked(file, lambda: handle.read(size))

    def open(self, file: str) -> Any:
        """A file for random access (pyarrow.NativeFile, or a Python file where the disk is local).

        Raises as `read` does.
        """
        if self.local:
            return self.asked(file, lambda: _opened(os.path.join(self._root, file)))
        return self.asked(file, lambda: self._fs.open_input_file(self._join(file)))

    def open_native(self, file: str) -> Any:
        """As `open`, but always a pyarrow.NativeFile, which Parquet reads without Python."""
        if self.local:
            return self.asked(file, lambda: pa.OSFile(os.path.join(self._root, file), "rb"))
        return self.open(file)

    def place(self, file: str = "") -> str:
        """The full name of a file, for messages; without credentials."""
        base = shown(self.path).partition("?")[0].rstrip("/") if is_uri(self.path) else self.path.rstrip("/")
        return f"{base}/{file}" if file else base

    @property
    def filesystem(self) -> Any:
        """The pyarrow.fs.FileSystem behind a URI; None for a plain path."""
        return self._fs

    @property
    def root(self) -> str:
        """The folder in it."""
        return self._root.rstrip("/")

    @property
    def _named(self) -> str:
        return f"{self.key} = {shown(self.path)!r}"

    def without_secrets(self, reason: str) -> str:
        """What another library says, without the address's credentials."""
        reason = reason.replace(self.path, shown(self.path))
        hidden = re.search(r"://(.*)@", self.path.partition("?")[0], re.DOTALL)
        for part in re.split("[:/@]", hidden[1]) if hidden else []:
            reason = reason.replace(part, "***") if len(part) >= LEAST_SECRET else reason
        return reason

    @cached_property
    def _located(self) -> tuple[Any, str]:
        if not is_uri(self.path):
            return None, os.path.expanduser(self.path)
        try:
            if self.path.startswith("s3://"):
                return s3.connect(self.path)
            return fs.FileSystem.from_uri(self.path)
        except OSError as error:
            raise self.refusal(error) from None
        except (ValueError, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{self._named} cannot be opened: {self.without_secrets(str(error))}") from None

    @property
    def _fs(self) -> Any:
        return self._located[0]

    @property
    def _root(self) -> str:
        return self._located[1]

    def _join(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}" if file else self._root

    def _local_files(self, folder: str) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Paths and sizes, folder by folder, level by level."""
        waiting = [folder] if os.path.isdir(os.path.join(self._root, folder)) else []
        with ThreadPoolExecutor(SCANNERS) as pool:
            while waiting:
                level, waiting = waiting, []
                for folders, files in pool.map(self._scanned, level):
                    waiting += folders
                    yield files

    def _scanned(self, folder: str) -> tuple[list[str], tuple[pa.Array, pa.Array]]:
        """The folders right below a folder, and the files."""
        scanned = self._asked(lambda: _scan(self._root, folder))
        files = self._arrays([(path, size) for path, size in scanned if size is not None])
        return [path for path, size in scanned if size is None], files

    def _remote_files(self, folder: str) -> Iterator[tuple[pa.Array, pa.Array]]:
        """As `_local_files`; the folders right below are listed side by side, for a page of 1000 names takes a round trip."""
        infos = self._infos(self._join(folder), recursive=False)
        yield self._files_of(infos)
        folders = [info.path for info in infos if info.type == fs.FileType.Directory and info.base_name[:1] != "."]
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda path: self._files_of(self._infos(path, recursive=True)), folders)

    def _infos(self, path: str, recursive: bool) -> list[Any]:
        selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        return self._asked(lambda: self._fs.get_file_info(selector))

    def _files_of(self, infos: list[Any]) -> tuple[pa.Array, pa.Array]:
        start = len(self._root.rstrip("/")) + 1
        files = [(info.path[start:], info.size) for info in infos if info.type == fs.FileType.File]
        return self._arrays([(path, size) for path, size in files if not path.startswith(".") and "/." not in path])

    def _arrays(self, files: list[tuple[str, int]]) -> tuple[pa.Array, pa.Array]:
        try:
            return pa.array([path for path, _ in files], pa.string()), pa.array([size for _, size in files], pa.int64())
        except UnicodeEncodeError as error:
            raise UserError(f"{self.place()}: the file name {error.object!r} is not UTF-8; rename the file") from None

    def _asked(self, question: Callable[[], T]) -> T:
        """Raises Unreachable where the storage refuses to answer: no such bucket, no permission, no network."""
        try:
            return question()
        except OSError as error:
            raise self.refusal(error) from None

    def asked(self, file: str, question: Callable[[], T]) -> T:
        """The answer to a question about one file, such as a read from what `open` gave.

        Raises OSError for what is wrong with that file alone, and Unreachable where the storage refuses to answer.
        """
        try:
            return question()
        except FileNotFoundError:
            self.check()  # all of it gone is no matter of one file, nor is the folder of the file
            folder = os.path.dirname(os.path.join(self._root, file)) if self.local else None
            if folder is not None and not os.path.isdir(folder):
                raise Unreachable(
                    f"{folder} is not there any more; put it back and give the same command again"
                ) from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.place(file)) from None
        except OSError as error:
            if self.local:
                raise
            raise self.refusal(error) from None

    def refusal(self, error: OSError) -> Unreachable:
        """What a user reads where the storage does not answer."""
        reason = self.without_secrets(" ".join(str(error).split()))
        advice = "Check the permissions." if self.local else "Check the address, the credentials and the network."
        return Unreachable(f"{self._named} cannot be read: {reason}. {advice}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_located"}


def _scan(root: str, folder: str) -> list[tuple[str, int | None]]:
    """(path relative to the root, size) of what lies in a folder, hidden things left out; folders have the size None."""
    found: list[tuple[str, int | None]] = []
    prefix = f"{folder}/" if folder else ""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "lost+found":
                continue
            try:
                is_folder = entry.is_dir() and not _loops(entry)
                size = None if is_folder else entry.stat().st_size
            except OSError:
                size = -1  # a dangling link; reading it rejects the sample
            found.append((prefix + entry.name, size))
    return found


def _opened(path: str) -> Any:
    """Pipes and devices never end, so they are not opened."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(errno.EISDIR, "not a regular file", path)
    return open(path, "rb")


def _loops(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder that it lies in."""
    if not entry.is_symlink():
        return False
    return f"{os.path.realpath(os.path.dirname(entry.path))}/".startswith(f"{os.path.realpath(entry.path)}/")

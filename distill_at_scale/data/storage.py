"""Where data lies: a folder on a local disk, or anything behind a `pyarrow.fs` URI (`s3://bucket/folder`, `gs://…`).

Files are named by their POSIX path relative to the root. Nothing is ever written here. Credentials and endpoints are
what `pyarrow.fs` takes: the usual environment variables of the cloud, and options in the URI
(`s3://bucket/folder?endpoint_override=localhost:9000&scheme=http&region=us-east-1`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from distill_at_scale.errors import UserError


def is_uri(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class Entry:
    """A file: its path relative to the root, and its size in bytes (-1 where it cannot be looked at)."""

    path: str
    size: int


class Store:
    """The folder that a configuration key names.

    Opens connections when they are first needed, so that it can be pickled. Raises UserError where there is no such folder
    or bucket, or where it cannot be read.
    """

    def __init__(self, path: str, key: str = "data.path"):
        self.path, self.key = path, key
        self.local = not is_uri(path)
        self.check()

    def check(self) -> None:
        """Raises UserError unless the folder is there and can be read."""
        if self.local:
            if not os.path.isdir(self._root):
                raise UserError(f"{self.key} = {self.path!r}: there is no such folder; give the data set's root folder")
            return
        kind = self._asked(lambda: self._fs.get_file_info(self._root).type)
        if kind != fs.FileType.Directory:
            raise UserError(f"{self.key} = {self.path!r}: there is no such folder; check bucket and prefix")

    def files(self, folder: str = "") -> list[Entry]:
        """Every file below a folder, at any depth, sorted by path; hidden ones are left out."""
        if self.local:
            found = _walk(os.path.join(self._root, folder))
            below = [Entry(os.path.relpath(name, self._root), size) for name, size in found]
            return sorted(below, key=lambda entry: entry.path)
        selector = fs.FileSelector(self._join(folder), recursive=True, allow_not_found=True)
        infos = self._asked(lambda: self._fs.get_file_info(selector))
        entries = [Entry(self._relative(i.path), i.size) for i in infos if i.type == fs.FileType.File]
        hidden = (any(part.startswith(".") for part in entry.path.split("/")) for entry in entries)
        return sorted((e for e, h in zip(entries, hidden, strict=True) if not h), key=lambda entry: entry.path)

    def names(self, folder: str = "") -> tuple[list[str], list[str]]:
        """The names of the folders and of the files right below a folder, sorted; hidden ones are left out."""
        if self.local:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                pairs = [(entry.name, entry.is_dir()) for entry in entries]
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

        Raises OSError (FileNotFoundError among them) where that one file cannot be read.
        """
        if self.local:
            return Path(self._root, file).read_bytes()
        with self.open(file) as handle:
            return handle.read()

    def read_range(self, file: str, offset: int, size: int) -> bytes:
        """Some bytes of a file; fewer where it ends before."""
        with self.open(file) as handle:
            handle.seek(offset)
            return handle.read(size)

    def open(self, file: str) -> Any:
        """A file for random access (pyarrow.NativeFile, or a Python file where the disk is local)."""
        return open(os.path.join(self._root, file), "rb") if self.local else self._fs.open_input_file(self._join(file))

    def place(self, file: str = "") -> str:
        """The full name of a file, for messages."""
        base = self.path.partition("?")[0].rstrip("/")
        return f"{base}/{file}" if file else base

    @cached_property
    def _located(self) -> tuple[Any, str]:
        if self.local:
            return None, os.path.expanduser(self.path)
        try:
            return fs.FileSystem.from_uri(self.path)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(f"{self.key} = {self.path!r} cannot be opened: {error}") from None

    @property
    def _fs(self) -> Any:
        return self._located[0]

    @property
    def _root(self) -> str:
        return self._located[1]

    def _join(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}" if file else self._root

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._root.rstrip("/") + "/")

    def _asked(self, question: Any) -> Any:
        """Raises UserError where the storage refuses to answer: no such bucket, no permission, no network."""
        try:
            return question()
        except OSError as error:
            raise UserError(
                f"{self.key} = {self.path!r} cannot be read: {error}. Check the address, the credentials and the network."
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_located"}


def _walk(folder: str) -> Sequence[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    waiting = [folder] if os.path.isdir(folder) else []
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    try:
                        found.append((entry.path, entry.stat().st_size))
                    except OSError:
                        found.append((entry.path, -1))  # a dangling link; reading it rejects the sample
    return found

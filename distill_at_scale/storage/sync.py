"""Synchronises a local copy with a folder in an object store; only differences are transferred.

Like rsync, two files are equal if size and time are: a fetched or stored file gets the store's time. Hidden files are
unfinished and stay local (except those in `.work`), and so do links. The runs inside a sweep's folder have copies of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from distill_at_scale.core.atomic_files import file_digest
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import child_address, redact_uri
from distill_at_scale.storage.object_store import ObjectStore, Say

AT_ONCE = 8  # parallel transfers
MAPPED = 64 * 2**20  # bytes; larger files are memory-mapped for the upload; they are never changed in place
FOLLOW = 5.0  # seconds between two transfers in the background
RETRY_SECONDS = 30.0  # without a configuration
UNFINISHED = ".work"
AUTO, POINTS, SHARED = RUNS_INSIDE = ("auto", "points", "shared")  # folders of runs that have copies of their own


def scratch_of(uri: str, scratch: str | None = None) -> Path:
    """The path of a folder's local copy: one per address, and by default per user."""
    base = Path(scratch).expanduser() if scratch else Path(tempfile.gettempdir()) / f"distill_at_scale-{os.getuid()}"
    return base.resolve() / hashlib.sha256(redact_uri(child_address(uri, ".")).encode()).hexdigest()[:16]


def fetched(uri: str, name: str) -> Path:
    """A read-only copy of a URI's content; only of its folder `name` if there is one."""
    sync = FolderSync(uri, scratch_of(uri).with_suffix(".read"), RETRY_SECONDS)
    sync.create()
    sync.mirror(*([name] if sync.exists(name) else []))
    return sync.local


class FolderSync:
    """The local copy `local` of the folder `uri`."""

    def __init__(self, uri: str, local: Path, retry_seconds: float, say: Say = lambda text: None):
        self.store, self.local = ObjectStore(uri, retry_seconds, say), local
        self._known: dict[str, tuple[int, int]] = {}  # files that are equal in both places: size, time in ns
        self._guard = threading.RLock()
        self._push = threading.Lock()

    def create(self) -> None:
        """Create the local folder, readable by its user only. Raises UserError if it belongs to another user."""
        self.local.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.local.parent.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{self.local.parent} belongs to another user; set run.scratch to a folder of your own")
        self.local.chmod(0o700)

    def exists(self, name: str) -> bool:
        """Whether the store has a file or folder of this name."""
        return bool(self._listed((name,)))

    def pull(
        self, *names: str, outputs: Mapping[str, Mapping[str, Any]] | None = None, skip: bool = False
    ) -> Mapping[str, Any]:
        """Fetch files and folders (default: everything) that differ; returns the store's files: name ->
        pyarrow.fs.FileInfo. Local files that changed since the last transfer stay, and so do files that the store does
        not have. Raises UserError if a file differs from `outputs` (name -> bytes, sha256); with
        `skip` such a file is left out instead, so that it is missing here.
        """
        infos = self._listed(names)
        stale = [name for name, info in infos.items() if not self._is_equal(name, info) and not self._changed(name)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name in pool.map(lambda name: self._fetch(name, infos[name]), stale):
                expected = (outputs or {}).get(name)
                if expected and file_digest(self.local / name)["sha256"] != expected["sha256"]:
                    if not skip:
                        raise UserError(f"{self.store.place(name)} is not what was written")
                    self.store.say(f"{self.store.place(name)} is not what was written; it is not used")
                    (self.local / name).unlink()
        return infos

    def mirror(self, *names: str) -> None:
        """Like `pull`, and remove local files that the store does not have."""
        stored = self.pull(*names)
        for name in self._local_files(names):
            if name not in stored and not self._changed(name):
                (self.local / name).unlink(missing_ok=True)
                self._known.pop(name, None)

    def push(self, *names: str, gone: bool = False) -> None:
        """Store local files and folders (default: everything) that changed since the last transfer. With `gone`, files
        that were equal in both places and no longer exist here are deleted in the store.
        """
        with self._push:  # a file that another thread is storing is not stored twice
            files = self._local_files(names)
            changed = sorted((stat.st_mtime_ns, name) for name, stat in files.items() if self._differs(name, stat))
            groups: dict[Path, list[str]] = {}
            for _, name in changed:  # files that differ in their suffix only are stored in the order of their times
                groups.setdefault(Path(name).with_suffix(""), []).append(name)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._store, groups.values()))
            if gone:
                existing, tops = self._local_files(names), tuple(f"{name}/" for name in names) or ("",)
                lost = [name for name in list(self._known) if name not in existing and f"{name}/".startswith(tops)]
                highest = set()  # folders that no longer exist, else files
                for name in lost:
                    above = [parent.as_posix() for parent in reversed(Path(name).parents[:-1])]
                    highest.add(next((folder for folder in above if not (self.local / folder).exists()), name))
                for name in highest:
                    self.store.delete(name)
                for name in lost:
                    self._known.pop(name, None)

    def remove(self, name: str) -> None:
        """Delete a folder in both places."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        self.store.delete(name)

    def clear(self) -> None:
        """Empty the local copy, except for hidden files such as its lock."""
        for path in self.local.glob("*"):
            if path.name == UNFINISHED or not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._known.clear()

    @contextlib.contextmanager
    def pushing(self, *names: str) -> Iterator[None]:
        """Push from a background thread inside the block, and once more at its end. A failing store does not stop the
        block; at its end it raises Unreachable. After an error in the block one last push is tried without retries.
        """
        with repeated(partial(self.push, *names)):
            try:
                yield
            except BaseException:
                self.store.closing.set()
                with contextlib.suppress(UserError, OSError):
                    self.push(*names)
                raise
        self.push(*names, gone=True)

    def _listed(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The store's files: name -> pyarrow.fs.FileInfo."""
        return {name: info for name, info in self.store.listed(*names).items() if _visible(name)}

    def _local_files(self, names: tuple[str, ...]) -> dict[str, os.stat_result]:
        tops = [self.local / name for name in names or ("",)]
        inside = [Path(folder) / name for top in tops for folder, _, files in os.walk(top) for name in files]
        result = {}
        for path in [*tops, *inside]:
            name = path.relative_to(self.local).as_posix()
            with contextlib.suppress(FileNotFoundError):  # replaced or removed in the meantime
                if _visible(name) and path.is_file() and not path.is_symlink():
                    result[name] = path.stat()
        return result

    def _is_equal(self, name: str, info: Any) -> bool:
        """Whether a file is equal in both places; remembers it."""
        with contextlib.suppress(FileNotFoundError), self._guard:
            stat = (self.local / name).stat()
            if stat.st_size == info.size and stat.st_mtime_ns // 10**9 == info.mtime_ns // 10**9:
                self._known[name] = stat.st_size, stat.st_mtime_ns
                return True
        return False

    def _differs(self, name: str, stat: os.stat_result) -> bool:
        return self._known.get(name) != (stat.st_size, stat.st_mtime_ns)

    def _changed(self, name: str) -> bool:
        """Whether a file was equal in both places and was then changed or removed here."""
        try:
            return name in self._known and self._differs(name, (self.local / name).stat())
        except FileNotFoundError:
            return True

    def _fetch(self, name: str, info: Any) -> str:
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.store.fetch(name, temporary)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
            with self._guard:
                if not self._changed(name):
                    stat = temporary.stat()
                    os.replace(temporary, target)
                    self._known[name] = stat.st_size, stat.st_mtime_ns
        except FileNotFoundError:  # removed from the store since it was listed
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return name

    def _store(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError), open(self.local / name, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                mapped = size > MAPPED
                content = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) if mapped else handle.read()
                time = self.store.write(name, content)
                with self._guard:
                    os.utime(handle.fileno(), ns=(time, time))  # of the stored file, even if it was replaced
                    self._known[name] = len(content), os.fstat(handle.fileno()).st_mtime_ns


@contextlib.contextmanager
def repeated(action: Callable[[], object]) -> Iterator[None]:
    """Run an action every FOLLOW seconds in a thread; its errors are ignored, because callers run it once more at the end."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(FOLLOW):
            with contextlib.suppress(UserError, OSError):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _visible(name: str) -> bool:
    parts = name.split("/")
    if len(parts) > 1 and parts[0] in RUNS_INSIDE:
        return False
    return not any(part.startswith(".") for part in (parts[1:] if parts[0] == UNFINISHED else parts))

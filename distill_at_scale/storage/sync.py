"""The working copy, on a disk of this machine, of a folder on object storage.

As rsync does, a file counts as the same where size and time are: what was fetched or stored carries the storage's time.
Hidden files are half-written and stay here, but for those in `.work`, and so do links. The runs of a sweep, in its folder,
have copies of their own. Left out: how single files travel (`storage/object_store.py`), who may
work in the folder (`storage/lock.py`), and what of it is finished (`storage/working_copy.py`).
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

from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import inside, shown
from distill_at_scale.storage.object_store import ObjectStore, Say

AT_ONCE = 8  # transfers side by side
MAPPED = 64 * 2**20  # bytes; larger files are stored from the page cache, and are never changed in place
FOLLOW = 5.0  # seconds between two looks at what was published here
PATIENCE = 30.0  # seconds, where no configuration says how long
UNFINISHED = ".work"
AUTO, POINTS, SHARED = RUNS_INSIDE = ("auto", "points", "shared")  # runs in there have copies of their own


def scratch_of(uri: str, scratch: str | None = None) -> Path:
    """Where the working copy of a folder lies: one for each address, and by default for each user."""
    base = Path(scratch).expanduser() if scratch else Path(tempfile.gettempdir()) / f"distill_at_scale-{os.getuid()}"
    return base.resolve() / hashlib.sha256(shown(inside(uri, ".")).encode()).hexdigest()[:16]


def fetched(uri: str, name: str) -> Path:
    """A copy, to be read, of what a URI holds: of its folder `name`, where it has such a one."""
    mirror = FolderSync(uri, scratch_of(uri).with_suffix(".read"), PATIENCE)
    mirror.make()
    mirror.renew(*([name] if mirror.holds(name) else []))
    return mirror.local


class FolderSync:
    """The working copy `local` of the folder `uri`; `patience` and `say` are those of `ObjectStore`."""

    def __init__(self, uri: str, local: Path, patience: float, say: Say = lambda text: None):
        self.bucket, self.local = ObjectStore(uri, patience, say), local
        self._known: dict[str, tuple[int, int]] = {}  # files that are the same here and there: size, time in ns
        self._guard = threading.RLock()

    def make(self) -> None:
        """The folder of the working copy, which nobody else can look into.

        Raises UserError where it belongs to somebody else, and OSError.
        """
        self.local.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.local.parent.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{self.local.parent} belongs to another user; set run.scratch to a folder of your own")
        self.local.chmod(0o700)

    def holds(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        return bool(self._listed((name,)))

    def pull(self, *names: str, outputs: Mapping[str, Mapping[str, Any]] | None = None) -> Mapping[str, Any]:
        """Make files and folders (default: everything) here what they are there; only what differs is fetched.

        What was changed here since it was last stored or fetched is left alone, and so is what is not there. Raises UserError
        where a file is not what `outputs` (name -> bytes, sha256) says. Returns what is there, by name.
        """
        found = self._listed(names)
        stale = [name for name, info in found.items() if not self._same(name, info) and not self._changed(name)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name in pool.map(lambda name: self._fetch(name, found[name]), stale):
                expected = (outputs or {}).get(name)
                if expected and _sha256(self.local / name) != expected["sha256"]:
                    raise UserError(
                        f"{self.bucket.place(name)} is not what was written; remove the record of its stage in stages/"
                    )
        return found

    def renew(self, *names: str) -> None:
        """As `pull`, and what is not there is removed here too."""
        there = self.pull(*names)
        for name in self._here(names):
            if name not in there and not self._changed(name):
                (self.local / name).unlink(missing_ok=True)
                self._known.pop(name, None)

    def push(self, *names: str, gone: bool = False) -> None:
        """Store the files and folders (default: everything) that were published here since the last time, some at a time.

        With `gone`, files that were the same here and there and are here no more are removed there.
        """
        waiting = sorted(
            (stat.st_mtime_ns, name) for name, stat in self._here(names).items() if self._differs(name, stat)
        )
        together: dict[Path, list[str]] = {}
        for _, name in waiting:  # of files with one name, the one that was here first is stored first
            together.setdefault(Path(name).with_suffix(""), []).append(name)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._store_all, together.values()))
        if gone:
            here = self._here(names)
            lost = [name for name in list(self._known) if name not in here and _below(name, names)]
            for name in {self._highest_gone(name) for name in lost}:
                self.bucket.delete(name)
            for name in lost:
                self._known.pop(name, None)

    def remove(self, name: str) -> None:
        """A folder and what is in it, here and there."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        self.bucket.delete(name)

    def empty(self) -> None:
        """Make the working copy anew, but for hidden files, such as the one that locks it."""
        for path in self.local.glob("*"):
            if path.name == UNFINISHED or not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._known.clear()

    @contextlib.contextmanager
    def following(self, *names: str) -> Iterator[None]:
        """Meanwhile what is published here is stored, from a thread; what is left is stored at the end.

        A storage that refuses meanwhile is waited for, however long; at the end Unreachable is raised. After another error
        what can be stored at once is.
        """
        with repeated(partial(self.push, *names)):
            try:
                yield
            except BaseException:
                self.bucket.hurry.set()
                with contextlib.suppress(UserError, OSError):
                    self.push(*names)
                raise
        self.push(*names, gone=True)

    def _highest_gone(self, name: str) -> str:
        """A file that is here no more, or the highest folder above it that is not."""
        above = [parent.as_posix() for parent in reversed(Path(name).parents[:-1])]
        return next((folder for folder in above if not (self.local / folder).exists()), name)

    def _listed(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What is there, by name: pyarrow.fs.FileInfo."""
        return {name: info for name, info in self.bucket.listed(*names).items() if _visible(name)}

    def _here(self, names: tuple[str, ...]) -> dict[str, os.stat_result]:
        """What is published here, by name."""
        found = {}
        for path in (path for top in names or ("",) for path in _files(self.local / top)):
            name = path.relative_to(self.local).as_posix()
            with contextlib.suppress(FileNotFoundError):  # published or removed meanwhile
                if _visible(name) and path.is_file() and not path.is_symlink():
                    found[name] = path.stat()
        return found

    def _same(self, name: str, info: Any) -> bool:
        """Whether a file is here as it is there; it is remembered."""
        with contextlib.suppress(FileNotFoundError), self._guard:
            stat = (self.local / name).stat()
            if stat.st_size == info.size and stat.st_mtime_ns // 10**9 == info.mtime_ns // 10**9:
                self._known[name] = stat.st_size, stat.st_mtime_ns
                return True
        return False

    def _differs(self, name: str, stat: os.stat_result) -> bool:
        return self._known.get(name) != (stat.st_size, stat.st_mtime_ns)

    def _changed(self, name: str) -> bool:
        """Whether a file was the same here and there, and then was changed or removed here."""
        try:
            return name in self._known and self._differs(name, (self.local / name).stat())
        except FileNotFoundError:
            return True

    def _fetch(self, name: str, info: Any) -> str:
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")

        try:
            self.bucket.fetch(name, temporary)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
            with self._guard:
                if not self._changed(name):
                    stat = temporary.stat()
                    os.replace(temporary, target)
                    self._known[name] = stat.st_size, stat.st_mtime_ns
        except FileNotFoundError:  # removed there since it was listed
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return name

    def _store_all(self, names: list[str]) -> None:
        for name in names:
            self._store(name)

    def _store(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.local / name, "rb") as handle:
            content = _content(handle)
            time = self.bucket.write(name, content)
            with self._guard:
                os.utime(handle.fileno(), ns=(time, time))  # of what was stored, should it be replaced by now
                self._known[name] = len(content), os.fstat(handle.fileno()).st_mtime_ns


@contextlib.contextmanager
def repeated(action: Callable[[], object]) -> Iterator[None]:
    """Meanwhile, an action every FOLLOW seconds in a thread; where it fails, the next one comes later: what the caller needs
    is stored or fetched once more at the end, which raises."""
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


def _files(top: Path) -> Iterator[Path]:
    """A file, or all in a folder; a folder that is removed meanwhile has none."""
    if top.is_file():
        yield top
    for folder, _, names in os.walk(top):
        yield from (Path(folder) / name for name in names)


def _content(handle: Any) -> bytes | mmap.mmap:
    size = os.fstat(handle.fileno()).st_size
    return mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) if size > MAPPED else handle.read()


def _visible(name: str) -> bool:
    parts = name.split("/")
    if len(parts) > 1 and parts[0] in RUNS_INSIDE:
        return False
    return not any(part.startswith(".") for part in (parts[1:] if parts[0] == UNFINISHED else parts))


def _below(name: str, tops: tuple[str, ...]) -> bool:
    return not tops or any(name == top or name.startswith(f"{top}/") for top in tops)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

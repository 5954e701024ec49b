"""A folder on object storage (`s3://…`, `gs://…`), and the working copy of it on a disk of this machine.

As rsync does, a file counts as the same where size and time are: what was fetched or stored carries the storage's time.
Storing relies on no rename: a file is one object, which the storage shows whole or not at all. Names are POSIX paths below
the folder; hidden ones are half-written and stay here, but for those in `.work`. Left out: who may work in the folder
(`lease.py`), and what of it is finished (`rundir.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from distill_at_scale.data.storage import Store, is_uri, shown
from distill_at_scale.errors import Unreachable, UserError

T = TypeVar("T")
AT_ONCE = 8  # transfers side by side
BLOCK = 8 * 2**20  # bytes, of a file that is fetched
MAPPED = 64 * 2**20  # bytes; larger files are stored from the page cache, and are never changed in place
FOLLOW = 5.0  # seconds between two looks at what was published here
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds before a refused request is made again; doubled each time
PATIENCE = 30.0  # seconds, where no configuration says how long
UNFINISHED = ".work"
REFUSED_FOR_GOOD = re.compile(
    r"ACCESS_DENIED|AccessDenied|NO_SUCH_BUCKET|NoSuchBucket|INVALID_ACCESS_KEY|InvalidAccessKey|"
    r"SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|PERMISSION_DENIED|UNAUTHENTICATED"
)

Say = Callable[[str], None]


def is_remote(path: str | Path) -> bool:
    """Whether a folder is on object storage."""
    return is_uri(str(path)) and not str(path).startswith("file://")


def scratch_of(uri: str, scratch: str | None = None) -> Path:
    """Where the working copy of a folder lies: one for each address, and by default for each user."""
    base = Path(scratch).expanduser() if scratch else Path(tempfile.gettempdir()) / f"distill_at_scale-{os.getuid()}"
    return base.resolve() / hashlib.sha256(shown(uri).encode()).hexdigest()[:16]


def fetched(uri: str, name: str) -> Path:
    """A copy, to be read, of what a URI holds: of its folder `name`, where it has such a one."""
    mirror = Mirror(uri, scratch_of(uri).with_suffix(".read"), PATIENCE)
    mirror.make()
    mirror.renew(*([name] if mirror.holds(name) else []))
    return mirror.local


class Mirror:
    """The working copy `local` of the folder `uri`.

    What the storage refuses is tried again for `patience` seconds, and then is Unreachable, which says what it was.
    """

    def __init__(self, uri: str, local: Path, patience: float, say: Say = lambda text: None):
        self.uri, self.local, self.patience, self.say = uri, local, patience, say
        self._known: dict[str, tuple[int, int]] = {}  # files that are the same here and there: size, time in ns
        self._guard = threading.RLock()
        self._hurry = threading.Event()  # the command ends: nothing is waited for any more

    @cached_property
    def store(self) -> Store:
        return Store(self.uri, "run.dir", must_exist=False)

    def make(self) -> None:
        """The folder of the working copy, which nobody else can look into.

        Raises UserError where it belongs to somebody else, and OSError.
        """
        self.local.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.local.parent.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{self.local.parent} belongs to another user; set run.scratch to a folder of your own")
        self.local.chmod(0o700)

    def place(self, name: str = "") -> str:
        """A file's address, for messages."""
        return self.store.place(name)

    def read(self, name: str) -> bytes | None:
        """A small file, straight from the storage; None where there is none."""

        def content() -> bytes:
            with self.store.filesystem.open_input_stream(self._path(name)) as stream:
                return stream.read()

        try:
            return self._tried(f"reading {name}", content)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """A small file, straight to the storage."""
        self._tried(f"storing {name}", lambda: put(self.store.filesystem, self._path(name), content))

    def delete(self, name: str) -> None:
        """A file, straight from the storage; that there is none is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(f"removing {name}", partial(self.store.filesystem.delete_file, self._path(name)))

    def holds(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        return bool(self._listed((name,)))

    def pull(self, *names: str, outputs: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Make files and folders (default: everything) here what they are there; only what differs is fetched.

        What was changed here since it was last stored or fetched is left alone, and so is what is not there. Raises UserError
        where a file is not what `outputs` (name -> bytes, sha256) says.
        """
        found = self._listed(names)
        stale = [name for name, info in found.items() if not self._same(name, info) and not self._changed(name)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name in pool.map(lambda name: self._fetch(name, found[name]), stale):
                expected = (outputs or {}).get(name)
                if expected and _sha256(self.local / name) != expected["sha256"]:
                    raise UserError(
                        f"{self.place(name)} is not what was written; remove the record of its stage in stages/"
                    )

    def renew(self, *names: str) -> None:
        """As `pull`, and what is not there is removed here too."""
        self.pull(*names)
        there = self._listed(names)
        for name in self._here(names):
            if name not in there and not self._changed(name):
                (self.local / name).unlink(missing_ok=True)
                self._known.pop(name, None)

    def push(self, *names: str, gone: bool = False) -> None:
        """Store the files and folders (default: everything) that were published here since the last time, oldest first.

        With `gone`, files that were the same here and there and are here no more are removed there.
        """
        waiting = sorted(
            (stat.st_mtime_ns, name) for name, stat in self._here(names).items() if self._differs(name, stat)
        )
        together: dict[
            Path, list[str]
        ] = {}  # a file that another of its name goes with is stored first, if it was here first
        for _, name in waiting:
            together.setdefault(Path(name).with_suffix(""), []).append(name)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._store_all, together.values()))
        if gone:
            here = self._here(names)
            lost = [name for name in list(self._known) if name not in here and _below(name, names)]
            for name in {self._highest_gone(name) for name in lost}:
                self._remove_there(name)
            for name in lost:
                self._known.pop(name, None)

    def remove(self, name: str) -> None:
        """A folder and what is in it, here and there."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        if self.holds(name):
            self._remove_there(name)

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
                self._hurry.set()
                with contextlib.suppress(UserError, OSError):
                    self.push(*names)
                raise
        self.push(*names, gone=True)

    def _highest_gone(self, name: str) -> str:
        """A file that is here no more, or the highest folder above it that is not."""
        above = [parent.as_posix() for parent in reversed(Path(name).parents[:-1])]
        return next((folder for folder in above if not (self.local / folder).exists()), name)

    def _remove_there(self, name: str) -> None:
        system = self.store.filesystem
        kind = self._tried("looking", partial(system.get_file_info, self._path(name))).type
        if kind == fs.FileType.Directory:
            with contextlib.suppress(FileNotFoundError):
                self._tried(f"removing {name}", partial(system.delete_dir, self._path(name)))
        elif kind == fs.FileType.File:
            self.delete(name)

    def _path(self, name: str) -> str:
        return f"{self.store.root}/{name}" if name else self.store.root

    def _listed(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What is there, by name: pyarrow.fs.FileInfo."""
        found: dict[str, Any] = {}
        for name in names or ("",):
            found |= {n: info for n, info in self._tried("listing", partial(self._infos, name)) if _visible(n)}
        return found

    def _infos(self, name: str) -> list[tuple[str, Any]]:
        system, start = self.store.filesystem, len(self.store.root) + 1
        info = system.get_file_info(self._path(name))
        if info.type == fs.FileType.File:
            return [(name, info)]
        infos = system.get_file_info(fs.FileSelector(self._path(name), recursive=True, allow_not_found=True))
        return [(info.path[start:], info) for info in infos if info.type == fs.FileType.File]

    def _here(self, names: tuple[str, ...]) -> dict[str, os.stat_result]:
        """What is published here, by name."""
        found = {}
        for top in names or ("",):
            for path in [self.local / top] if (self.local / top).is_file() else (self.local / top).rglob("*"):
                name = path.relative_to(self.local).as_posix()
                with contextlib.suppress(FileNotFoundError):  # published or removed meanwhile
                    if _visible(name) and path.is_file():
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

        def copy() -> None:
            with self.store.filesystem.open_input_stream(self._path(name)) as stream, open(temporary, "wb") as out:
                while block := stream.read(BLOCK):
                    out.write(block)

        try:
            self._tried(f"fetching {name}", copy)
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
            self._tried(f"storing {name}", lambda: put(self.store.filesystem, self._path(name), content))
            info = self._tried(f"storing {name}", lambda: self.store.filesystem.get_file_info(self._path(name)))
            with self._guard:
                os.utime(
                    handle.fileno(), ns=(info.mtime_ns, info.mtime_ns)
                )  # of what was stored, if it was replaced since
                self._known[name] = len(content), os.fstat(handle.fileno()).st_mtime_ns

    def _tried(self, what: str, request: Callable[[], T]) -> T:
        """A request that is made again while the storage refuses it for a while.

        Raises FileNotFoundError where there is no such file, and Unreachable.
        """
        until, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise
            except OSError as error:
                reason = self.store.without_secrets(" ".join(str(error).split()))
                left = until - time.monotonic()
                if left <= 0 or self._hurry.is_set() or REFUSED_FOR_GOOD.search(reason):
                    raise Unreachable(self._refusal(what, reason)) from None
            self.say(f"  {self.place()} refuses {what} ({reason}); it is tried again for {left:.0f} s more")
            self._hurry.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _refusal(self, what: str, reason: str) -> str:
        return (
            f"run.dir = {shown(self.uri)!r}: {what} failed: {reason}. Check the address, the credentials and the network, and "
            "give the same command again; what is stored is kept (run.retry_seconds says how long a refusal is waited for)"
        )


@contextlib.contextmanager
def repeated(action: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, an action every FOLLOW seconds in a thread; where the storage refuses, the next one comes later."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(FOLLOW):
            with contextlib.suppress(Unreachable, OSError):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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


def _content(handle: Any) -> bytes | mmap.mmap:
    size = os.fstat(handle.fileno()).st_size
    return mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) if size > MAPPED else handle.read()


def _visible(name: str) -> bool:
    parts = name.split("/")
    return not any(part.startswith(".") for part in (parts[1:] if parts[0] == UNFINISHED else parts))


def _below(name: str, tops: tuple[str, ...]) -> bool:
    return not tops or any(name == top or name.startswith(f"{top}/") for top in tops)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

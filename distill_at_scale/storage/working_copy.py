"""The working copy of a run folder on object storage: brought up to date, held by one command, followed, and sealed.

Two rules keep it honest: what the storage holds is right where the two differ, and a stage's record is stored after all
that it names. What was computed here and never stored stays, and is stored with the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.storage.filesystem import inside, shown
from distill_at_scale.storage.lock import StorageLock
from distill_at_scale.storage.stage_record import LINKED, checked, is_artefact
from distill_at_scale.storage.sync import POINTS, SHARED, UNFINISHED, FolderSync, repeated, scratch_of

DIGEST = re.compile("[0-9a-f]{32}")
IDENTITY = ".run"  # which folder of this address it is a copy of: another one may have stood there before
LOCK = ".lock"
NOTES = ("stopped.json", "failed.json")  # of a point: there or not, as whoever worked in it last has left it


class WorkingCopy:
    """A mirror that knows of stages, and of who works in it."""

    def __init__(self, mirror: FolderSync):
        self.mirror, self.lease = mirror, StorageLock(mirror.bucket)

    @property
    def path(self) -> Path:
        return self.mirror.local

    @property
    def named(self) -> str:
        """The folder's address without options and secrets."""
        return shown(self.mirror.bucket.uri).partition("?")[0]

    @contextlib.contextmanager
    def held(self, lock: TextIO) -> Iterator[None]:
        """By this command, which has locked the copy by the open file `lock`, and by no other on any machine.

        Raises Busy where another command works in the folder, and Unreachable at the end where something could not be
        stored.
        """
        bucket = self.mirror.bucket
        bucket.hurry.clear()
        bucket.barred.clear()
        self.lease = StorageLock(bucket)
        lock.truncate(0)
        lock.write(self.lease.token)
        lock.flush()
        try:
            self.lease.take()
            self._update(self._identity(), alone=True)
            with self.mirror.following():
                yield
        finally:
            bucket.hurry.set()
            self.lease.release()

    def fetch(self, names: Sequence[str] = (), begin: bool = False) -> None:
        """Bring the copy up to date, to be read; a command that is at work in it on this machine keeps it so by itself.

        `names`: of the output, these files alone. With `begin`, the folder is there from now on.
        """
        self.mirror.make()
        with open(self.path / LOCK, "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if found := self._identity() if begin else self._found():
                self._update(found, names)
            else:
                self.mirror.empty()

    def seal(self) -> None:
        """Store all that was published, before the record of a stage is.

        Raises Busy where another command has taken the folder over.
        """
        self.lease.check()
        self.mirror.push(gone=True)
        self.lease.check()

    def belong(self, identity: str) -> None:
        """Begin anew where this is a copy of another folder that had the same address."""
        own = self.path / IDENTITY
        if not own.exists() or own.read_text() != identity:
            self.mirror.empty()
            own.write_text(identity)

    def complete(self, stage: str) -> None:
        """Make the output of a finished stage here what its record says."""
        self.mirror.pull(f"stages/{stage}.json")
        record = _record(self.path / "stages" / f"{stage}.json")
        if LINKED in record:
            self._link(record)
        elif record:
            self.mirror.pull(*tops(record), outputs=record["outputs"])

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process of this machine at a time fetches into the copy."""
        self.mirror.make()
        with open(self.path / ".fetching", "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def beside(self, link: str) -> WorkingCopy:
        """The copy of the run that a record links to; `link` is seen from the folder that holds `points/` and `shared/`."""
        bucket = self.mirror.bucket
        uri = inside(bucket.uri, f"../../{link}")
        path = self.path.parent / scratch_of(uri).name
        return WorkingCopy(FolderSync(uri, path, bucket.patience, bucket.say))

    def way_to(self, other: WorkingCopy) -> str:
        """What `beside` takes."""
        here, there = (copy.mirror.bucket.store.root for copy in (self, other))
        return posixpath.relpath(there, posixpath.dirname(posixpath.dirname(here)))

    def _link(self, record: Mapping[str, Any]) -> None:
        """Have the output of a stage that is shared: fetched once for all runs on this machine that stand on it.

        A link that leads to what may stand on this run in turn is not followed, so that none waits for itself.
        """
        other = self.beside(record[LINKED])
        if other._order() >= self._order():
            return
        with other.alone():
            if found := other._found():
                other.belong(found)
            other.complete(record["stage"])
        link(self.path, other.path, tops(record))

    @contextlib.contextmanager
    def exchanged(self, *names: str) -> Iterator[None]:
        """Store what was published here, and meanwhile and afterwards fetch what others leave in some files and folders."""
        self.mirror.push()
        with repeated(partial(self.mirror.pull, *names)):
            yield
        self.mirror.push(*names)
        self.mirror.renew(*names)

    def marks(self) -> dict[str, str]:
        """What tells a process elsewhere whether it sees this very copy."""
        held = {"token": (self.path / LOCK).read_text(), "identity": (self.path / IDENTITY).read_text()}
        return {"root": str(self.path.resolve()), **held}

    def _order(self) -> int:
        """Runs in a folder stand on those that come before: the folder's own, ingest, scores, points."""
        kind = "/".join(self.mirror.bucket.store.root.split("/")[-2:])
        starts = (f"{SHARED}/data-", f"{SHARED}/scores-", f"{POINTS}/")
        return next((1 + number for number, start in enumerate(starts) if kind.startswith(start)), 0)

    def _identity(self) -> str:
        found = self._found()
        if found is None:
            found = uuid.uuid4().hex
            self.mirror.bucket.write(IDENTITY, found.encode())
        return found

    def _found(self) -> str | None:
        found = self.mirror.bucket.read(IDENTITY)
        return None if found is None else found.decode()

    def _update(self, identity: str, names: Sequence[str] = (), alone: bool = False) -> None:
        """Have here what is there; who only reads (not `alone`) changes nothing there."""
        self.belong(identity)
        (self.path / "stages").mkdir(exist_ok=True)
        self.mirror.renew("stages", *NOTES)
        if names:
            self.mirror.pull(*names)
            return
        outputs: dict[str, Any] = {}
        for path in sorted((self.path / "stages").glob("*.json")):
            record = _record(path)
            if LINKED in record:
                self._link(record)
            else:
                outputs |= record.get("outputs", {})
            if record and alone:  # what led to it may be left by a command that was killed in between
                self.mirror.remove(work_name(record["stage"], record["fingerprint"]))
        self.mirror.pull(outputs=outputs)


def work_name(stage: str, fingerprint: str) -> str:
    """The folder of a stage's unfinished work."""
    return f"{UNFINISHED}/{stage}-{fingerprint[:16]}"


def tops(record: Mapping[str, Any]) -> list[str]:
    """The files and folders, right in the run folder, that hold the output of a stage."""
    return sorted({Path(name).parts[0] for name in record["outputs"] if is_artefact(name)})


def link(here: Path, there: Path, names: Sequence[str]) -> None:
    """Files and folders of another run folder, as links, where there is nothing of that name."""
    for name in names:
        target = os.path.relpath((there / name).resolve(), here.resolve())
        if not (here / name).exists():
            with publish(here / name) as temporary:
                os.symlink(target, temporary)


def _record(path: Path) -> dict[str, Any]:
    """Empty where it is damaged, which whoever needs it is told of by `RunDir.record`, and where it leads elsewhere."""
    try:
        record = json.loads(path.read_text())
        ours = checked(record)["stage"] == path.stem and DIGEST.fullmatch(record["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return record if ours else {}

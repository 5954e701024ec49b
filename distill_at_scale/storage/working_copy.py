"""The local working copy of a run folder in an object store: update, lock, background upload, sealing of a stage.

Two rules: the store is right where both differ, and a stage's record is stored after everything that it names. Work that was
computed here and never stored stays and is stored with the rest.
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
from distill_at_scale.storage.filesystem import child_address, redact_uri
from distill_at_scale.storage.lock import StorageLock
from distill_at_scale.storage.stage_record import LINKED, checked, is_artefact
from distill_at_scale.storage.sync import POINTS, SHARED, UNFINISHED, FolderSync, repeated, scratch_of

DIGEST = re.compile("[0-9a-f]{32}")
IDENTITY = ".run"  # an id of the folder: another run may have had the same address before
LOCK = ".lock"
NOTES = ("stopped.json", "failed.json")  # of a point; its last command decides whether they exist


class WorkingCopy:
    """A local copy that knows the stages of a run and holds its lock."""

    def __init__(self, sync: FolderSync):
        self.sync, self.lock = sync, StorageLock(sync.store)

    @property
    def path(self) -> Path:
        return self.sync.local

    @property
    def named(self) -> str:
        """The folder's address without options and secrets."""
        return redact_uri(self.sync.store.uri).partition("?")[0]

    @contextlib.contextmanager
    def locked(self, file: TextIO) -> Iterator[None]:
        """Hold the folder against all other commands on any machine. `file` is the open, locked lock file of the copy.
        Raises Busy if another command works in the folder, and Unreachable at the end if something could not be stored.
        """
        store = self.sync.store
        store.closing.clear()
        store.fenced.clear()
        self.lock = StorageLock(store)
        file.truncate(0)
        file.write(self.lock.token)
        file.flush()
        try:
            self.lock.acquire()
            identity = self._identity(create=True)
            assert identity is not None
            self._update(identity, owner=True)
            with self.sync.pushing():
                yield
        finally:
            store.closing.set()
            self.lock.release()

    def fetch(self, names: Sequence[str] = (), begin: bool = False) -> None:
        """Update the copy for reading, unless a command on this machine works in it and keeps it up to date.

        Args:
            names: only these files of the outputs.
            begin: create the folder in the store if it does not exist.
        """
        self.sync.create()
        with open(self.path / LOCK, "a", encoding="utf-8") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if identity := self._identity(create=begin):
                self._update(identity, names)
            else:
                self.sync.clear()

    def seal(self) -> None:
        """Store everything published so far, before a stage's record. Raises Busy if another command took the lock."""
        self.lock.check()
        self.sync.push(gone=True)
        self.lock.check()

    def claim(self, identity: str) -> None:
        """Clear the copy if it belongs to another folder that had the same address."""
        own = self.path / IDENTITY
        if not own.exists() or own.read_text(encoding="utf-8") != identity:
            self.sync.clear()
            own.write_text(identity, encoding="utf-8")

    def complete(self, stage: str) -> None:
        """Fetch the output of a finished stage."""
        self.sync.pull(f"stages/{stage}.json")
        record = _record(self.path / "stages" / f"{stage}.json")
        if LINKED in record:
            self._link(record)
        elif record:
            self.sync.pull(*top_level_names(record), outputs=record["outputs"])

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process of this machine at a time fetch into the copy."""
        self.sync.create()
        with open(self.path / ".fetching", "a", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def linked_copy(self, link: str) -> WorkingCopy:
        """The copy of the run that a record links to; `link` is relative to the folder that holds `points/` and `shared/`."""
        store = self.sync.store
        uri = child_address(store.uri, f"../../{link}")
        return WorkingCopy(FolderSync(uri, self.path.parent / scratch_of(uri).name, store.retry_seconds, store.say))

    def link_to(self, other: WorkingCopy) -> str:
        """The link to another copy, for `linked_copy`."""
        here, target = (copy.sync.store.store.root for copy in (self, other))
        return posixpath.relpath(target, posixpath.dirname(posixpath.dirname(here)))

    def _link(self, record: Mapping[str, Any]) -> None:
        """Link the output of a shared stage, which this machine fetches once for all runs that use it. Only links to a
        run of lower rank are followed, so that no run waits for itself.
        """
        other = self.linked_copy(record[LINKED])
        if other._rank() >= self._rank():
            return
        with other.exclusive():
            if identity := other._identity():
                other.claim(identity)
            other.complete(record["stage"])
        link(self.path, other.path, top_level_names(record))

    @contextlib.contextmanager
    def exchanging(self, *names: str) -> Iterator[None]:
        """Push first; inside the block and at its end, fetch what workers leave in some files and folders."""
        self.sync.push()
        with repeated(partial(self.sync.pull, *names)):
            yield
        self.sync.push(*names)
        self.sync.mirror(*names)

    def marker(self) -> dict[str, str]:
        """Values by which a worker decides whether it sees this same copy."""
        token, identity = ((self.path / name).read_text(encoding="utf-8") for name in (LOCK, IDENTITY))
        return {"root": str(self.path.resolve()), "token": token, "identity": identity}

    def _rank(self) -> int:
        """Runs use only runs of lower rank: the folder's own run, ingest, scores, points."""
        kind = "/".join(self.sync.store.store.root.split("/")[-2:])
        starts = (f"{SHARED}/data-", f"{SHARED}/scores-", f"{POINTS}/")
        return next((1 + number for number, start in enumerate(starts) if kind.startswith(start)), 0)

    def _identity(self, create: bool = False) -> str | None:
        """The id of the folder in the store; None if it does not exist and is not to be created."""
        content = self.sync.store.read(IDENTITY)
        if content is None and create:
            content = uuid.uuid4().hex.encode()
            self.sync.store.write(IDENTITY, content)
        return None if content is None else content.decode()

    def _update(self, identity: str, names: Sequence[str] = (), owner: bool = False) -> None:
        """Fetch the store's state. Only the `owner` of the lock removes anything in the store."""
        self.claim(identity)
        (self.path / "stages").mkdir(exist_ok=True)
        self.sync.mirror("stages", *NOTES)
        if names:
            self.sync.pull(*names)
            return
        outputs: dict[str, Any] = {}
        for path in sorted((self.path / "stages").glob("*.json")):
            record = _record(path)
            if LINKED in record:
                self._link(record)
            else:
                outputs |= record.get("outputs", {})
            if record and owner:  # a killed command may have left the stage's unfinished work
                self.sync.remove(work_folder(record["stage"], record["fingerprint"]))
        self.sync.pull(outputs=outputs, skip=True)


def work_folder(stage: str, fingerprint: str) -> str:
    """The folder of a stage's unfinished work."""
    return f"{UNFINISHED}/{stage}-{fingerprint[:16]}"


def top_level_names(record: Mapping[str, Any]) -> list[str]:
    """The top-level files and folders with the output of a stage."""
    return sorted({Path(name).parts[0] for name in record["outputs"] if is_artefact(name)})


def link(here: Path, there: Path, names: Sequence[str]) -> None:
    """Link files and folders of another run folder that do not exist here."""
    for name in names:
        target = os.path.relpath((there / name).resolve(), here.resolve())
        if not (here / name).exists():
            with publish(here / name) as temporary:
                os.symlink(target, temporary)


def _record(path: Path) -> dict[str, Any]:
    """A stage record; empty if it is damaged (`RunDir.record` raises for that) or belongs to another stage."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ours = checked(record)["stage"] == path.stem and DIGEST.fullmatch(record["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return record if ours else {}

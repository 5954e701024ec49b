"""The run folder as the processes of a cluster see it.

On a disk that all nodes share, everybody sees it at the driver's path, and nothing here does anything. On object storage
every node has a copy of its own: a process fetches what it reads before it calls what the core does, and stores what that
publishes. On the driver's machine it sees the driver's copy, which the driver itself keeps. What the driver stores and
fetches is in `pipeline/executors/synced.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from distill_at_scale.cluster.session import unpack
from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.working_copy import LOCK, WorkingCopy


class WorkerRunDir:
    """What a worker does with the run folder; made from what the driver packed."""

    def __init__(self, packed: dict[str, Any]):
        self.config, marks = unpack(packed), packed["copy"]
        self.remote: WorkingCopy | None = None
        self.moved: tuple[Path, Path] | None = None  # from the driver's copy to the one here
        if marks:
            run = RunDir.of(self.config.run)
            self.moved = Path(marks["root"]), run.path
            if run.remote and not _holds(run.path / LOCK, marks["token"]):
                self.remote = run.remote
                with self.remote.alone():
                    self.remote.belong(marks["identity"])

    def __call__(self, path: str | Path) -> Path:
        """Where a path of the driver's is here."""
        return self.moved[1] / Path(path).relative_to(self.moved[0]) if self.moved else Path(path)

    def need(self, *stages: str) -> None:
        """Have the output of finished stages here; the processes of a node fetch it once."""
        if self.remote:
            with self.remote.alone():
                for stage in stages:
                    self.remote.complete(stage)

    def fetch(self, *paths: Path) -> None:
        """Have files and folders here as far as they are stored."""
        if self.remote:
            with self.remote.alone():
                self.remote.mirror.pull(*self._names(paths))

    def renew(self, *paths: Path) -> None:
        """As `fetch`; what is not stored is removed, for one that is to go on from what another left."""
        if self.remote:
            self.remote.mirror.renew(*self._names(paths))

    def keep(self, *paths: Path) -> None:
        """Store what was published."""
        if self.remote:
            self.remote.mirror.push(*self._names(paths))

    def keeping(self, *paths: Path) -> AbstractContextManager[None]:
        """Meanwhile, what is published there is stored."""
        return self.remote.mirror.following(*self._names(paths)) if self.remote else nullcontext()

    def _names(self, paths: tuple[Path, ...]) -> list[str]:
        assert self.remote is not None
        return [path.relative_to(self.remote.path).as_posix() for path in paths]


class Notes:
    """Short texts that the driver and its workers leave each other in a folder of unfinished work, by name."""

    def __init__(self, work: Path, config: Config | None = None):
        self.work = work
        self.remote = RunDir.of(config.run).remote if config else None  # straight to the storage: no copy is asked

    def read(self, name: str, patience: float | None = None) -> str | None:
        if self.remote:
            found = self.remote.mirror.bucket.read(self._name(name), patience)
            return None if found is None else found.decode()
        return (self.work / name).read_text() if (self.work / name).exists() else None

    def write(self, name: str, text: str) -> None:
        if self.remote:
            self.remote.mirror.bucket.write(self._name(name), text.encode())
        else:
            with publish(self.work / name) as temporary:  # nobody reads half of it
                temporary.write_text(text)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.work / name).unlink(missing_ok=True)
            if self.remote:
                self.remote.mirror.bucket.delete(self._name(name))

    def _name(self, name: str) -> str:
        assert self.remote is not None
        return (self.work / name).relative_to(self.remote.path).as_posix()


def _holds(path: Path, token: str) -> bool:
    return path.exists() and path.read_text() == token

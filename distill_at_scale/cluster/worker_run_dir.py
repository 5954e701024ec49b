"""The run folder as a worker of the cluster sees it.

On a shared disk every process uses the driver's path, and the methods here do nothing. With an object store each node has a
copy: a process fetches what it reads and uploads what it publishes. On the driver's machine workers use the driver's copy,
which the driver synchronises (`pipeline/executors/synced.py`).
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
    """A worker's access to the run folder, from the values that the driver packed."""

    def __init__(self, packed: dict[str, Any]):
        self.config, marker = unpack(packed), packed["copy"]
        self.remote: WorkingCopy | None = None
        self.moved: tuple[Path, Path] | None = None  # the driver's copy and the copy on this node
        if marker:
            run = RunDir.of(self.config.run)
            self.moved, lock = (Path(marker["root"]), run.path), run.path / LOCK
            token = lock.read_text(encoding="utf-8") if lock.exists() else None
            if run.remote and token != marker["token"]:  # not the driver's machine
                self.remote = run.remote
                with self.remote.exclusive():
                    self.remote.claim(marker["identity"])

    def __call__(self, path: str | Path) -> Path:
        """The path on this node for a path of the driver."""
        return self.moved[1] / Path(path).relative_to(self.moved[0]) if self.moved else Path(path)

    def need(self, *stages: str) -> None:
        """Fetch the outputs of finished stages, once per node."""
        if self.remote:
            with self.remote.exclusive():
                for stage in stages:
                    self.remote.complete(stage)

    def fetch(self, *paths: Path) -> None:
        """Fetch files and folders, as far as they are stored."""
        if self.remote:
            with self.remote.exclusive():
                self.remote.sync.pull(*self._names(paths))

    def renew(self, *paths: Path) -> None:
        """Like `fetch`, and remove local files that are not stored, to resume from what another worker left."""
        if self.remote:
            self.remote.sync.mirror(*self._names(paths))

    def keep(self, *paths: Path) -> None:
        """Upload published files and folders."""
        if self.remote:
            self.remote.sync.push(*self._names(paths))

    def keeping(self, *paths: Path) -> AbstractContextManager[None]:
        """Upload published files in the background inside the block."""
        return self.remote.sync.pushing(*self._names(paths)) if self.remote else nullcontext()

    def _names(self, paths: tuple[Path, ...]) -> list[str]:
        assert self.remote is not None
        return [path.relative_to(self.remote.path).as_posix() for path in paths]


class Notes:
    """Short texts that the driver and its workers exchange in a folder of unfinished work, by name."""

    def __init__(self, work: Path, config: Config | None = None):
        self.work = work
        self.remote = RunDir.of(config.run).remote if config else None  # uses the object store directly, without a copy

    def read(self, name: str, retry_seconds: float | None = None) -> str | None:
        if self.remote:
            content = self.remote.sync.store.read(self._name(name), retry_seconds)
            return None if content is None else content.decode()
        return (self.work / name).read_text(encoding="utf-8") if (self.work / name).exists() else None

    def write(self, name: str, text: str) -> None:
        if self.remote:
            self.remote.sync.store.write(self._name(name), text.encode())
        else:
            with publish(self.work / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def remove(self, *names: str) -> None:
        for name in names:
            (self.work / name).unlink(missing_ok=True)
            if self.remote:
                self.remote.sync.store.delete(self._name(name))

    def _name(self, name: str) -> str:
        assert self.remote is not None
        return (self.work / name).relative_to(self.remote.path).as_posix()

"""A run's folder: what each stage read and wrote, by fingerprint; nothing is reused silently and nothing is deleted.

A stage is complete when `stages/<stage>.json` exists. It is written last and atomically, and holds what the stage
depended on (its configuration and the content hashes of its inputs) and what it wrote (with content hashes). Its
fingerprint is the hash of the former. Where data lies, how many workers ran and where the run folder is are never
part of it.

A folder on object storage is worked on in a copy on this machine's disk (`storage/working_copy.py`): `path` is that copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_at_scale.config.sections import RunSection
from distill_at_scale.core.atomic_files import file_digests, files_in, publish, write_json
from distill_at_scale.core.errors import Busy, UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.storage.object_store import Say, is_remote
from distill_at_scale.storage.stage_record import LINKED, StageInputs, checked, is_artefact
from distill_at_scale.storage.sync import FolderSync, scratch_of
from distill_at_scale.storage.working_copy import LOCK, WorkingCopy, link, tops, work_name

STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")


def address_of(run: RunSection) -> str:
    """Of the folder that a configuration names, from any folder."""
    return run.dir if is_remote(run.dir) else str(Path(run.dir.removeprefix("file://")).expanduser().resolve())


class RunDir:
    """Paths, locking and stage records of one run."""

    def __init__(self, path: str | Path, reuse: RunDir | str | Path | None = None, remote: WorkingCopy | None = None):
        self.path, self.remote = Path(path).expanduser(), remote
        self.reuse = RunDir(reuse) if isinstance(reuse, str | Path) else reuse

    @classmethod
    def of(cls, run: RunSection, say: Say = lambda text: None) -> RunDir:
        """The folder that a configuration names, on a disk or on object storage; `say` is told what is waited for."""
        reuse = cls.of(run.model_copy(update={"dir": run.reuse, "reuse": None}), say) if run.reuse else None
        if not is_remote(run.dir):
            return cls(run.dir.removeprefix("file://"), reuse)
        path = scratch_of(run.dir, run.scratch)
        return cls(path, reuse, WorkingCopy(FolderSync(run.dir, path, run.retry_seconds, say)))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def named(self) -> str:
        """The folder's address for messages and records."""
        return self.remote.named if self.remote else str(self.path)

    def place(self, name: str) -> str:
        """The address of a file in it."""
        return f"{self.named}/{name}"

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises UserError with the reason where it cannot, or where run.reuse names no run.
        """
        if self.reuse:
            self.reuse.fetch()
        if self.reuse and not (self.reuse / "stages").is_dir():
            raise UserError(f"run.reuse = {self.reuse.named!r} is no run folder; give the run.dir of a finished run")
        try:
            if self.remote:
                self.remote.mirror.make()
            (self.path / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{uuid.uuid4().hex[:8]}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write in the run folder {self.path}: {error.strerror}. Choose another "
                f"{'run.scratch' if self.remote else 'run.dir'}."
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a command works in the folder; a second command is refused instead of mixing with the first."""
        with open(self.path / LOCK, "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"another command is working in {self.named}; wait for it, or choose another run.dir"
                ) from None
            with self.remote.held(handle) if self.remote else contextlib.nullcontext():
                yield

    def fetch(self, *names: str) -> None:
        """Make sure that what is stored can be read here, where the folder is on object storage.

        `names`: of the output, these files alone.
        """
        if self.remote:
            self.remote.fetch(names)

    def keep(self, *names: str) -> None:
        """Store files that were published outside of the lock, where the folder is on object storage."""
        if self.remote:
            self.remote.mirror.push(*names)

    def begin(self) -> None:
        """As `create`, and what is stored can be read here, where the folder is on object storage."""
        self.create()
        if self.remote:
            self.remote.fetch(begin=True)

    def drop(self, name: str) -> None:
        """Remove a file, on object storage too."""
        (self.path / name).unlink(missing_ok=True)
        if self.remote:
            self.remote.mirror.bucket.delete(name)

    def wait(self, seconds: float) -> None:
        """Until no command works in the folder, so long at most."""
        until = time.monotonic() + seconds
        if self.remote:
            self.remote.mirror.make()
            if self.remote.lease.is_free():
                return
        while self.path.is_dir() and time.monotonic() < until:
            with contextlib.suppress(UserError), self.lock():
                return
            time.sleep(0.2)

    def sweep(self) -> None:
        """Remove what a killed command left half-written; only to be called by the one that holds the lock."""
        half = [".*.tmp", ".*.old", "stages/.*.tmp", "networks/*/.*.tmp", "networks/*/*/.*.tmp", "monte_carlo/*/.*.tmp"]
        for left in [path for pattern in half for path in self.path.glob(pattern)]:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def work(self, stage: str, inputs: StageInputs) -> Path:
        """The folder for a stage's unfinished work; belongs to one fingerprint, so it can always be resumed from."""
        folder = self.path / work_name(stage, inputs.fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a completed stage, or None."""
        try:
            return checked(json.loads((self.path / "stages" / f"{stage}.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self.place(f'stages/{stage}.json')} is damaged ({error}); remove it to run {stage} again"
            ) from None

    def valid(self, stage: str, inputs: StageInputs, redo: bool = False) -> bool:
        """Whether the stage's output for exactly these inputs is there and whole.

        Raises UserError where the folder holds the output of another configuration, with the difference; with `redo` that
        only makes it invalid.
        """
        record = self.record(stage)
        if record is None:
            return self._take_over(stage, inputs)
        if record["fingerprint"] != inputs.fingerprint:
            if redo:
                return False
            raise UserError(
                f"{self.named} holds the output of {stage} for another configuration:\n  "
                + "\n  ".join(inputs.difference(record))
                + f"\nNothing was changed. Choose another run.dir, or remove {self.named}/stages/{stage}.json to redo {stage} "
                "here."
            )
        return self._whole(stage, record)

    def complete(self, stage: str, inputs: StageInputs, outputs: Sequence[Path], seconds: float, **facts: Any) -> None:
        """Publish the record of a stage whose outputs are all in place."""
        found = file_digests([p for path in outputs for p in files_in(path)])
        files = {path.relative_to(self.path).as_posix(): entry for path, entry in found.items()}
        record = {
            "stage": stage,
            "fingerprint": inputs.fingerprint,
            "config": dict(inputs.config),
            "content": dict(inputs.content),
            "outputs": files,
            "output": digest(files),
            "seconds": round(seconds, 3),
            **facts,
        }
        self._publish(stage, record)

    def _publish(self, stage: str, record: Mapping[str, Any]) -> None:
        """A stage's record, after all that it names."""
        if self.remote:
            self.remote.seal()
        write_json(self.path / "stages" / f"{stage}.json", record)
        self.keep(f"stages/{stage}.json")

    def withdraw(self, stage: str) -> None:
        """Remove the record of a stage that is done anew: on the way its output is neither the old one nor the new one."""
        record = self.path / "stages" / f"{stage}.json"
        if record.exists():
            record.unlink()
            if self.remote:
                self.remote.mirror.push("stages", gone=True)

    def content(self, stage: str) -> str:
        """The content hash of a completed stage's output.

        Raises UserError where the stage has not been run.
        """
        record = self.record(stage)
        if record is None:
            raise UserError(f"{self.named} has no output of {stage} yet; run `distill-at-scale {stage} CONFIG` first")
        self._whole(stage, record)
        return record["output"]

    def _whole(self, stage: str, record: Mapping[str, Any]) -> bool:
        for name, entry in record["outputs"].items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                state = "missing" if not path.is_file() else "not what was written"
                record_of = self.place(f"stages/{stage}.json")
                raise UserError(f"{self.place(name)} is {state}; remove {record_of} to run {stage} again")
        return True

    def _take_over(self, stage: str, inputs: StageInputs) -> bool:
        """Link the same output from the run named in run.reuse, if it is there."""
        record = self.reuse.record(stage) if self.reuse else None
        if record is None or self.reuse is None or record["fingerprint"] != inputs.fingerprint:
            return False
        if outside := [name for name in record["outputs"] if not is_artefact(name)]:
            raise UserError(
                f"{self.reuse.named}/stages/{stage}.json names {outside[0]!r}, outside its folder or no artefact; it is not "
                "reused"
            )
        self.reuse._whole(stage, record)
        for name in record["outputs"]:
            self._link(self.reuse.path, name)
        own = {key: value for key, value in record.items() if key != LINKED}
        self._publish(stage, {**own, "reused_from": self.reuse.named})
        return True

    def adopt(self, other: RunDir, stage: str) -> None:
        """Stand on the finished stage of another run: its output is linked, not copied, whatever its size.

        Raises UserError where that run has no whole output of the stage.
        """
        other.content(stage)
        record = other.record(stage)
        assert record is not None
        if self.remote and other.remote:  # who stands on it in turn links to the same place
            record = {LINKED: self.remote.way_to(other.remote), **record}
        link(self.path, other.path, tops(record))
        write_json(self.path / "stages" / f"{stage}.json", {**record, "reused_from": other.named})
        self.keep(f"stages/{stage}.json")

    def stood_on(self, stage: str) -> RunDir:
        """The run whose output of a stage was adopted; this one where it was not."""
        record = self.record(stage) or {}
        if self.remote:
            return RunDir(self.remote.beside(record[LINKED]).path) if LINKED in record else self
        return RunDir(record.get("reused_from", self.path))

    def has(self, stage: str) -> bool:
        """Whether the output of a finished stage is in its place."""
        return all((self / name).exists() for name in tops(self.record(stage) or {"outputs": ()}))

    def take_over_files(self, folder: str) -> None:
        """Link whatever lies in a folder of the run named in run.reuse and is missing here; the folder's name says what it
        holds (networks of one fingerprint)."""
        if self.reuse is not None:
            for path in files_in(self.reuse / folder):
                name = path.relative_to(self.reuse.path).as_posix()
                if not (self.path / name).exists() and not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # the other run goes on and clears up meanwhile
                        self._link(self.reuse.path, name)

    def _link(self, other: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish(target) as temporary:
            try:
                os.link(os.path.realpath(other / name), temporary)  # never a link that the other run can turn elsewhere
            except OSError:
                shutil.copyfile(other / name, temporary)

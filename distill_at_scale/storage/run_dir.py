"""A run folder: what each stage read and wrote, by fingerprint. Nothing is reused silently and nothing is deleted.

A stage is complete when `stages/<stage>.json` exists. That record is written last and atomically. It holds the stage's inputs
(configuration values and content hashes), whose hash is the fingerprint, and its outputs with content hashes. The location of
the data, the number of workers and the run folder's path are not part of a fingerprint.

A folder in an object store is worked on in a local copy (`working_copy.py`): `path` is that copy.
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

from distill_at_scale.config.infrastructure import RunSection
from distill_at_scale.core.atomic_files import DAMAGED, file_digests, files_in, publish, write_json
from distill_at_scale.core.errors import Busy, Damaged, OtherConfiguration, UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.storage.object_store import Say, is_remote
from distill_at_scale.storage.redact import next_command
from distill_at_scale.storage.stage_record import LINKED, StageInputs, checked, is_artefact
from distill_at_scale.storage.sync import FolderSync, scratch_of
from distill_at_scale.storage.working_copy import LOCK, WorkingCopy, link, top_level_names, work_folder

CONTENTS = "contents.parquet"  # of ingest: times and hashes of the source's files; not part of the output's hash
STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")
OUTPUTS = {  # top-level names that a stage may write
    "ingest": ("prepared", "rejected.parquet", CONTENTS),
    "score": ("scores.parquet", "proxies"),
    "select": ("manifest.parquet",),
    "distill": ("synthetic", "metrics.jsonl"),
    "evaluate": ("evaluation.json",),
    "report": ("report.html",),
}
REPLACED = "replaced"  # folder of outputs that run.redo moved aside


def address_of(run: RunSection) -> str:
    """The absolute address of the folder that a configuration names."""
    return run.dir if is_remote(run.dir) else str(Path(run.dir.removeprefix("file://")).expanduser().resolve())


def next_folder(address: str) -> str:
    """The address of a new run folder next to one: runs/x-2 for runs/x, then runs/x-3, ..."""
    path, query, options = address.rstrip("/").partition("?")
    base, _, number = path.rpartition("-")
    if not (base and number.isdecimal()):
        base, number = path, "1"
    n = int(number) + 1
    while not is_remote(address) and Path(f"{base}-{n}".removeprefix("file://")).expanduser().exists():
        n += 1
    return f"{base}-{n}{query}{options}"


def again(stage: str) -> str:
    """The next action where the output of a stage is damaged."""
    return f"to move it to {REPLACED}/ and compute {stage} again:\n  {next_command(stage, redo=stage)}"


class RunDir:
    """Paths, locking and stage records of one run."""

    def __init__(
        self, path: str | Path, reuse: RunDir | str | Path | None = None,
        remote: WorkingCopy | None = None, redo: str | None = None,
    ):  # fmt: skip
        """`redo`: the first stage whose damaged or differing output `valid` moves aside."""
        self.path, self.remote, self.redo = Path(path).expanduser(), remote, redo
        self.reuse = RunDir(reuse) if isinstance(reuse, str | Path) else reuse

    @classmethod
    def of(cls, run: RunSection, say: Say = lambda text: None) -> RunDir:
        """The folder that a configuration names, local or in an object store; `say` logs waiting times."""
        other = {"dir": run.reuse, "reuse": None, "redo": None}
        reuse = cls.of(run.model_copy(update=other), say) if run.reuse else None
        if not is_remote(run.dir):
            return cls(run.dir.removeprefix("file://"), reuse, redo=run.redo)
        path = scratch_of(run.dir, run.scratch)
        return cls(path, reuse, WorkingCopy(FolderSync(run.dir, path, run.retry_seconds, say)), run.redo)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def named(self) -> str:
        """The folder's address for messages and records."""
        return self.remote.named if self.remote else str(self.path)

    def place(self, name: str) -> str:
        """The address of a file in the folder."""
        return f"{self.named}/{name}"

    def create(self) -> None:
        """Create the folder. Raises UserError if it is not writable, or if run.reuse is not a run folder."""
        if self.reuse:
            self.reuse.fetch()
            if not (self.reuse / "stages").is_dir():
                name = self.reuse.named
                raise UserError(f"run.reuse = {name!r} is not a run folder; give the run.dir of a finished run")
        try:
            if self.remote:
                self.remote.sync.create()
            (self.path / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{uuid.uuid4().hex[:8]}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = f"{error.strerror}. Choose another {'run.scratch' if self.remote else 'run.dir'}."
            raise UserError(f"cannot write in the run folder {self.path}: {reason}") from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one command; raises Busy for a second one."""
        with open(self.path / LOCK, "a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                advice = "wait for it, or choose another run.dir"
                raise Busy(f"another command is working in {self.named}; {advice}") from None
            with self.remote.locked(handle) if self.remote else contextlib.nullcontext():
                yield

    def fetch(self, *names: str) -> None:
        """Fetch what the object store holds; `names`: only these files of the outputs."""
        if self.remote:
            self.remote.fetch(names)

    def keep(self, *names: str) -> None:
        """Upload files that were published without the lock, if the folder is in an object store."""
        if self.remote:
            self.remote.sync.push(*names)

    def begin(self) -> None:
        """`create`, then fetch what the object store holds, if the folder is in one."""
        self.create()
        if self.remote:
            self.remote.fetch(begin=True)

    def drop(self, name: str) -> None:
        """Remove a file, also in the object store."""
        (self.path / name).unlink(missing_ok=True)
        if self.remote:
            self.remote.sync.store.delete(name)

    def wait(self, seconds: float) -> None:
        """Wait until no command works in the folder, at most `seconds`."""
        until = time.monotonic() + seconds
        if self.remote:
            self.remote.sync.create()
            if self.remote.lock.is_free():
                return
        while self.path.is_dir() and time.monotonic() < until:
            with contextlib.suppress(UserError), self.lock():
                return
            time.sleep(0.2)

    def sweep(self) -> None:
        """Remove unfinished files of a killed command. The caller holds the lock."""
        folders = ("", "stages/", "networks/*/", "networks/*/*/", "monte_carlo/*/", "controls/*/")
        for pattern in (".*.old", *(f"{folder}.*.tmp" for folder in folders)):
            for path in list(self.path.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def work(self, stage: str, inputs: StageInputs) -> Path:
        """The folder for a stage's unfinished work. It belongs to one fingerprint, so the work can always be resumed."""
        folder = self.path / work_folder(stage, inputs.fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a completed stage, or None. Raises Damaged if it cannot be read."""
        try:
            return checked(json.loads((self.path / "stages" / f"{stage}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            path = self.place(f"stages/{stage}.json")
            raise Damaged(f"{path} is damaged ({error})", again(stage)) from None

    def valid(self, stage: str, inputs: StageInputs) -> bool:
        """Whether the stage's output for exactly these inputs exists and is complete.

        Raises:
            OtherConfiguration: the folder holds the output of another configuration.
            Damaged: the record or a file is not what was written.
        """
        if (record := self.record(stage)) is None:
            return False
        if record["fingerprint"] == inputs.fingerprint:
            self._check_outputs(stage, record)
            return True
        difference = inputs.difference(record)
        lines = "\n  ".join(difference)
        problem = f"{self.named} holds the output of {stage} for another configuration:\n  {lines}"
        raise OtherConfiguration(problem, difference)

    def redoes(self, stage: str) -> bool:
        """Whether run.redo allows to compute a stage again."""
        return self.redo is not None and STAGES.index(stage) >= STAGES.index(self.redo)

    def set_aside(self, stage: str) -> str:
        """Move the record and the output of a stage to `replaced/`; returns the address of the new folder there."""
        record = f"stages/{stage}.json"
        names = set(OUTPUTS[stage])
        with contextlib.suppress(UserError):
            names |= set(top_level_names(self.record(stage) or {"outputs": ()}))
        folder = f"{REPLACED}/{stage}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        (self.path / folder).mkdir(parents=True)
        os.replace(self.path / record, self.path / folder / f"{stage}.json")
        if self.remote:
            self.remote.sync.push("stages", gone=True)
        for name in sorted(names):
            if (self.path / name).is_symlink():  # of a shared output, which stays where it is
                (self.path / name).unlink()
            elif (self.path / name).exists():
                os.replace(self.path / name, self.path / folder / name)
        return self.place(folder)

    def complete(self, stage: str, inputs: StageInputs, outputs: Sequence[Path], seconds: float, **facts: Any) -> None:
        """Publish the record of a stage; all its `outputs` exist."""
        digests = file_digests([p for path in outputs for p in files_in(path)])
        files = {path.relative_to(self.path).as_posix(): entry for path, entry in digests.items()}
        read = {"config": dict(inputs.config), "content": dict(inputs.content)}
        output = digest({name: files[name] for name in files if name != CONTENTS})
        written = {"outputs": files, "output": output, "seconds": round(seconds, 3)}
        self._publish(stage, {"stage": stage, "fingerprint": inputs.fingerprint, **read, **written, **facts})

    def _publish(self, stage: str, record: Mapping[str, Any]) -> None:
        if self.remote:
            self.remote.seal()  # everything that the record names is stored first
        write_json(self.path / "stages" / f"{stage}.json", record)
        self.keep(f"stages/{stage}.json")

    def withdraw(self, stage: str) -> None:
        """Remove the record of a stage before it runs again, because its output will change step by step."""
        record = self.path / "stages" / f"{stage}.json"
        if record.exists():
            record.unlink()
            if self.remote:
                self.remote.sync.push("stages", gone=True)

    def content(self, stage: str) -> str:
        """The content hash of a completed stage's output. Raises UserError if the stage has not run."""
        if (record := self.record(stage)) is None:
            first = next(earlier for earlier in STAGES if not (self.path / "stages" / f"{earlier}.json").exists())
            raise UserError(f"{self.named} has no output of {stage} yet; run this first:\n  {next_command(first)}")
        self._check_outputs(stage, record)
        return record["output"]

    def _check_outputs(self, stage: str, record: Mapping[str, Any]) -> None:
        for name, entry in record["outputs"].items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                state = "missing" if not path.is_file() else "not what was written"
                raise Damaged(f"{self.place(name)} is {state}", again(stage))

    def take_over(self, stage: str, inputs: StageInputs) -> bool:
        """Link the same output from the run named in run.reuse; False if that run has none of this stage.

        Raises UserError, whose message is the reason, if that run's output is damaged or of another configuration.
        """
        try:
            if self.reuse is None or (record := self.reuse.record(stage)) is None:
                return False
            if outside := [name for name in record["outputs"] if not is_artefact(name)]:
                raise UserError(f"its record names {outside[0]!r}, which is outside its folder or not an artefact")
            self.reuse.valid(stage, inputs)
        except Damaged as error:
            raise UserError(error.reason) from None
        except OtherConfiguration as error:
            raise UserError(f"another configuration: {', '.join(error.difference)}") from None
        for name in record["outputs"]:
            self._link(self.reuse.path, name)
        own = {key: value for key, value in record.items() if key != LINKED}
        self._publish(stage, {**own, "reused_from": self.reuse.named})
        return True

    def adopt(self, other: RunDir, stage: str) -> None:
        """Link (not copy) the finished stage of another run. Raises UserError if its output is not complete."""
        other.content(stage)
        record = other.record(stage)
        assert record is not None
        if self.remote and other.remote:  # runs that use this one link to the same place
            record = {LINKED: self.remote.link_to(other.remote), **record}
        link(self.path, other.path, top_level_names(record))
        write_json(self.path / "stages" / f"{stage}.json", {**record, "reused_from": other.named})
        self.keep(f"stages/{stage}.json")

    def output_run(self, stage: str) -> RunDir:
        """The run whose output of a stage this run uses; this run if the output is its own."""
        record = self.record(stage) or {}
        if self.remote:
            return RunDir(self.remote.linked_copy(record[LINKED]).path) if LINKED in record else self
        return RunDir(record.get("reused_from", self.path))

    def has(self, stage: str) -> bool:
        """Whether the output of a finished stage exists."""
        return all((self / name).exists() for name in top_level_names(self.record(stage) or {"outputs": ()}))

    def take_over_files(self, folder: str) -> None:
        """Link files missing here from the folder of this name in run.reuse; the name identifies the content."""
        if self.reuse is not None:
            for path in files_in(self.reuse / folder):
                name = path.relative_to(self.reuse.path).as_posix()
                known = any((self.path / n).exists() for n in (name, f"{name}{DAMAGED}"))  # not the same damage again
                if not known and not path.name.startswith(".") and path.suffix != DAMAGED:
                    with contextlib.suppress(FileNotFoundError):  # a command in the other run removes files
                        self._link(self.reuse.path, name)

    def _link(self, other: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish(target) as temporary:
            try:
                os.link(os.path.realpath(other / name), temporary)  # not a link that the other run can redirect
            except OSError:
                shutil.copyfile(other / name, temporary)

"""One cell of the matrix: a fault strikes a stage in progress, the same command runs again, and the promise is checked.

The promise: the command ends with status 0, or with one clear error and status 2; given again it ends with status 0; at most
the work in flight is repeated; the result has the same bytes as without the fault.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from jobs.faults.bench import ROOT, Bench
from jobs.faults.faults import FAULTS, Fault
from jobs.faults.hosts import Command

CONFIG = Path(__file__).with_name("config.yaml")
LIMIT = 600  # seconds for a command, also on a busy machine; more counts as hanging
PIECES, STEPS = 6, 20  # pieces (a unit of each of two actors) and steps (two checkpoints) that may be in flight
PUBLISHED = ("pieces/[!.]*-0*.arrow", "pieces/chunk-*.parquet", "proxies/**/[!.]*.safetensors")
UGLY = re.compile(r"Traceback \(most recent|\*\*\* SIG|^\[[^]]*\] [CEF] |^\(?ray::|\(raylet\)|StackTrace", re.MULTILINE)
SKIPPED = {"actor", "node", "head", "network"}  # faults that select, which uses no cluster, cannot meet


@dataclass(frozen=True)
class Stage:
    """`begun` says whether the first unit is finished, from the run folder and what the command said."""

    needs: tuple[str, ...]
    begun: Callable[[Path, str], bool]
    artefacts: Callable[[Path], Mapping[str, str]]
    overrides: tuple[str, ...] = ()


@dataclass
class Result:
    stage: str
    fault: str
    verdict: str = "ok"  # ok, FAILED or n/a
    reasons: list[str] = field(default_factory=list)
    status: int | None = None  # of the struck command; None where it had to be ended
    seconds: float = 0.0  # from the fault to the end of the struck command
    error: str = ""  # what it said last
    again: int | None = None  # status of the same command, given again
    again_seconds: float = 0.0
    redone: dict[str, int] = field(default_factory=dict)

    def blame(self, reason: str) -> None:
        self.verdict = "FAILED"
        self.reasons.append(reason)


def _any(pattern: str) -> Callable[[Path, str], bool]:
    def result(run: Path, messages: str) -> bool:
        with contextlib.suppress(FileNotFoundError):  # a folder was removed while it was looked through
            return any(True for _ in run.glob(pattern))
        return False

    return result


def _files(*patterns: str) -> Callable[[Path], Mapping[str, str]]:
    def digests(run: Path) -> dict[str, str]:
        result = sorted(path for pattern in patterns for path in run.glob(pattern) if path.is_file())
        return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in result}

    return digests


def _rows(run: Path) -> dict[str, str]:
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    return {str(number): json.dumps({**row, "seconds": 0}) for number, row in enumerate(rows)}


def _trials(run: Path) -> dict[str, str]:
    rows = pq.read_table(run / "sweep.parquet").to_pylist()
    return {
        str(number): json.dumps({k: v for k, v in row.items() if not k.endswith("seconds")})
        for number, row in enumerate(rows)
    }


STAGES = {
    "ingest": Stage((), _any(".work/ingest-*/pieces/[!.]*-0*.arrow"), _files("prepared/**/*", "rejected.parquet")),
    "score": Stage(("ingest",), _any(".work/score-*/pieces/chunk-*.parquet"), _files("scores.parquet")),
    "select": Stage(
        ("ingest", "score"), lambda run, said: "select: started" in said, _files("manifest.parquet")
    ),
    "distill": Stage(
        ("ingest", "score", "select"), _any(".work/distill-*/state.safetensors"), _files("synthetic/synthetic.safetensors")
    ),
    "evaluate": Stage(("ingest", "score", "select", "distill"), _any(".work/evaluate-*/rows.jsonl"), _rows),
    "sweep": Stage(
        ("ingest", "score"), _any("**/.work/distill-*/state.safetensors"), _trials, ("distill.workers=1", "distill.steps=80")
    ),
}  # fmt: skip


# outputs of `run`; every command writes the report again
OF_RUN = ("ingest", "score", "select", "distill", "evaluate")


class Watch:
    """Looks at a run folder all the time, and counts what is done twice: pieces, steps and rows."""

    def __init__(self, run: Path):
        self.run, self.made, self.steps = run, dict[Path, set[tuple[int, int]]](), dict[Path, int]()
        self.back, self.end = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> dict[str, int]:
        self.end.set()
        self.thread.join()
        return {"pieces": sum(len(built) - 1 for built in self.made.values()), "steps": self.back}

    def _watch(self) -> None:
        while not self.end.wait(0.03):
            try:
                self._look()
            except (OSError, ValueError):
                continue  # a file was moved meanwhile

    def _look(self) -> None:
        for pattern in PUBLISHED:
            for path in self.run.glob(f"**/.work/*/{pattern}"):
                about = path.stat()
                self.made.setdefault(path, set()).add((about.st_ino, about.st_mtime_ns))
        for log in self.run.glob("**/metrics.jsonl"):
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            step = json.loads(lines[-1])["step"] if lines else 0
            self.back += max(0, self.steps.get(log, 0) - step)
            self.steps[log] = step


class Cells:
    """Cells on one bench; what nothing disturbed is made first, once, stage by stage."""

    def __init__(self, bench: Bench, say: Callable[[str], None], overrides: Sequence[str] = (), alone: bool = False):
        """`overrides` are for all commands; with `alone` the undisturbed run is made without the cluster."""
        self.bench, self.say, self.overrides, self.alone = bench, say, overrides, alone
        self.whole = dict[str, Mapping[str, str]]()

    def prepare(self, stages: list[str]) -> None:
        """The undisturbed run of these stages and of those that they need."""
        needed = {name for stage in stages for name in (*STAGES[stage].needs, stage)}
        for name in [name for name in STAGES if name in needed]:
            if name in self.whole:
                continue
            began, without = time.monotonic(), ["cluster.address=none"] if self.alone else []
            together = OF_RUN if self.alone and name in OF_RUN else (name,)  # a command takes seconds to start
            asked = [*self.asked("run" if together == OF_RUN else name, self._undisturbed(name)), *without]
            command = self.bench.command(asked, f"undisturbed-{name}.log")
            if (status := self.end(command, LIMIT)) != 0:
                raise RuntimeError(f"undisturbed {name} ended with {status}; see {self.bench.folder}")
            for stage in together:
                self.whole[stage] = STAGES[stage].artefacts(self._seen(self._undisturbed(stage)))
            self.say(f"{', '.join(together)}: undisturbed in {time.monotonic() - began:.0f} s")

    def run(self, stage: str, fault: str) -> Result:
        """Run one cell; errors are part of its result."""
        result = Result(stage, fault)
        if stage == "select" and fault in SKIPPED:
            return Result(stage, fault, "n/a", ["select uses no cluster"])
        name = f"{stage}-{fault}"
        shutil.rmtree(self._seen(name), ignore_errors=True)
        try:
            self.bench.mend()
            self._copy(stage, name)
            watch = Watch(self._seen(name))
            try:
                self._struck(stage, FAULTS[fault], name, result)
                self.bench.mend()
                if result.status != 0:
                    self._again(stage, name, result)
            finally:
                result.redone = watch.stop()
            self._check(stage, name, result)
        except Exception as error:
            result.blame(f"the bench: {type(error).__name__}: {error}")
        shutil.rmtree(self._seen(name), ignore_errors=True)
        (self.bench.folder / f"{name}.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
        return result

    def _struck(self, stage: str, fault: Fault, name: str, result: Result) -> None:
        log = self.bench.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        command = self.bench.command(self.asked(stage, name), log.name)
        try:
            until = time.monotonic() + LIMIT
            while not STAGES[stage].begun(self._seen(name), log.read_text(errors="replace", encoding="utf-8")):
                if command.ended() is not None or time.monotonic() > until:
                    raise RuntimeError("no unit was finished before the command ended; see its log")
                time.sleep(0.01)
            fault.strike(self.bench, command)
            began = time.monotonic()
            if fault.lift:
                self.end(command, fault.seconds, kill=False)
                fault.lift(self.bench, command)
            result.status = self.end(command, LIMIT)
            result.seconds = round(time.monotonic() - began, 1)
        finally:
            if command.ended() is None:
                command.kill()
        self._look_at_end(log.read_text(errors="replace", encoding="utf-8"), fault, result)

    def _look_at_end(self, messages: str, fault: Fault, result: Result) -> None:
        lines = messages.strip().splitlines()
        result.error = "" if result.status == 0 or not lines else lines[-1]
        if fault is FAULTS["driver"]:
            return
        if result.status is None:
            result.blame(f"the command hung for {LIMIT} s")
        elif result.status not in (0, 2):
            result.blame(f"the command ended with status {result.status}")
        elif result.status == 2 and not result.error.startswith("error: "):
            result.blame("status 2 without a clear error")
        if results := UGLY.search(messages):
            result.blame(f"a stack trace: {results.group()!r}")

    def _again(self, stage: str, name: str, result: Result) -> None:
        began = time.monotonic()
        log = self.bench.folder / f"{name}-again.log"
        log.unlink(missing_ok=True)
        result.again = self.end(self.bench.command(self.asked(stage, name), log.name), LIMIT)
        result.again_seconds = round(time.monotonic() - began, 1)
        if result.again != 0:
            last = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()[-1:]
            result.blame(f"given again it ended with {result.again}: {' '.join(last)}")

    def _check(self, stage: str, name: str, result: Result) -> None:
        if 0 in (result.status, result.again) and (different := self.different([stage], name)):
            result.blame(f"{len(different)} artefacts differ, the first is {different[0]}")
        if result.redone["pieces"] > PIECES or result.redone["steps"] > STEPS:
            result.blame(f"more was done again than was in flight: {result.redone}")

    def different(self, stages: Sequence[str], name: str) -> list[str]:
        """The artefacts of these stages that are not as in the undisturbed run."""
        result = {key: value for stage in stages for key, value in STAGES[stage].artefacts(self._seen(name)).items()}
        whole = {key: value for stage in stages for key, value in self.whole[stage].items()}
        return sorted(key for key in {**result, **whole} if result.get(key) != whole.get(key))

    def asked(self, stage: str, name: str) -> list[str]:
        """The command of a stage, or `run`, for the run folder of that name."""
        where = [f"run.dir={self.bench.disk / name}", f"cluster.address={self.bench.address}"]
        command = [sys.executable, "-m", "distill_at_scale.cli", stage, str(CONFIG.relative_to(ROOT))]
        shared = [f"run.reuse={self.bench.disk / 'undisturbed'}"] if stage == "sweep" else []
        own = STAGES[stage].overrides if stage in STAGES else ()
        return [*command, *where, *shared, *own, *self.overrides]

    def end(self, command: Command, seconds: float, kill: bool = True) -> int | None:
        """Its exit status; None where it takes longer."""
        until = time.monotonic() + seconds
        while (status := command.ended()) is None and time.monotonic() < until:
            time.sleep(0.05)
        if status is None and kill:
            command.kill()
        return status

    def _copy(self, stage: str, name: str) -> None:
        """The run folder as the earlier stages leave it."""
        run, whole = self._seen(name), self._seen("undisturbed")
        (run / "stages").mkdir(parents=True)
        for need in STAGES[stage].needs if stage != "sweep" else ():
            record = json.loads((whole / "stages" / f"{need}.json").read_text(encoding="utf-8"))
            for file in (f"stages/{need}.json", *record["outputs"]):
                (run / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(whole / file, run / file)

    def _undisturbed(self, stage: str) -> str:
        return "undisturbed-sweep" if stage == "sweep" else "undisturbed"

    def _seen(self, name: str) -> Path:
        return self.bench.switch.seen / name

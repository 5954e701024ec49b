"""A soak test: the pipeline again and again under random faults; each run must give the bytes of an undisturbed run.

    python jobs/faults/soak.py [--minutes 30] [--seed 0] [--folder DIR] [--out FILE]

Every few seconds, drawn from the seed, a fault strikes a running command. After an error the same command runs again. When
the time is over the last run may finish. Exit status 1 if a result differs, a command hangs, or a command ends with anything
but one clear error.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from distill_at_scale.core.environment import environment
from jobs.faults import hosts
from jobs.faults.bench import Bench
from jobs.faults.cells import LIMIT, OF_RUN, UGLY, Cells
from jobs.faults.faults import FAULTS, working
from jobs.faults.matrix import say

WEIGHTS = {"actor": 8, "node": 3, "driver": 2, "head": 1, "network": 1, "storage": 1, "disk": 1}
PAUSE = 5.0, 30.0  # seconds between two faults
COMMANDS = 50  # for one run at most; more means that it does not get on
PATIENCE = 900  # seconds of faults for one command; then it is left alone, and must end
STORAGE_SECONDS = 10  # in which storage refuses, in a soak


@dataclass
class Round:
    """One run, from its first command to its last."""

    faults: Counter[str] = field(default_factory=Counter)
    statuses: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Soak:
    def __init__(self, bench: Bench, cells: Cells, seed: int, until: float):
        self.bench, self.cells, self.random, self.until = bench, cells, random.Random(seed), until

    def round(self, number: int) -> Round:
        """Commands until one ends with status 0, and what it left compared with the undisturbed run."""
        result, name, began = Round(), f"round-{number}", time.monotonic()
        while 0 not in result.statuses and len(result.statuses) < COMMANDS:
            self.bench.mend()
            self._command(name, f"{name}-{len(result.statuses)}.log", result)
        if 0 in result.statuses:
            result.problems += [f"{name}: {what} differs" for what in self.cells.different(OF_RUN, name)]
        else:
            result.problems.append(f"{name}: {COMMANDS} commands did not finish it")
        result.seconds = round(time.monotonic() - began, 1)
        shutil.rmtree(self.bench.switch.seen / name)
        return result

    def _command(self, name: str, log: str, result: Round) -> None:
        command = self.bench.command(self.cells.asked("run", name), log)
        killed, until = False, min(self.until, time.monotonic() + PATIENCE)
        while command.ended() is None and time.monotonic() < until:
            if self.cells.end(command, self.random.uniform(*PAUSE), kill=False) is None:
                killed |= self._strike(command, result)
        result.statuses.append(status := self.cells.end(command, LIMIT))
        messages = (self.bench.folder / log).read_text(errors="replace", encoding="utf-8")
        if not killed and (status not in (0, 2) or UGLY.search(messages)):
            result.problems.append(f"{log}: status {status}" + (" and a stack trace" if UGLY.search(messages) else ""))

    def _strike(self, command: hosts.Command, result: Round) -> bool:
        """Whether the command itself was killed."""
        (name,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if (name == "actor" and not working(self.bench)) or len(self.bench.hosts) < len(self.bench.names):
            return False
        say(f"  {FAULTS[name].title}")
        result.faults[name] += 1
        FAULTS[name].strike(self.bench, command)
        if lift := FAULTS[name].lift:
            self.cells.end(command, min(FAULTS[name].seconds, STORAGE_SECONDS if name != "network" else 30), kill=False)
            lift(self.bench, command)
        return name == "driver"


def main() -> int:
    options = _options()
    if reason := hosts.possible():
        say(f"hosts cannot be made on this machine: {reason}")
        return 2
    folder = Path(options.folder or tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"seed {options.seed}, logs: {folder}")
    rounds: list[Round] = []
    with Bench(folder) as bench:
        cells = Cells(bench, say)
        cells.prepare(list(OF_RUN))
        soak = Soak(bench, cells, options.seed, until := time.monotonic() + 60 * options.minutes)
        while time.monotonic() < until:
            rounds.append(soak.round(len(rounds)))
            say(_line(len(rounds) - 1, rounds[-1]))
    problems = [problem for one in rounds for problem in one.problems]
    faults = sum((one.faults for one in rounds), Counter())
    (options.out or folder / "soak.json").write_text(
        json.dumps({**environment(), "seed": options.seed, "rounds": [vars(one) for one in rounds]}, indent=1) + "\n",
        encoding="utf-8",
    )
    say(f"{len(rounds)} runs, {sum(faults.values())} faults ({_counted(faults)}): {len(problems)} problems")
    for problem in problems:
        say(f"  {problem}")
    return 1 if problems else 0


def _line(number: int, one: Round) -> str:
    commands = ", ".join(map(str, one.statuses))
    state = "; ".join(one.problems) or "the same bytes as undisturbed"
    return f"round {number}: {one.seconds:.0f} s, {_counted(one.faults)}; commands ended with {commands}; {state}"


def _counted(faults: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in faults.items()) or "no fault"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for logs; default: a new one")
    parser.add_argument("--out", type=Path, help="JSON; default: soak.json in the folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""The failure matrix, every fault against every stage, as a table and as JSON.

    python jobs/faults/matrix.py [--stages ingest,score] [--faults actor,node] [--folder DIR] [--out FILE]

Needs root and Linux namespaces: each node is a host with its own address (`hosts.py`). A cell takes half a minute to five
minutes. The logs of all commands and nodes stay in the folder. Exit status 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from distill_at_scale.core.environment import environment
from jobs.faults import hosts
from jobs.faults.bench import Bench
from jobs.faults.cells import STAGES, Cells, Result
from jobs.faults.faults import FAULTS

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)
    sys.stdout.flush()


def main() -> int:
    options = _options()
    if reason := hosts.possible():
        say(f"hosts cannot be made on this machine: {reason}")
        return 2
    folder = Path(options.folder or tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"logs: {folder}; every node is a host in a network namespace of its own")
    results: list[Result] = []
    with Bench(folder) as bench:
        cells = Cells(bench, say)
        cells.prepare(options.stages)
        for stage in options.stages:
            for fault in options.faults:
                results.append(cells.run(stage, fault))
                say(_line(results[-1]))
                write(options.out or folder / "matrix.json", results)
    console.print(table(results))
    return 1 if any(result.verdict == "FAILED" for result in results) else 0


def write(path: Path, results: Sequence[Result]) -> None:
    path.write_text(
        json.dumps({**environment(), "cells": [asdict(result) for result in results]}, indent=1) + "\n",
        encoding="utf-8",
    )


def table(results: Sequence[Result]) -> Table:
    """Stages down, faults across."""
    built = Table(
        title="what the struck command and the same command, given again, ended with, and after how many seconds"
    )
    faults = [fault for fault in FAULTS if any(result.fault == fault for result in results)]
    built.add_column("stage")
    for fault in faults:
        built.add_column(FAULTS[fault].title)
    for stage in STAGES:
        values = {result.fault: result for result in results if result.stage == stage}
        if values:
            built.add_row(stage, *(_cell(values[fault]) if fault in values else "not run" for fault in faults))
    return built


def _cell(result: Result) -> str:
    if result.verdict == "n/a":
        return "n/a"
    again = "" if result.again is None else f", again {result.again} in {result.again_seconds:.0f} s"
    return f"{result.verdict}: {result.status} in {result.seconds:.0f} s{again}"


def _line(result: Result) -> str:
    redone = ", ".join(f"{count} {what} done again" for what, count in result.redone.items() if count)
    parts = [f"{result.stage} x {result.fault}: {_cell(result)}", redone, result.error, *result.reasons]
    return "; ".join(part for part in parts if part)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=_names(STAGES), default=list(STAGES), help="default: all")
    parser.add_argument("--faults", type=_names(FAULTS), default=list(FAULTS), help="default: all")
    parser.add_argument("--folder", help="for logs; default: a new one")
    parser.add_argument("--out", type=Path, help="JSON; default: matrix.json in the folder")
    return parser.parse_args()


def _names(known: dict) -> type:
    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; known are {', '.join(known)}")
        return text.split(",")

    return names


if __name__ == "__main__":
    sys.exit(main())

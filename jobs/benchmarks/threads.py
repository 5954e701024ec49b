"""Threads without Ray: a stage of the digits with one thread and with this version's choice, alone and beside busy processes.

    python jobs/benchmarks/threads.py [--stage score] [--repeat 3] [--busy 0 2] [--other CHECKOUT] [section.key=value ...]

Prints a table of seconds and of ratios to one thread. The settings of a repetition run one after the other, so that other
load is about the same for all; the load average at the start of each is in the table. `--other` adds an earlier version.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("ingest", "score", "select", "distill", "evaluate")


def run(checkout: Path, stage: str, folder: Path, overrides: list[str], **environment: str) -> float:
    """Run one stage in a run folder with a checkout of the package; returns its seconds without imports."""
    command = [sys.executable, "-m", "distill_at_scale", stage, str(checkout / "configs" / "digits.yaml")]
    settings = ["cluster.address=none", f"run.dir={folder}", *overrides]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    subprocess.run(
        [*command, *settings], check=True, stdout=subprocess.DEVNULL, cwd=checkout,
        env=inherited | {"PYTHONPATH": str(checkout)} | environment,
    )  # fmt: skip
    return float(json.loads((folder / "stages" / f"{stage}.json").read_text(encoding="utf-8"))["seconds"])


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Meanwhile this many processes use a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--stage", choices=STAGES[1:], default="score")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy processes")
    parser.add_argument("--other", type=Path, help="checkout of another version, measured too")
    options = parser.parse_intermixed_args()
    settings: dict[str, tuple[Path, dict[str, str]]] = {
        "one thread": (ROOT, {"OMP_NUM_THREADS": "1"}),
        "this version": (ROOT, {}),
    }
    if options.other:
        settings["other version"] = (options.other.resolve(), {})
    with tempfile.TemporaryDirectory() as scratch:
        earlier = Path(scratch, "earlier")
        for stage in STAGES[: STAGES.index(options.stage)]:
            run(ROOT, stage, earlier, options.overrides, OMP_NUM_THREADS="1")
        print(
            "| busy processes | setting | seconds | ratio to one thread | load average before |\n|---|---|---|---|---|"
        )
        for count in options.busy:
            seconds: dict[str, list[float]] = {name: [] for name in settings}
            loads: dict[str, list[float]] = {name: [] for name in settings}
            for _ in range(options.repeat):
                for name, (checkout, environment) in settings.items():
                    folder = Path(scratch, "run")
                    shutil.copytree(earlier, folder)
                    loads[name].append(os.getloadavg()[0])
                    with busy(count):
                        seconds[name].append(run(checkout, options.stage, folder, options.overrides, **environment))
                    shutil.rmtree(folder)
                    print(f"{name}: {seconds[name][-1]:.1f} s, load {loads[name][-1]:.1f}", file=sys.stderr, flush=True)
            for name, values in seconds.items():
                ratios = [value / one for value, one in zip(values, seconds["one thread"], strict=True)]
                cells = [", ".join(f"{value:.1f}" for value in values), described(ratios), described(loads[name])]
                print(f"| {count} | {name} | {' | '.join(cells)} |", flush=True)


def described(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


if __name__ == "__main__":
    main()

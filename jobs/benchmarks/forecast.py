"""Forecast and time of each stage: `plan` for a configuration, then `run`, for the five configurations that are shipped
for it or others.

    python jobs/benchmarks/forecast.py --cifar10 PATH --imagenette PATH            # all five, on this machine
    python jobs/benchmarks/forecast.py --only digits --set cluster.address=none    # further values apply to all

Prints the range, the expected and the actual seconds, and the deviation of each stage; writes them to OUT/forecast.json.
The machine should be idle, and the run folders in OUT must be new. Long configurations have fewer steps, epochs or samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SHORTENED = {
    "digits": ["distill.steps=100"],
    "cifar10_dc_ipc1": ["distill.steps=200", "score.share=0.2", "evaluate.epochs=300"],
    "cifar10_dm_ipc1": ["distill.steps=30", "score.share=0.2", "evaluate.epochs=100"],
    "imagenette_dm_ipc1": ["distill.steps=50", "score.epochs=2", "evaluate.epochs=100"],
    "moving_digits": [],
}
DATA = {"cifar10_dc_ipc1": "cifar10", "cifar10_dm_ipc1": "cifar10", "imagenette_dm_ipc1": "imagenette"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="folder of train-*.parquet and test-*.parquet")
    parser.add_argument("--imagenette", help="folder of train/ and val/")
    parser.add_argument("--only", nargs="*", default=list(SHORTENED), help="configurations")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="values for all configurations")
    parser.add_argument("--full", action="store_true", help="the configurations as they are shipped")
    parser.add_argument("--out", type=Path, default=Path("runs/forecast"), help="folder of the run folders")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.only:
        values = [f"run.dir={options.out / name}", *([] if options.full else SHORTENED.get(name, [])), *options.set]
        if (data := DATA.get(name)) is not None:
            if (place := getattr(options, data)) is None:
                print(f"{name}: left out without --{data}")
                continue
            values.append(f"data.path={place}")
        began, load = time.perf_counter(), os.getloadavg()[0]
        command(options.out / f"{name}.log", "plan", name, *values)
        planned = time.perf_counter() - began
        command(options.out / f"{name}.log", "run", name, *values)
        results[name] = compare(options.out / name) | {"plan_seconds": round(planned, 1), "load_before": load}
        show(name, results[name])
        (options.out / "forecast.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def command(log: Path, *words: str) -> None:
    with open(log, "a", encoding="utf-8") as out:
        subprocess.run([sys.executable, "-m", "distill_at_scale", *words], stdout=out, stderr=out, check=True)


def compare(run: Path) -> dict:
    plan, stages = json.loads((run / "plan.json").read_text(encoding="utf-8")), {}
    for stage, entry in plan["stages"].items():
        if (record := run / "stages" / f"{stage}.json").exists():
            actual = json.loads(record.read_text(encoding="utf-8"))["seconds"]
            expected = {"low": entry["low"], "expected": entry["seconds"], "high": entry["high"]}
            parts = {part: round(seconds, 2) for part, seconds in entry["parts"].items()}
            stages[stage] = expected | {"actual": round(actual, 2), "parts": parts}
    return {"stages": stages, "load": plan["load"]}


def show(name: str, result: dict) -> None:
    print(f"\n{name}: plan took {result['plan_seconds']} s. {result['load']}")
    print(f"  {'stage':9} {'range':>17} {'expected':>9} {'actual':>8} {'off':>6}")
    total = [0.0, 0.0]
    for stage, one in result["stages"].items():
        total = [total[0] + one["expected"], total[1] + one["actual"]]
        line = f"  {stage:9} {one['low']:8.1f}-{one['high']:8.1f} {one['expected']:9.1f} {one['actual']:8.1f}"
        print(f"{line} {one['expected'] / one['actual'] - 1:+6.0%}  {one['parts']}")
    print(f"  {'total':27} {total[0]:9.1f} {total[1]:8.1f} {total[0] / total[1] - 1:+6.0%}", flush=True)


if __name__ == "__main__":
    main()

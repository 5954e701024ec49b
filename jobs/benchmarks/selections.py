"""Accuracy of a distillation by what is kept: rows of `select` keys on the same scores.

    python jobs/benchmarks/selections.py BASE.yaml --out runs/selections --rows "keep=1" "keep=0.1 criterion=random"
        "keep=0.1 order=clusters" ... [--seeds 3] [--set section.key=value ...] [--only-table]

BASE.yaml has everything that the rows share. Ingest and scoring are done once, in OUT/shared. Repetition k of a row has the
seeds k of the distillation and of the selection. All rows get their first repetition before any gets its second, and every
repetition is an ordinary run in this process (cluster.address=none), so an interrupted benchmark resumes. Prints a Markdown
table of the finished rows; ± is the deviation over all networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from distill_at_scale.config import load as configuration
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", required=True, help="keys of select, separated by spaces")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all rows")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    shared = options.out / "shared"
    base = ["cluster.address=none", "evaluate.control=none", *options.set]

    def folder(row: str, seed: int) -> Path:
        return Path(options.out) / f"{row.replace(' ', ',')}-{seed}"

    def run(overrides: list[str], stages: tuple[str, ...]) -> None:
        Pipeline(configuration.load(options.base, [*base, *overrides]), LocalExecutor, Display()).run(stages)

    if not options.only_table:
        run([f"run.dir={shared}"], ("ingest", "score"))
        for seed in range(options.seeds):
            for row in options.rows:
                own = [
                    f"run.dir={folder(row, seed)}",
                    f"run.reuse={shared}",
                    f"distill.seed={seed}",
                    f"select.seed={seed}",
                ]
                run([*own, *(f"select.{key}" for key in row.split())], ("select", "distill", "evaluate"))
    print("| select | kept | top-1 % | n | distill, s |\n|---|---|---|---|---|")
    for row in options.rows:
        ready = [path for seed in range(options.seeds) if (path := folder(row, seed) / "evaluation.json").exists()]
        if not ready:
            continue
        tested = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in ready]
        top1 = [100 * one["top1"] for rows in tested for one in rows if one["set"] == "distilled"]
        records = {name: [json.loads((path.parent / "stages" / f"{name}.json").read_text(encoding="utf-8")) for path in ready]
                   for name in ("select", "distill")}  # fmt: skip
        spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        seconds = statistics.mean(record["seconds"] for record in records["distill"])
        print(f"| {row} | {records['select'][0]['reached']:.2%} | {statistics.mean(top1):.1f}{spread} | "
              f"{len(ready)} × {len(top1) // len(ready)} | {seconds:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()

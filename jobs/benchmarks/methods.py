"""Accuracy and time of distillation methods on one data set, with and without both levels of pruning.

    python jobs/benchmarks/methods.py BASE.yaml --out runs/methods [--methods dc dm] [--ipc 1 10]
        [--levels none static both] [--set section.key=value ...] [--only-table]

BASE.yaml has everything that the rows share; SCHEDULES below has, per method and images per class, the part of the published
schedule that two cores finish in minutes. Ingest and scoring are done once, in OUT/shared, and reused. Every row is an
ordinary run of the pipeline in this process (cluster.address=none), so an interrupted benchmark resumes, and several
processes may share OUT with different --methods. Prints a Markdown table of the finished rows.

Levels: `none` keeps and uses everything; `static` uses the keep rate of BASE.yaml; `both` adds its runtime rule.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline

LEVELS = {"none": ["select.keep=1", "runtime.rule=none"], "static": ["runtime.rule=none"], "both": []}
COLUMNS = ("method", "ipc", "kept", "runtime", "top-1 %", "n", "random real, top-1 %", "distill, s")


def main() -> None:
    options = _options()
    base = [f"run.dir={options.out / 'shared'}", "cluster.address=none", *options.set]
    if not options.only_table:
        _run(configuration.load(options.base, base), ("ingest", "score"))
        for method in options.methods:
            for ipc in options.ipc:
                for level in options.levels:
                    _run(_row(options, base, method, ipc, level), ("ingest", "score", "select", "distill", "evaluate"))
    print(_table(options.out))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all rows")
    parser.add_argument("--only-table", action="store_true")
    return parser.parse_args()


def _row(options: argparse.Namespace, base: list[str], method: str, ipc: int, level: str) -> Config:
    chosen = [f"distill.method={method}", f"distill.ipc={ipc}", *SCHEDULES[method].get(ipc, []), *LEVELS[level]]
    folder = options.out / f"{method}-ipc{ipc}-{level}"
    overrides = [*base, *chosen, f"run.dir={folder}", f"run.reuse={options.out / 'shared'}"]
    return configuration.load(options.base, overrides)


def _run(config: Config, stages: tuple[str, ...]) -> None:
    Pipeline(config, LocalExecutor, Display()).run(stages)


def _table(out: Path) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for path in sorted(out.glob("*/evaluation.json")):
        built = {row["set"]: row for row in json.loads(path.read_text(encoding="utf-8"))["summary"]}
        record = {
            s: json.loads((path.parent / "stages" / f"{s}.json").read_text(encoding="utf-8"))
            for s in ("select", "distill")
        }
        card = json.loads((path.parent / "synthetic" / "card.json").read_text(encoding="utf-8"))
        runtime = card["runtime"]
        rule = (
            runtime["rule"]
            if runtime["rule"] in ("none", "not applicable")
            else f"{runtime['rule']} {runtime['drop']:g}"
        )
        cells = [card["method"], card["images_per_class"], f"{record['select']['reached']:.2%}", rule]
        cells += [_accuracy(built["distilled"]), built["distilled"]["n"], _accuracy(built["random_real"])]
        lines.append("| " + " | ".join(map(str, [*cells, f"{record['distill']['seconds']:.0f}"])) + " |")
    return "\n".join(lines)


def _accuracy(row: dict[str, float]) -> str:
    std = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return f"{100 * row['mean']:.1f}{std}"


SCHEDULES: dict[str, dict[int, list[str]]] = {
    "dc": {1: ["distill.steps=150"], 10: ["distill.steps=8", "distill.dc.outer=10", "distill.dc.inner=10"]},
    "dsa": {1: ["distill.steps=150"], 10: ["distill.steps=8", "distill.dsa.outer=10", "distill.dsa.inner=10"]},
    "dm": {1: ["distill.steps=400"], 10: ["distill.steps=400"]},
    "idc": {1: ["distill.steps=12"], 10: ["distill.steps=8"]},
    "mtt": {1: ["distill.steps=200"], 10: ["distill.steps=60"]},
    "tesla": {1: ["distill.steps=200"], 10: ["distill.steps=60"]},
    "pca": {},
    "coreset": {},
}

if __name__ == "__main__":
    main()

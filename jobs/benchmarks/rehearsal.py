"""A full-size rehearsal: ImageNet-1K's number of samples through ingest, score and select, with the peak memory of all
processes.

    python jobs/benchmarks/rehearsal.py [--folder DIR] [--share 1] [--actors 2] [--width 16]

Runs `made_up:ImageNetSized` (1,281,167 images of 16 x 16, 1000 classes) through the product's own pipeline on Ray: a proxy of
width 16 trained on a tenth of every class for two epochs, its two checkpoints over all images, then the selection of 10 %. A
second process samples the memory of all processes ten times per second. `--share 0.1` is the same with a tenth of the
samples: comparing both peaks shows whether memory is bounded. Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from peaks import Watch, show_peaks

from distill_at_scale.cluster.executor import RayExecutor
from distill_at_scale.config.load import Config, validate
from distill_at_scale.core.environment import environment
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.pipeline import Pipeline

STAGES = ("ingest", "score", "select")


def main() -> None:
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="rehearsal-"))
    config = _config(options, folder)
    began = time.perf_counter()
    seconds, peaks = _run(config)
    total = time.perf_counter() - began
    records = {stage: json.loads((folder / "stages" / f"{stage}.json").read_text(encoding="utf-8")) for stage in STAGES}
    _print(seconds, total, peaks)
    about = environment()
    facts = {"samples": records["select"]["of"], "kept": records["select"]["kept"], "seconds": seconds, "total": total,
             "train_seconds": records["score"]["train_seconds"], "score_seconds": records["score"]["score_seconds"],
             "peak_mb": peaks, "options": vars(options), "hardware": about["hardware"], "versions": about["versions"],
             "commit": about["commit"]}  # fmt: skip
    print(json.dumps(facts, indent=1))
    if not options.folder:
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="the run folder, kept; default: a temporary one")
    parser.add_argument("--share", type=float, default=1.0, help="of ImageNet-1K's cardinality")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument(
        "--proxy-share", type=float, default=0.1, help="of the training split that the proxy is trained on"
    )
    return parser.parse_args()


def _config(options: argparse.Namespace, folder: Path) -> Config:
    return validate({
        "run": {"dir": str(folder)},
        "data": {"source": "made_up:ImageNetSized", "path": str(options.share), "size": 16},
        "score": {"trials": 1, "epochs": 2, "width": options.width, "share": options.proxy_share,
                  "compile": "always"},
        "select": {"keep": 0.1},
        "cluster": {"actors": options.actors},
    })  # fmt: skip


def _run(config: Config) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds per stage, and peak megabytes per kind of process: the largest one, and all of that kind together."""
    display, seconds = Display(), {}
    watched = Watch()
    pipeline = Pipeline(config, lambda: RayExecutor(config, display.say), display)
    began = time.perf_counter()
    pipeline.executor  # noqa: B018 - the cluster starts here, apart from the stages
    seconds["start of Ray"] = round(time.perf_counter() - began, 1)
    pipeline.run(STAGES)
    for stage in STAGES:
        seconds[stage] = (pipeline.dir.record(stage) or {})["seconds"]
    return seconds, watched.peaks()


def _print(seconds: dict[str, float], total: float, peaks: dict[str, dict[str, float]]) -> None:
    print(f"\n{'stage':<44}{'seconds':>10}")
    for stage, value in [*seconds.items(), ("in all", round(total, 1))]:
        print(f"{stage:<44}{value:>10.1f}")
    show_peaks(peaks)


if __name__ == "__main__":
    main()

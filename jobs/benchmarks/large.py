"""The paper's large rows on synthetic data of all their classes: `validate`, `plan` and three steps, with peak memory.

    python jobs/benchmarks/large.py [NAME ...] [--width 8] [--each 0] [--folder DIR] [--ray] [section.key=value ...]

NAME is one of the five configurations (default: all). The data has the layout that the configuration names (ImageNet's
folders with small JPEGs; Kinetics' CSV files and small mp4 files) and its 1000 or 400 classes with `--each` samples per class
(at least as many as images per class). Overrides keep a run to minutes on two cores and are printed: three steps, narrow
networks, one short trial, one evaluation of one epoch. `--width 128` is the real network, for a machine with a GPU. Ends with
one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import av
import numpy as np
from peaks import Watch, show_peaks
from PIL import Image

from distill_at_scale import make_executor
from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import environment
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.storage.run_dir import STAGES

NAMES = ("imagenet1k_dc_ipc1", "imagenet1k_dm_ipc10", "imagenet1k_dm_ipc50", "kinetics400_dm_ipc1",
         "kinetics400_dm_ipc10")  # fmt: skip
LEAST = 4  # samples of a class
DISTINCT = 32  # different files; the others repeat them
FIGURES = dict[str, Any]


def main() -> None:
    options = _options()
    for name in options.names:
        with tempfile.TemporaryDirectory(prefix="large-", dir=options.folder) as folder:
            _row(name, options, Path(folder))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help=f"of {', '.join(NAMES)}, and overrides section.key=value")
    parser.add_argument("--width", type=int, default=8, help="of the networks; the configurations have 128")
    parser.add_argument("--each", type=int, default=0, help="training samples of a class, at least")
    parser.add_argument("--folder", help="folder for the synthetic sets and runs")
    parser.add_argument("--ray", action="store_true", help="run on a local Ray, not in this process")
    parser.add_argument("--without-plan", action="store_true")
    options = parser.parse_args()
    options.overrides = [word for word in options.words if "=" in word]
    options.names = [word for word in options.words if "=" not in word] or list(NAMES)
    return options


def _row(name: str, options: argparse.Namespace, folder: Path) -> None:
    config, overrides = _config(name, options, folder)
    each = max(LEAST, options.each, config.distill.ipc)
    print(f"\n=== {name}: {each} samples of a class; {' '.join(overrides)}", flush=True)
    make = make_clips if config.data.frames else make_images
    make(folder / "data", 400 if config.data.frames else 1000, each)
    display = Display()
    pipeline = Pipeline(config, lambda: make_executor(config, display), display)
    phases: dict[str, Callable[[], Any]] = {"validate": pipeline.validate}
    if not options.without_plan:
        phases["plan"] = lambda: display.console.print(plans.table(config, pipeline.forecast()))
    phases |= {stage: _stage(config, stage, display) for stage in STAGES}
    result = {phase: _watched(work) for phase, work in phases.items()}
    for phase, figures in result.items():
        show_peaks({f"{phase}, {figures['seconds']} s: {kind}": peak for kind, peak in figures["peak_mb"].items()})
    about = environment()
    print(json.dumps({"configuration": name, "each": each, "overrides": overrides, "phases": result,
                      "hardware": about["hardware"], "commit": about["commit"]}))  # fmt: skip


def _config(name: str, options: argparse.Namespace, folder: Path) -> tuple[Config, list[str]]:
    """The row, as it is but for what is printed."""
    overrides = ["distill.steps=3", f"distill.width={options.width}", f"score.width={options.width}", "score.trials=1",
                 "score.epochs=1", "evaluate.seeds=1", "evaluate.epochs=1", *options.overrides]  # fmt: skip
    places = [f"data.path={folder / 'data'}", f"run.dir={folder / 'run'}"]
    places += [] if options.ray else ["cluster.address=none"]
    return configuration.load(ROOT / "configs" / f"{name}.yaml", [*overrides, *places]), overrides


def _stage(config: Config, stage: str, display: Display) -> Callable[[], None]:
    """A stage by itself, as the command runs it."""
    return lambda: Pipeline(config, lambda: make_executor(config, display), display).run((stage,))


def _watched(work: Callable[[], Any]) -> FIGURES:
    """Seconds and peak megabytes by kind of process."""
    watch, began = Watch(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), "peak_mb": watch.peaks()}


def make_images(root: Path, classes: int, each: int) -> None:
    """ImageNet as it is unpacked: `each` small JPEGs in every class folder of train/, one in every folder of val/."""
    files = [_jpeg(k) for k in range(DISTINCT)]
    for label in range(classes):
        wnid = f"n{label:08d}"
        for split, count in (("train", each), ("val", 1)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for k in range(count):
                (folder / f"{wnid}_{k}.JPEG").write_bytes(files[(label + k) % DISTINCT])


def make_clips(root: Path, classes: int, each: int) -> None:
    """Kinetics as downloaded: `<split>/<label>/<id>_<start>_<end>.mp4`, and the official lists beside them."""
    files = [_mp4(k) for k in range(DISTINCT)]
    for split, count in (("train", each), ("val", 1)):
        lines = ["label,youtube_id,time_start,time_end,split"]
        for label in range(classes):
            folder = root / split / f"class {label:03d}"
            folder.mkdir(parents=True)
            for k in range(count):
                name = f"{split[:1]}{label:05d}{k:05d}"  # eleven letters, as identifiers have
                lines.append(f"class {label:03d},{name},0,10,{split}")
                (folder / f"{name}_000000_000010.mp4").write_bytes(files[(label + k) % DISTINCT])
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_picture(seed, 0, 96, 80)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _mp4(seed: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for shift in range(12):
            picture = av.VideoFrame.from_ndarray(_picture(seed, 4 * shift, 96, 80), format="rgb24")
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return buffer.getvalue()


def _picture(seed: int, shift: int, width: int, height: int) -> np.ndarray[Any, Any]:
    """uint8 [height, width, 3]: a coarse random pattern, moved to the right."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return np.roll(coarse.repeat(16, 0).repeat(16, 1), shift, axis=1)


if __name__ == "__main__":
    main()

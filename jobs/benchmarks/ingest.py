"""Ingest on Ray against bare decoding and resizing, in images per second of the same files.

    python jobs/benchmarks/ingest.py --path IMAGEFOLDER [--size 64] [--copies 40] [--large 500x375] [--rounds 2]

IMAGEFOLDER holds `train/<class>/*.JPEG`. Its files are linked `copies` times, so that a measurement takes at least a minute;
`--large` scales them up first (JPEG, quality 90). The yardstick is one plain process per core that reads, decodes and resizes
files and drops the pixels. Our row is the product's ingest with one actor per core, from its first to its last part file;
both take turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from side_by_side import Clock, image_options, roof, show

from distill_at_scale.config.load import Config, validate


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="ingest-"))
    try:
        files = _inputs(options, folder / "images")
        config = validate({
            "data": {"source": "imagefolder", "path": str(folder / "images"), "size": options.size},
            "cluster": {"actors": options.cores},
        })  # fmt: skip
        roofs, ours, seconds, merged = [], [], [], []
        for number in range(options.rounds):
            roofs.append(roof(decode_alone, options.cores, files, options.size))
            clock, merging = _ingest(config, folder / f"pieces-{number}", options.cores)
            ours.append(clock.rate)
            seconds.append(clock.seconds)
            merged.append(len(files) / merging)
        base = statistics.fmean(roofs)
        rows = [(f"roof: decode and resize in {options.cores} plain processes", base, None),
                ("ingest on Ray, pieces published", statistics.fmean(ours), statistics.fmean(ours) / base),
                ("the merge into shards that follows, one thread", statistics.fmean(merged), None)]  # fmt: skip
        show(f"images to {options.size} x {options.size}", rows, {
            "images": len(files), "roofs": roofs, "ours": ours, "seconds": seconds, "options": vars(options),
        })  # fmt: skip
    finally:
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = image_options(__doc__)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--large", help="WIDTHxHEIGHT to scale the images up to first")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def _inputs(options: argparse.Namespace, folder: Path) -> list[str]:
    result = []
    for path in sorted(Path(options.path, "train").rglob("*.*")):
        source = _enlarged(path, options.large, folder.parent / "large") if options.large else path.resolve()
        for copy in range(options.copies):
            link = folder / "train" / path.parent.name / f"{copy:03d}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
            result.append(str(link))
    return result


def _enlarged(path: Path, size: str, folder: Path) -> Path:
    from PIL import Image

    width, height = map(int, size.split("x"))
    target = folder / path.parent.name / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(target, "JPEG", quality=90)
    return target


def decode_alone(core: int, cores: int, ready: Callable[[], None], files: list[str], size: int) -> int:
    from distill_at_scale.data.codecs.image import ImageDecoder

    decoder, own = ImageDecoder(size), files[core::cores]
    ready()
    for file in own:
        decoder(Path(file).read_bytes())
    return len(own)


def _ingest(config: Config, pieces: Path, actors: int) -> tuple[Clock, float]:
    """The clock of the decoding, and the seconds of the merge after it."""
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.data.ingest import plan as ingest
    from distill_at_scale.data.ingest.merge import merge
    from distill_at_scale.pipeline.executors import tasks

    pieces.mkdir()
    executor, clock = RayExecutor(config, lambda text: None), Clock(warm=2 * actors)
    plan = ingest.plan(config).on_disk(pieces)
    try:
        tasks.ingest(executor, config, plan, pieces, clock)
    finally:
        executor.close()
    began = time.perf_counter()
    merge(plan, pieces, pieces / "out" / "prepared", config.data)
    merging = time.perf_counter() - began
    shutil.rmtree(pieces)
    return clock, merging


if __name__ == "__main__":
    main()

"""Ingest and scoring of clips on Ray against plain decord processes and bare forward passes, with the memory of all processes.

    python jobs/benchmarks/clips.py --path VIDEOFOLDER [--size 64] [--frames 8] [--copies 30] [--rows ingest,scoring]

VIDEOFOLDER holds videos in class folders, for example Kinetics' `val`. Its files are linked `copies` times, so that a
measurement takes at least a minute. Ingest: the yardstick is one plain process per core that decodes the same frames with
decord in one thread and resizes them. Scoring: shards of clips of these videos (windows at random places, all different), a
ConvNet3D with 1 and with 10 checkpoints, against its compiled forward pass on clips in memory. Our rows run in steady state
with one actor per core. The last table is a projection for Kinetics-400.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np
from peaks import Watch, show_peaks
from scoring import MANY, forward_alone, ours, write_checkpoints
from side_by_side import Clock, Row, roof, show

from distill_at_scale.config.load import validate
from distill_at_scale.data.prepared.format import group_rows, schema, to_table, write_meta, write_shards
from distill_at_scale.models.spec import NetworkSpec

ENDINGS = (".mp4", ".webm", ".mkv", ".avi")
CLASSES, CHUNK = 8, 64  # of the shards that are scored; the product takes larger units of clips this small
KINETICS, CHECKPOINTS = 240_000, 25  # clips; trials x epochs


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="clips-"))
    try:
        rows: list[Row] = []
        for part in options.rows.split(","):
            rows += {"ingest": _ingest_rows, "scoring": _scoring_rows}[part](options, folder)
        show(f"clips of {options.frames} frames, {options.size} x {options.size}", rows, {"options": vars(options)})
        _project(rows, options)
    finally:
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", required=True, help="a folder with <class>/<video>")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--copies", type=int, default=30)
    parser.add_argument("--chunk", type=int, default=8, help="clips per unit of ingest work")
    parser.add_argument("--seek", choices=("exact", "fast"), default="exact")
    parser.add_argument("--decoder", choices=("auto", "decord", "pyav"), default="auto")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--network", default="convnet3d")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument(
        "--samples", type=int, default=30_000, help="clips scored with one checkpoint; a tenth with ten"
    )
    parser.add_argument("--held", type=int, default=2_000, help="clips in the shards that are scored again and again")
    parser.add_argument("--rows", default="ingest,scoring")
    parser.add_argument("--gpu-rate", type=float, default=3_000, help="clips/s a GPU scores: an assumption")
    return parser.parse_args()


def _videos(path: str) -> list[Path]:
    return sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in ENDINGS)


def _ingest_rows(options: argparse.Namespace, folder: Path) -> list[Row]:
    files = []
    for number, source in enumerate(_videos(options.path)):
        for copy in range(options.copies):
            link = folder / "videos" / "train" / source.parent.name / f"{copy:05d}-{number:05d}{source.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.resolve())
            files.append(str(link))
    files.sort(key=lambda file: Path(file).name)  # all cores get of every video
    base = roof(decode_alone, options.cores, files, options.frames, options.size)
    print(f"plain decord processes: {base:.2f} clips/s", flush=True)
    rate = _ingest(options, folder)
    return [(f"roof: decord alone in {options.cores} plain processes", round(base, 2), None),
            (f"ingest on Ray, pieces published ({options.decoder}, {options.seek})", round(rate, 2), rate / base)]  # fmt: skip


def decode_alone(core: int, cores: int, ready: Callable[[], None], files: list[str], frames: int, size: int) -> int:
    import decord

    own = files[core::cores]
    ready()
    for file in own:
        reader = decord.VideoReader(io.BytesIO(Path(file).read_bytes()), num_threads=1, width=size, height=size)
        reader.get_batch([int((i + 0.5) * len(reader) / frames) for i in range(frames)]).asnumpy()
    return len(own)


def _ingest(options: argparse.Namespace, folder: Path) -> float:
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.data.ingest import plan as ingest
    from distill_at_scale.pipeline.executors import tasks

    config = validate({
        "data": {"source": "videofolder", "path": str(folder / "videos"), "size": options.size, "frames": options.frames,
                 "chunk": options.chunk, "seek": options.seek, "decoder": options.decoder},
        "cluster": {"actors": options.cores},
    })  # fmt: skip
    pieces, watched = folder / "pieces", Watch()
    pieces.mkdir()
    executor, clock = RayExecutor(config, lambda text: None), Clock(warm=2 * options.cores)
    plan = ingest.plan(config).on_disk(pieces)
    try:
        tasks.ingest(executor, config, plan, pieces, clock)
    finally:
        executor.close()
    print(f"ingest: {plan.samples} clips, steady state of {clock.seconds:.0f} s, {clock.rate:.2f} clips/s", flush=True)
    show_peaks(watched.peaks())
    return clock.rate


def _scoring_rows(options: argparse.Namespace, folder: Path) -> list[Row]:
    prepared = _shards(options, folder)
    shape = (options.frames, 3, options.size, options.size)
    write_checkpoints(folder / "proxies", NetworkSpec(options.network, shape, CLASSES, options.width))
    rows: list[Row] = []
    for count in (1, MANY):
        samples = options.samples // count
        base = roof(
            forward_alone, options.cores, str(prepared), str(folder / "proxies"), options.network, options.width, count,
            samples,
        )  # fmt: skip
        rate = ours(options, folder, prepared, count, samples, options.cores)
        name = f"{options.network} of width {options.width}, {count} checkpoint{'s' * (count > 1)}"
        print(f"{name}: roof {base:.1f}, ours {rate:.1f} clips/s", flush=True)
        rows += [(f"roof: compiled forward alone, {name}", round(base, 1), None),
                 (f"ours: scoring from shards, {name}", round(rate, 1), rate / base)]  # fmt: skip
    return rows


def _shards(options: argparse.Namespace, folder: Path) -> Path:
    import decord

    rng, videos, shape = np.random.default_rng(0), [], (options.frames, 3, options.size, options.size)
    for file in _videos(options.path)[:16]:
        reader = decord.VideoReader(str(file), num_threads=1, width=options.size, height=options.size)
        videos.append(reader.get_batch(range(len(reader))).asnumpy().transpose(0, 3, 1, 2))
    each, tables = options.held // CLASSES, []
    for label in range(CLASSES):
        clips = np.empty((each, *shape), np.uint8)
        for i in range(each):
            video = videos[int(rng.integers(len(videos)))]
            first, step = (
                int(rng.integers(len(video) // 2)),
                int(rng.integers(1, len(video) // 2 // options.frames + 1)),
            )
            clips[i] = video[first : first + step * options.frames : step]
        tables.append(to_table([f"{label}/{i:05d}" for i in range(each)], [label] * each, clips))
    prepared = folder / "prepared"
    write_shards(prepared / "train", tables, schema(shape), group_rows(shape, False, CHUNK))
    names = [str(label) for label in range(CLASSES)]
    facts = {
        "mean": [0.45] * 3,
        "std": [0.25] * 3,
        "chunk": CHUNK,
        "counts": {"train": [each] * CLASSES},
    }
    write_meta(prepared, {"class_names": names, "shape": list(shape), **facts}, "benchmark")
    return prepared


def _project(rows: list[Row], options: argparse.Namespace) -> None:
    """For all clips of Kinetics-400: what was measured here, times their number."""
    size = KINETICS * options.frames * 3 * options.size**2
    print(f"\nprojected for {KINETICS:,} clips: {size / 1e9:.1f} GB of raw shards")
    for name, rate, _ in rows:
        if name.startswith("ingest"):
            print(f"  ingest: {KINETICS * options.cores / rate / 3600:.1f} core-hours, {8 * 16} cores take "
                  f"{KINETICS * options.cores / rate / 3600 / 128 * 60:.0f} minutes")  # fmt: skip
        if name.startswith("ours") and f"{MANY} " in name:
            hours = KINETICS * CHECKPOINTS / (rate * MANY) / 3600
            print(f"  scoring with {CHECKPOINTS} checkpoints: {hours * options.cores:.1f} core-hours on CPUs")
    print(f"  scoring at {options.gpu_rate:g} clips/s and checkpoint a GPU (assumed): "
          f"{KINETICS * CHECKPOINTS / options.gpu_rate / 3600:.2f} GPU-hours")  # fmt: skip


if __name__ == "__main__":
    main()

"""How fast and how exactly one core decodes clips by decoder and mode; threads against processes; memory leaks.

    python jobs/benchmarks/video.py --path FOLDER [--clips 8] [--frames 8] [--size 64] [--rounds 3] [--json FILE]
    python jobs/benchmarks/video.py --leak N [--path FOLDER] [--decoder decord]

FOLDER holds videos at any depth; `--clips` of them are used, evenly spread over the sorted names. One core: clips per second
of CPU time of this process, one thread, the median over rounds in which all rows take turns. `offset` is the mean distance
between returned and wanted frames, in frames; `psnr` compares with PyAV's plain decode of every frame (dB, mean and worst
clip, 78 if equal). The rows below "fast" were tried and not adopted.

Two cores: clips per wall second, so keep the machine idle. `product` goes through ClipDecoder and its child process. `--leak`
decodes N clips with one ClipDecoder (the files of FOLDER in turn, or small clips encoded here) and prints the memory of its
child and of this process after a tenth of them and after all.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from side_by_side import columns

from distill_at_scale.core.environment import environment
from distill_at_scale.data.codecs.clip import ClipDecoder
from distill_at_scale.data.codecs.video_decoders import decord_frames, pyav_frames
from distill_at_scale.data.codecs.video_probe import open_video

Array = np.ndarray[Any, Any]
Decode = Callable[[bytes, int, int], tuple[Array, float]]  # file, T, size -> uint8 [T, size, size, 3], offset
Row = dict[str, Any]

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv")
LIMITS = (100_000_000, 600.0)  # of pixels and seconds


def main() -> None:
    options = _options()
    raws = _files(options.path, options.clips) if options.path else _small()
    tables = {"memory, MB": _leak(raws, options)} if options.leak else _speed(raws, options)
    for title, rows in tables.items():
        print(columns(title, rows))
    about = environment()
    result = {"tables": tables, "av": av.__version__, "hardware": about["hardware"], "commit": about["commit"]}
    if options.json is not None:
        options.json.writecolumns(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="a folder with videos, at any depth")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--leak", type=int, help="number of clips to decode with one ClipDecoder; prints memory")
    parser.add_argument("--decoder", choices=["decord", "pyav"], default="decord", help="with --leak")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    if not options.path and not options.leak:
        parser.error("--path FOLDER is needed, but with --leak")
    return options


def _files(folder: Path, count: int) -> list[bytes]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"--path {folder}: no file ends in {', '.join(SUFFIXES)}; name a folder that holds videos")
    return [paths[i * len(paths) // min(count, len(paths))].read_bytes() for i in range(min(count, len(paths)))]


def _small(count: int = 20) -> list[bytes]:
    """Clips of 30 frames, 64 x 48, of a moving square."""
    return [_encoded(np.random.default_rng(i)) for i in range(count)]


def _encoded(generator: np.random.Generator) -> bytes:
    buffer, (x, y) = io.BytesIO(), generator.integers(0, 16, 2)
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[y : y + 16, x + i : x + i + 16] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


# One core


def _decoders() -> dict[str, Decode]:
    """The first is the reference."""
    return {
        "PyAV, plain": _nearest("DEFAULT"),
        "decord, get_batch": _get_batch,
        "decord, product": _product(decord_frames, False),
        "PyAV, product": _product(pyav_frames, False),
        "PyAV, fast": _product(pyav_frames, True),
        "no loop filter, plain": _nearest("DEFAULT", skip_loop_filter="all"),
        "reference frames": _nearest("NONREF"),
        "reference, no loop filter": _nearest("NONREF", skip_loop_filter="all"),
        "no B-frames": _nearest("BIDIR"),
        "key frames": _nearest("NONKEY"),
    }


def _uniform(n: int, count: int) -> list[int]:
    return [int((i + 0.5) * n / count) for i in range(count)]


def _product(decoder: Any, fast: bool) -> Decode:
    def decode(raw: bytes, count: int, size: int) -> tuple[Array, float]:
        with open_video(raw, *LIMITS) as video:
            return decoder(video, _uniform(video.frames, count), size, "square", fast), 0.0

    return decode


def _get_batch(raw: bytes, count: int, size: int, threads: int = 1) -> tuple[Array, float]:
    import decord

    reader = decord.VideoReader(io.BytesIO(raw), width=size, height=size, num_threads=threads)
    return reader.get_batch(_uniform(len(reader), count)).asnumpy(), 0.0


def _nearest(skip: str, threads: int = 1, **settings: str) -> Decode:
    """Sequential decode; of the frames that are not skipped those nearest to the wanted ones."""

    def decode(raw: bytes, count: int, size: int) -> tuple[Array, float]:
        with av.open(io.BytesIO(raw)) as container:
            stream = container.streams.best("video")
            context, n = stream.codec_context, stream.frames
            context.thread_count, context.thread_type = threads, "FRAME"
            context.options, context.skip_frame = settings, skip
            step, origin = float(1 / stream.average_rate / stream.time_base), stream.start_time or 0
            best: list[tuple[float, Any]] = [(math.inf, None)] * count
            for frame in container.decode(stream):
                place = (frame.pts - origin) / step
                for i, wanted in enumerate(_uniform(n, count)):
                    if abs(place - wanted) < best[i][0]:
                        best[i] = (abs(place - wanted), frame)
            scale = {"width": size, "height": size, "format": "rgb24", "interpolation": "BILINEAR", "threads": 1}
            pixels = [frame.reformat(**scale).to_ndarray() for _, frame in best]
        return np.stack(pixels), statistics.fmean(distance for distance, _ in best)

    return decode


def _one_core(raws: list[bytes], options: argparse.Namespace) -> list[Row]:
    decoders, seconds = _decoders(), {}
    results = {name: [decode(raw, options.frames, options.size) for raw in raws] for name, decode in decoders.items()}
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(options.rounds):
        for name, decode in decoders.items():
            began = time.process_time()
            for raw in raws:
                decode(raw, options.frames, options.size)
            taken[name].append(time.process_time() - began)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    reference = next(iter(results.values()))
    return [
        {"decoder": name, "clips/s": round(len(raws) / seconds[name], 2),
         "to decord": round(seconds["decord, get_batch"] / seconds[name], 2),
         "offset": round(statistics.fmean(offset for _, offset in results[name]), 2),
         **_difference([pixels for pixels, _ in results[name]], [pixels for pixels, _ in reference])}
        for name in decoders
    ]  # fmt: skip


def _difference(result: list[Array], wanted: list[Array]) -> Row:
    gaps = [a.astype(np.float64) - b for a, b in zip(result, wanted, strict=True)]
    ratios = [10 * math.log10(255**2 / max(float((gap**2).mean()), 1e-3)) for gap in gaps]  # 1e-3: at most 78 dB
    return {"psnr": round(statistics.fmean(ratios), 1), "worst psnr": round(min(ratios), 1)}


# Two cores


def _speed(raws: list[bytes], options: argparse.Namespace) -> dict[str, list[Row]]:
    title = f"{len(raws)} clips to {options.frames} frames of {options.size} x {options.size}"
    return {f"{title}, one core": _one_core(raws, options), f"{title}, the clock": _two_cores(raws, options)}


def _two_cores(raws: list[bytes], options: argparse.Namespace) -> list[Row]:
    ways = [("decord", 1, 1), ("decord", 2, 1), ("decord", 1, 2), ("PyAV", 1, 1), ("PyAV", 2, 1), ("PyAV", 1, 2),
            ("decord, product", 1, 1), ("PyAV, product", 1, 1), ("PyAV fast, product", 1, 1),
            ("decord, product", 1, 2), ("PyAV, product", 1, 2), ("PyAV fast, product", 1, 2)]  # fmt: skip
    return [
        {"decoder": name, "threads": threads, "processes": processes,
         "clips/s": round(_rate(name, threads, processes, raws, options), 2)}
        for name, threads, processes in ways
    ]  # fmt: skip


def _rate(name: str, threads: int, processes: int, raws: list[bytes], options: argparse.Namespace) -> float:
    """Clips per second of the slower process, times how many there are; each decodes all files `rounds` times."""
    work = (name, threads, raws, options.frames, options.size, options.rounds)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        seconds = pool.map(_work, [work] * processes, chunksize=1)
    return processes * len(raws) * options.rounds / max(seconds)


def _work(of: tuple[str, int, list[bytes], int, int, int]) -> float:
    name, threads, raws, frames, size, rounds = of
    decode = _way(name, threads, frames, size)
    decode(raws[0])
    began = time.perf_counter()
    for _ in range(rounds):
        for raw in raws:
            decode(raw)
    return time.perf_counter() - began


def _way(name: str, threads: int, frames: int, size: int) -> Callable[[bytes], Any]:
    if name.endswith("product"):
        seek = "fast" if "fast" in name else "exact"
        decoder = ClipDecoder(frames, size, 3, decoders=(name.split()[0].strip(",").lower(),), seek=seek)
        return lambda raw: decoder("clip", raw)
    if name == "decord":
        return lambda raw: _get_batch(raw, frames, size, threads)
    plain = _nearest("DEFAULT", threads)
    return lambda raw: plain(raw, frames, size)


# Memory


def _leak(raws: list[bytes], options: argparse.Namespace) -> list[Row]:
    decoder = ClipDecoder(options.frames, options.size, 3, decoders=(options.decoder,))
    rows, began = [], time.perf_counter()
    for i in range(1, options.leak + 1):
        decoder("clip", raws[i % len(raws)])
        if i in (max(1, options.leak // 10), options.leak // 2, options.leak):
            rows.append({"decodes": i, "child": _resident(decoder.child.pid), "this process": _resident("self"),
                         "seconds": round(time.perf_counter() - began, 1)})  # fmt: skip
    return rows


def _resident(process: int | str | None) -> float:
    text = Path(f"/proc/{process}/status").readcolumns()
    return round(int(text.split("VmRSS:")[1].split()[0]) / 1024, 1)


if __name__ == "__main__":
    main()

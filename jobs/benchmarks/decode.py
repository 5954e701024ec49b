"""How fast and how exactly one core decodes JPEGs to a small size, and what compressed storage of 224 x 224 images costs.

    python jobs/benchmarks/decode.py --path FOLDER [--images 60] [--rounds 5] [--sizes 64 128 224] [--json FILE]

FOLDER holds images at any depth; `--images` of them are used, evenly spread over the sorted names. Decoding is measured on
the files and on 500 x 375 JPEGs (quality 90) made from them in memory. The stored form is measured on the images at
`--stored` pixels and on mosaics of four such images at half that width: coding files a second time on the same JPEG grid
looks better than it is, and the mosaics have the detail of large photos scaled down.

Rates are images per second of CPU time of this process, one thread, the median over rounds in which all rows take turns.
Differences are to Pillow's full decode with antialiased bicubic resize (`mad`: mean absolute difference in levels of 255;
`psnr`: dB, mean and worst image, 78 if equal). Prints text tables, and one JSON object with hardware and versions.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image
from side_by_side import columns
from torchvision.transforms.v2 import functional as transforms

from distill_at_scale.core.environment import environment
from distill_at_scale.data.codecs.image import ImageDecoder, decode_stored, encode

Array = np.ndarray[Any, Any]
Decode = Callable[[bytes, int, str], Array]  # encoded image, size, "square" or "crop" -> uint8 [3, size, size]
Row = dict[str, Any]

LARGE, LARGE_QUALITY = (500, 375), 90
IMAGENET = 1_281_167
SUFFIXES = (".jpeg", ".jpg", ".png")


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    raws = _files(options.path, options.images)
    tables = {**_decoding(raws, options), **_storing(raws, options), "tiny images, 16 x 16": _tiny()}
    for title, rows in tables.items():
        print(columns(title, rows))
    about = environment()
    versions = {**about["versions"], "simplejpeg": simplejpeg.__version__}
    result = json.dumps({"images": len(raws), "rounds": options.rounds, "tables": tables,
                         "hardware": about["hardware"], "versions": versions, "commit": about["commit"]}, indent=1)  # fmt: skip
    if options.json is None:
        print(result)
    else:
        options.json.writecolumns(result + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True, help="a folder with JPEG (or PNG) files, at any depth")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
    parser.add_argument("--stored", type=int, default=224, help="width and height of the stored form")
    parser.add_argument("--json", type=Path, help="write the JSON there instead of printing it")
    return parser.parse_args()


def _files(folder: Path, count: int) -> list[bytes]:
    """`count` images as RGB JPEGs: JPEG files as they are, others coded at quality 95."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"--path {folder}: no file ends in {', '.join(SUFFIXES)}; name a folder that holds images")
    chosen = [paths[i * len(paths) // min(count, len(paths))] for i in range(min(count, len(paths)))]
    return [p.read_bytes() if p.suffix.lower() != ".png" else _jpeg(Image.open(p), 95) for p in chosen]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# Decoding to a small size


def _decoding(raws: list[bytes], options: argparse.Namespace) -> dict[str, list[Row]]:
    large = [_jpeg(Image.open(io.BytesIO(raw)).resize(LARGE, Image.Resampling.BICUBIC), LARGE_QUALITY) for raw in raws]
    width, height = Image.open(io.BytesIO(raws[0])).size
    sources = {f"files as they are (the first: {width} x {height})": raws, f"{LARGE[0]} x {LARGE[1]}": large}
    return {
        f"{name}, {sum(map(len, data)) / len(data) / 1000:.1f} KB each, to {size}, {mode}": _compare(
            data, size, mode, options.rounds
        )
        for name, data in sources.items()
        for size in options.sizes
        for mode in ("square", "crop")
    }


def _decoders() -> dict[str, Decode]:
    """The first is the reference."""
    return {
        "Pillow, full decode": _pillow(None),
        "Pillow, draft 2x, fraction ignored": _pillow(2, exact=False),
        **{f"Pillow, draft {factor}x": _pillow(factor) for factor in (2, 1.5, 1.25, 1)},
        "simplejpeg, full decode": _simplejpeg(None, False),
        "simplejpeg, full, fastdct + fastupsample": _simplejpeg(None, True),
        **{f"simplejpeg, {factor}x": _simplejpeg(factor, False) for factor in (1.5, 1.25, 1)},
        "simplejpeg, 1.25x, fastdct + fastupsample": _simplejpeg(1.25, True),
        "torchvision, full decode, its resize": _torchvision,
        "ImageDecoder": lambda raw, size, mode: ImageDecoder(size, 3, mode)(raw),
    }


def _pillow(factor: float | None, exact: bool = True) -> Decode:
    def decode(raw: bytes, size: int, mode: str) -> Array:
        image = Image.open(io.BytesIO(raw), formats=("JPEG",))
        whole, least = image.size, math.ceil((factor or 0) * size)
        drafted = image.draft(None, (least, least)) if factor else None
        if not drafted or not exact:
            return _resized(image.convert("RGB"), image.size, 1, size, mode)
        return _resized(image.convert("RGB"), whole, whole[0] / drafted[1][2], size, mode)

    return decode


def _simplejpeg(factor: float | None, fast: bool) -> Decode:
    """Pillow reads the header (orientation, colour space), as any decoder of arbitrary files must."""

    def decode(raw: bytes, size: int, mode: str) -> Array:
        header = Image.open(io.BytesIO(raw), formats=("JPEG",))
        header.getexif()
        width, height = header.size
        eighths = min(8, max(1, math.ceil(8 * factor * size / min(width, height)))) if factor else 8
        least = [math.ceil(n * eighths / 8) for n in (height, width)]
        pixels = simplejpeg.decode_jpeg(
            raw, "RGB", fastdct=fast, fastupsample=fast, min_height=least[0], min_width=least[1]
        )
        return _resized(Image.fromarray(pixels), header.size, 8 / eighths, size, mode)

    return decode


def _torchvision(raw: bytes, size: int, mode: str) -> Array:
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
    if mode == "crop":
        image = transforms.center_crop(image, [min(image.shape[1:])] * 2)
    return transforms.resize(image, [size, size], transforms.InterpolationMode.BICUBIC, antialias=True).numpy()


def _resized(image: Image.Image, whole: tuple[int, int], scale: float, size: int, mode: str) -> Array:
    """`image` is the `scale` times smaller form of an image of `whole` (width, height) pixels."""
    left = top = 0
    right, bottom = whole
    if mode == "crop":
        side = min(whole)
        left, top = (right - side) // 2, (bottom - side) // 2
        right, bottom = left + side, top + side
    box = (left / scale, top / scale, right / scale, bottom / scale)
    return np.ascontiguousarray(
        np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
    )


def _compare(raws: list[bytes], size: int, mode: str, rounds: int) -> list[Row]:
    decoders = _decoders()
    work = {
        name: (lambda decode=decode: [decode(raw, size, mode) for raw in raws]) for name, decode in decoders.items()
    }
    seconds, results = _measure(work, rounds)
    reference = next(iter(results.values()))
    return [
        {"decoder": name, "images/s": round(len(raws) / seconds[name]), **_difference(results[name], reference)}
        for name in work
    ]


# The stored form


def _storing(raws: list[bytes], options: argparse.Namespace) -> dict[str, list[Row]]:
    size, half = options.stored, ImageDecoder(options.stored // 2)
    whole = [ImageDecoder(size)(raw) for raw in raws]
    quarters = [half(raw) for raw in raws]
    mosaics = [_mosaic(quarters[i : i + 4]) for i in range(0, len(quarters) - 3, 4)]
    contents = {"images": whole, "mosaics of four halved images": mosaics}
    return {f"stored form, {size} x {size}, {k}": _forms(v, options.rounds) for k, v in contents.items() if v}


def _mosaic(four: Sequence[Array]) -> Array:
    return np.concatenate([np.concatenate(four[:2], 2), np.concatenate(four[2:], 2)], 1)


def _forms(images: list[Array], rounds: int) -> list[Row]:
    shape = images[0].shape
    forms: dict[str, tuple[Callable[[Array], bytes], Callable[[bytes], Array]]] = {
        f"encode, quality {quality}": (lambda p, q=quality: encode(p, q), lambda data: decode_stored(data, shape))
        for quality in (85, 90, 95)
    }
    for quality in (85, 90, 95):
        for sampling in ("444", "420"):
            saved = _save("JPEG", quality=quality, subsampling=f"4:{sampling[1]}:{sampling[2]}")
            forms[f"JPEG {quality}, {sampling}, Pillow"] = (saved, _load)
            forms[f"JPEG {quality}, {sampling}, simplejpeg"] = (
                lambda p, q=quality, s=sampling: simplejpeg.encode_jpeg(_rows(p), q, "RGB", s, fastdct=False),
                lambda data: decode_stored(data, shape),
            )
    for name, save in (("WebP 90", _save("WEBP", quality=90)), ("PNG", _save("PNG")),
                       ("WebP lossless", _save("WEBP", lossless=True, quality=20, method=0))):  # fmt: skip
        forms[name] = (save, _load)
    return [_form(name, images, *form, rounds) for name, form in forms.items()]


def _form(
    name: str, images: list[Array], code: Callable[[Array], bytes], load: Callable[[bytes], Array], rounds: int
) -> Row:
    data = [code(image) for image in images]
    work = {"encode": lambda: [code(image) for image in images], "decode": lambda: [load(d) for d in data]}
    seconds, results = _measure(work, rounds)
    size = sum(map(len, data)) / len(data)
    rates = {f"{what}, images/s": round(len(images) / seconds[what]) for what in work}
    return {"form": name, "KB": round(size / 1000, 1), "ImageNet-1K, GB": round(size * IMAGENET / 1e9, 1), **rates,
            **_difference(results["decode"], images)}  # fmt: skip


def _save(kind: str, **settings: Any) -> Callable[[Array], bytes]:
    def save(pixels: Array) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(_rows(pixels)).save(buffer, kind, **settings)
        return buffer.getvalue()

    return save


def _load(data: bytes) -> Array:
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1))


def _rows(pixels: Array) -> Array:
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


# Tiny images, measuring, and tables


def _tiny(size: int = 16, count: int = 2000) -> list[Row]:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    png, decode = _save("PNG")(pixels.transpose(2, 0, 1)), ImageDecoder(size)
    work = {
        name: (lambda raw=raw: [decode(raw) for _ in range(count)]) for name, raw in (("PNG", png), ("array", pixels))
    }
    seconds, _ = _measure(work, 3)
    return [{"sample": name, "microseconds": round(seconds[name] / count * 1e6, 1)} for name in work]


def _measure(work: dict[str, Callable[[], list[Any]]], rounds: int) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Median CPU seconds of each piece of work, rows in turn, one more round first that is not counted; what it returned."""
    results = {name: piece() for name, piece in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, piece in work.items():
            began = time.process_time()
            piece()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def _difference(result: list[Array], wanted: list[Array]) -> Row:
    gaps = [a.astype(np.float64) - b for a, b in zip(result, wanted, strict=True)]
    ratios = [10 * math.log10(255**2 / max(float((gap**2).mean()), 1e-3)) for gap in gaps]  # 1e-3: at most 78 dB
    mad = statistics.fmean(float(np.abs(gap).mean()) for gap in gaps)
    return {"mad": round(mad, 2), "psnr": round(statistics.fmean(ratios), 1), "worst psnr": round(min(ratios), 1)}


if __name__ == "__main__":
    main()

"""A look at a few samples of a listing: their sizes, formats and lengths, and which of them are broken.

It takes seconds for any data set. `validate` reads every sample.
"""

from __future__ import annotations

import io
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.data.codecs.image import Array, ImageDecoder, SampleRejected
from distill_at_scale.data.codecs.worker_process import IsolatedFunction, WorkerDied
from distill_at_scale.data.ingest.sample_types import TensorDecoder
from distill_at_scale.data.sources.base import Source

MOST = 100  # samples
RUN = 10  # samples that are read together from archives and tables, whose parts are read whole
MOST_SECONDS = 4.0  # of sounds, in a first run
SECONDS = 6.0  # after which the look ends
SIDE = 64  # to which pictures are decoded
PROBE = "distill_at_scale.data.codecs.clip_worker:probe_clip"
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


@dataclass
class Look:
    """What was seen; `sizes` are (width, height) in pixels."""

    count: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    grey: int = 0
    seconds: list[float] = field(default_factory=list)  # of clips
    frames: list[int] = field(default_factory=list)  # of clips
    shape: tuple[int, ...] = ()  # of tensors
    broken: list[tuple[str, str]] = field(default_factory=list)  # (sample id, reason)

    @property
    def all_grey(self) -> bool:
        return bool(self.sizes) and self.grey == len(self.sizes)

    @property
    def side(self) -> int | None:
        """The median of the shorter sides, in pixels."""
        return int(median(min(size) for size in self.sizes)) if self.sizes else None

    @property
    def square(self) -> bool:
        """Whether most pictures are square, within 5 %."""
        near = sum(0.95 <= width / height <= 1.05 for width, height in self.sizes)
        return 2 * near > len(self.sizes)

    def line(self) -> str:
        """One line for people."""
        parts = [f"looked at {self.count}"]
        if self.shape:
            parts.append(f"arrays of shape {list(self.shape)}")
        if self.sizes:
            parts.append(", ".join(name for name, _ in self.formats.most_common(3)))
            widths, heights = ([size[axis] for size in self.sizes] for axis in (0, 1))
            parts.append(f"{_span(widths)} × {_span(heights)} pixels")
            parts.append("grey" if self.all_grey else f"{self.grey} of them grey" if self.grey else "colour")
        if self.seconds:
            rates = [count / seconds for count, seconds in zip(self.frames, self.seconds, strict=True) if seconds]
            parts.append(f"{_span(self.seconds)} s, {_span(rates)} frames/s")
        first = f" ({self.broken[0][0]}: {self.broken[0][1]})" if self.broken else ""
        return ", ".join([*parts, f"{len(self.broken)} broken{first}" if self.broken else "none broken"])


def _span(values: list[int] | list[float]) -> str:
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def look(source: Source, data: DataSection, rows: pa.Table, seed: int) -> Look:
    """Read and check at most MOST samples of a listing, for at most about SECONDS."""
    seen, began = Look(), time.monotonic()
    check = _checker(source, data, seen)
    for part in _draw(rows, seed):
        try:
            samples: list[Any] = list(source.read(part))
        except OSError as error:
            samples = [error] * part.num_rows
        for sample_id, sample in zip(part["sample_id"].to_pylist(), samples, strict=True):
            seen.count += 1
            try:
                if isinstance(sample, Exception):
                    raise SampleRejected(getattr(sample, "strerror", None) or str(sample))
                check(sample)
            except SampleRejected as error:
                seen.broken.append((sample_id, str(error)))
        if time.monotonic() - began > SECONDS:
            break
    return seen


def sound_settings(source: Source, seed: int) -> dict[str, Any]:
    """Keys of the section `data` for sounds like those of `source`: their rate, and a length that nearly all have.

    A first run has 32 bands and at most MOST_SECONDS, so that it is fast. Empty if none of the files can be read.
    """
    import soundfile

    seconds, rates = list[float](), Counter[int]()
    for part in _draw(source.listing(source.splits()[0]), seed)[: MOST // 2]:
        try:
            for raw in source.files.read(part):  # type: ignore[attr-defined]
                header = soundfile.info(io.BytesIO(raw))
                seconds.append(header.duration)
                rates[header.samplerate] += 1
        except (soundfile.SoundFileError, OSError):
            continue
    if not seconds:
        return {}
    length = round(float(np.clip(np.quantile(seconds, 0.95), 0.2, MOST_SECONDS)), 1)
    return {"rate": min(16_000, max(4_000, rates.most_common(1)[0][0])), "seconds": length, "bands": 32}


def _draw(rows: pa.Table, seed: int) -> list[pa.Table]:
    """Samples to read, in parts: single files at random, or runs of consecutive samples where many share a file."""
    generator, count = rng.numpy_generator(seed, "init"), rows.num_rows
    size = 1 if rows["location"].combine_chunks().slice(0, MOST).value_counts().__len__() == min(count, MOST) else RUN
    starts = generator.permutation(-(-count // size))[: MOST // size] * size
    return [rows.slice(int(start), size) for start in starts]


def _checker(source: Source, data: DataSection, seen: Look) -> Callable[[Any], object]:
    """A function that notes the facts of one sample in `seen`, or raises SampleRejected."""
    if getattr(source, "tensors", False):
        seen.shape = tuple(source.shape)  # type: ignore[attr-defined]
        return TensorDecoder(seen.shape)
    if getattr(source, "clips", False):
        child = IsolatedFunction(PROBE)

        def check_clip(raw: bytes) -> None:
            try:
                header = {"max_pixels": data.max_pixels, "max_seconds": data.max_seconds}
                facts, _ = child.call(header, raw, data.time_limit)
            except WorkerDied as death:
                raise SampleRejected(f"the decoder {death}") from None
            if "rejected" in facts:
                raise SampleRejected(facts["rejected"])
            seen.sizes.append((facts["width"], facts["height"]))
            seen.formats[facts["codec"]] += 1
            seen.seconds.append(facts["seconds"])
            seen.frames.append(facts["frames"])

        return check_clip
    decoder = ImageDecoder(SIDE, max_pixels=data.max_pixels)

    def check_image(raw: bytes | Array) -> None:
        with warnings.catch_warnings(action="ignore"):
            decoder(raw)
            if isinstance(raw, np.ndarray):
                seen.sizes.append((raw.shape[1], raw.shape[0]))
                seen.formats["stored pixels"] += 1
                seen.grey += raw.ndim == 2
                return
            image = Image.open(io.BytesIO(raw))
        seen.sizes.append(image.size)
        seen.formats[image.format or "?"] += 1
        seen.grey += image.mode in GREY

    return check_image

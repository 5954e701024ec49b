"""Encoded video -> uint8 clip of a fixed shape, or the reason why not: which frames, how large, and in which process.

Decoding happens in a child process (`data/codecs/worker_process.py`, `data/codecs/clip_worker.py`), one for each ClipDecoder, started when first
needed: old C code fed with foreign files hangs, crashes and asks for all memory. A file on which the child gives no answer
in time, or dies, is tried once more by the decoders that are left (PyAV after decord), and then rejected.

Left out: sound, and decoding on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.codecs.worker_process import Died, Isolated

Array = np.ndarray[Any, Any]

LOG = logging.getLogger("distill_at_scale")
FUNCTION = (
    "distill_at_scale.data.codecs.clip_worker:answer"  # not imported here: processes that read images need no PyAV
)
NAMES = {"decord": ("decord", "decord"), "pyav": ("PyAV", "av")}  # as people call it, and its package


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes T frames of a video, converts them to grey or RGB and resizes them; the result has shape (T, C, size, size).

    `decoders` are tried in turn: "decord", "pyav", or "package.module:function" with the signature of
    `data.decoders.pyav_frames`. The other fields are keys of the configuration's `data` section, and the run's seed.
    """

    frames: int
    size: int
    channels: int
    resize: str = "square"
    sampling: str = "uniform"
    stride: int = 4
    short: str = "repeat"
    seek: str = "exact"
    max_pixels: int = 100_000_000
    max_seconds: float = 600.0
    time_limit: float = 60.0
    seed: int = 0
    decoders: tuple[str, ...] = ("pyav",)
    child: Isolated = field(default_factory=lambda: Isolated(FUNCTION), compare=False, repr=False)
    tally: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # clips by who decoded them

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.channels, self.size, self.size

    def __call__(self, name: str, raw: bytes) -> tuple[Array, str | None]:
        """The bytes of a video file -> uint8 of `shape`, and a remark if it is shorter than that (its last frame repeats).

        `name` is the sample's id, which decides random draws. Raises Rejected for whatever is wrong with the sample.
        """
        if not raw:
            raise SampleRejected("empty file")
        said, pixels = self._ask(name, raw)
        if "rejected" in said:
            raise SampleRejected(said["rejected"])
        self.tally[said["decoder"]] += 1
        if said["failures"]:
            level = logging.INFO if said["foreseen"] else logging.WARNING
            LOG.log(level, "%s: decoded by %s, as %s", name, said["decoder"], "; ".join(said["failures"]))
        return np.frombuffer(pixels, np.uint8).reshape(self.shape), said["remark"]

    def _ask(self, name: str, raw: bytes) -> tuple[dict[str, Any], bytearray]:
        """The child's answer; where it dies, that of a new one with the decoders that are left.

        Where it was killed from outside, which need not be the file's fault, with the same ones once more.
        """
        wanted = self._wanted(name)
        deaths: list[str] = []
        plan = [decoders for decoders in (self.decoders, self.decoders[1:]) if decoders]
        while plan:
            decoders = plan.pop(0)
            try:
                said, pixels = self.child.call({"decoders": decoders, "wanted": wanted}, raw, self.time_limit)
            except Died as death:
                plan[:0] = [decoders] if death.killed and not deaths else []
                deaths.append(f"the decoder {death}{' (data.time_limit)' if 'no answer' in str(death) else ''}")
            else:
                foreseen = said.get("foreseen", True) and not deaths
                return {**said, "failures": deaths + said.get("failures", []), "foreseen": foreseen}, pixels
        raise SampleRejected(deaths[-1])

    def _wanted(self, name: str) -> dict[str, Any]:
        """The fields of `data.frames.Wanted`."""
        own = [f.name for f in fields(self) if f.name not in ("time_limit", "decoders", "child", "tally")]
        return {key: getattr(self, key) for key in own} | {"name": name}


def named(decoders: tuple[str, ...]) -> str:
    """Such as "decord 0.6.0, or PyAV 18.1.0 where that fails"."""
    others = f", or {' or '.join(map(_with_version, decoders[1:]))} where that cannot" if decoders[1:] else ""
    return _with_version(decoders[0]) + others


def _with_version(name: str) -> str:
    """Such as "decord 0.6.0"; a plug-in has none."""
    if name not in NAMES:
        return name
    label, package = NAMES[name]
    return f"{label} {importlib.metadata.version(package)}"


def clip_decoder(data: DataSection, seed: int) -> ClipDecoder:
    """Raises UserError where the configuration asks for a decoder that is not there or cannot do it."""
    assert data.frames is not None
    return ClipDecoder(
        data.frames, data.size, data.channels, data.resize, data.sampling, data.stride, data.short, data.seek,
        data.max_pixels, data.max_seconds, data.time_limit, seed, decoders_for(data)
    )  # fmt: skip


def decoders_for(data: DataSection) -> tuple[str, ...]:
    """The decoders to try in turn. Raises UserError for what cannot be had."""
    decoder, seek = data.decoder, data.seek
    there = importlib.util.find_spec("decord") is not None
    if decoder == "decord" and not there:
        raise UserError(
            "data.decoder = decord, which is not installed (it has no build for ARM); set it to auto or pyav"
        )
    if decoder == "decord" and seek == "fast":
        raise UserError("data.seek = fast needs PyAV, as decord has no such mode; set data.decoder to auto or pyav")
    if decoder == "decord":
        return ("decord",)
    return ("decord", "pyav") if decoder == "auto" and there and seek == "exact" else ("pyav",)

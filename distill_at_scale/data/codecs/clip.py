"""Decodes a video file to a uint8 clip of a fixed shape, or rejects it with a reason.

Video decoders are old C code that hangs, crashes or exhausts memory on untrusted files, so each `ClipDecoder` decodes in one
child process. If the child dies or misses its deadline on a file, the remaining decoders try it once more.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import Array, SampleRejected
from distill_at_scale.data.codecs.worker_process import IsolatedFunction, WorkerDied

LOG = logging.getLogger("distill_at_scale")
# a name, not an import: processes that read only images need no PyAV
CHILD = "distill_at_scale.data.codecs.clip_worker:decode_clip"
PACKAGES = {"decord": ("decord", "decord"), "pyav": ("PyAV", "av")}  # display name, package


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes T frames of a video, converts them to grey or RGB and resizes them to (T, C, size, size).

    `decoders` are tried in turn: "decord", "pyav", or "package.module:function" with the signature of
    `video_decoders.pyav_frames`. The other fields are keys of the `data` section, and the run's seed.
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
    child: IsolatedFunction = field(default_factory=lambda: IsolatedFunction(CHILD), compare=False, repr=False)
    tally: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # clips per decoder

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.channels, self.size, self.size

    def __call__(self, name: str, raw: bytes) -> tuple[Array, str | None]:
        """The bytes of a video file -> uint8 of `shape`, and a remark if the clip is used despite a flaw.

        `name` is the sample's id, which seeds random frame choices. Raises SampleRejected for anything wrong with the file.
        """
        if not raw:
            raise SampleRejected("empty file; replace it")
        own = [f.name for f in fields(self) if f.name not in ("time_limit", "decoders", "child", "tally")]
        request = {key: getattr(self, key) for key in own} | {"name": name}
        deaths: list[str] = []
        attempts = [decoders for decoders in (self.decoders, self.decoders[1:]) if decoders]
        while True:
            try:
                header = {"decoders": attempts[0], "request": request}
                reply, pixels = self.child.call(header, raw, self.time_limit)
                break
            except WorkerDied as death:
                # a first kill from outside may not be the file's fault: the same decoders once more; else the remaining ones
                if deaths or not death.killed:
                    del attempts[0]
                deaths.append(f"the decoder {death}{' (data.time_limit)' if 'no answer' in str(death) else ''}")
                if not attempts:
                    raise SampleRejected(f"{deaths[-1]}; replace the file") from None
        if "rejected" in reply:
            raise SampleRejected(reply["rejected"])
        self.tally[reply["decoder"]] += 1
        if failures := deaths + reply["failures"]:
            level = logging.INFO if reply["expected"] and not deaths else logging.WARNING
            LOG.log(level, "%s: decoded by %s, as %s", name, reply["decoder"], "; ".join(failures))
        return np.frombuffer(pixels, np.uint8).reshape(self.shape), reply["remark"]


def describe_decoders(decoders: tuple[str, ...]) -> str:
    """Such as "decord 0.6.0, or PyAV 18.1.0 where that cannot"; plug-ins have no version."""
    known = [PACKAGES.get(decoder, (decoder, None)) for decoder in decoders]
    names = [f"{label} {importlib.metadata.version(package)}" if package else label for label, package in known]
    return names[0] + (f", or {' or '.join(names[1:])} where that cannot" if names[1:] else "")


def clip_decoder(data: DataSection, seed: int) -> ClipDecoder:
    """Raises UserError if the configured decoder is missing or does not support `data.seek`."""
    assert data.frames is not None
    return ClipDecoder(
        data.frames, data.size, data.channels, data.resize, data.sampling, data.stride, data.short, data.seek,
        data.max_pixels, data.max_seconds, data.time_limit, seed, decoders_for(data)
    )  # fmt: skip


def decoders_for(data: DataSection) -> tuple[str, ...]:
    """The decoders to try in turn. Raises UserError if the configured one is missing or does not support `data.seek`."""
    installed = importlib.util.find_spec("decord") is not None
    if data.decoder == "decord":
        if not installed:
            hint = "set it to auto or pyav"
            raise UserError(f"data.decoder = decord, which is not installed (it has no build for ARM); {hint}")
        if data.seek == "fast":
            raise UserError("data.seek = fast needs PyAV, as decord has no such mode; set data.decoder to auto or pyav")
        return ("decord",)
    return ("decord", "pyav") if data.decoder == "auto" and installed and data.seek == "exact" else ("pyav",)

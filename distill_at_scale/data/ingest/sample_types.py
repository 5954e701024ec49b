"""What the samples are, images, clips or tensors (arrays of another meaning), and what that asks of the configuration.

Tensors are stored as float32, as they are: nothing is resized, coded as JPEG or augmented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.ingest.plan import CONTRACT, open_source
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.sources import SOURCES

NEUTRAL = {  # keys of method sections
    "augment": "none",
    "expert_augment": "none",
    "student_augment": "none",
    "factor": 1,
    "network_cutmix": 0.0,
    "student_cutmix": 0.0,
}
CROPPING = ("sre2l", "rded")  # methods that cut images into parts

Array = np.ndarray[Any, Any]


def holds_tensors(data: DataSection) -> bool:
    """Whether the source holds arrays that are no images."""
    return bool(getattr(resolve("data.source", data.source, SOURCES, CONTRACT), "tensors", False))


def sample_shape(data: DataSection) -> tuple[int, ...]:
    """C x H x W of an image, T x C x H x W of a clip, of tensors whatever the source says."""
    if holds_tensors(data):
        return tuple(open_source(data).shape)  # type: ignore[attr-defined]
    image = (data.channels, data.size, data.size)
    return (data.frames, *image) if data.frames else image


def check(config: Config) -> None:
    """What can be known of the configuration alone.

    Raises UserError for what cannot be done to tensors, naming all keys to change, and for samples too large to be whitened.
    """
    data = config.data
    if data.whiten == "zca" and not holds_tensors(data):
        whitening.check(sample_shape(data))
    if not holds_tensors(data):
        return
    if data.frames or data.store == "jpeg":
        key = "data.frames" if data.frames else "data.store"
        raise UserError(f"data.source = {data.source} holds arrays that are no images; leave {key} out")
    method = config.distill.method
    if method in CROPPING:
        raise UserError(f"distill.method = {method} cuts images into parts, the data are no images; take dm, dc or mtt")
    own = getattr(config.distill, method, None)
    wrong = [f"distill.{method}.{k}={v}" for k, v in NEUTRAL.items() if getattr(own, k, v) != v]
    if wrong:
        raise UserError(
            f"data.source = {data.source} holds arrays that are no images, to which {method} cannot do what it does to "
            f"images by default; set {' '.join(wrong)}"
        )


@dataclass(frozen=True)
class TensorDecoder:
    """Takes arrays of one shape and numbers that float32 holds."""

    shape: tuple[int, ...]

    def __call__(self, raw: bytes | Array) -> Array:
        """An array of numbers -> a new float32 array of the shape.

        Raises Rejected for what has another shape, no numbers, or numbers that are not finite.
        """
        if not isinstance(raw, np.ndarray) or raw.dtype.kind not in "fiub":
            raise SampleRejected("no array of numbers: missing, or its lists differ in length or lack numbers")
        if raw.shape != self.shape:
            raise SampleRejected(
                f"its shape is {list(raw.shape)}, that of the first training sample {list(self.shape)}"
            )
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise SampleRejected(f"{int((~np.isfinite(values)).sum())} of its values are not finite in 32 bits")
        return values

"""Sample types: images, clips, or tensors (other arrays), and what they require of the configuration.

Tensors are stored as float32, unchanged: they are not resized, encoded as JPEG or augmented.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import Array, SampleRejected
from distill_at_scale.data.ingest.plan import CONTRACT, open_source
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.sources import SOURCES

# keys of method sections -> values without image augmentations
NEUTRAL = {
    "augment": "none", "expert_augment": "none", "student_augment": "none",
    "factor": 1, "network_cutmix": 0.0, "student_cutmix": 0.0,
}  # fmt: skip
CROPPING = ("sre2l", "rded", "pca")  # methods that crop images


def holds_tensors(data: DataSection) -> bool:
    """Whether the source holds arrays that are not images."""
    return bool(getattr(resolve("data.source", data.source, SOURCES, CONTRACT), "tensors", False))


def sample_shape(data: DataSection) -> tuple[int, ...]:
    """C x H x W of an image, T x C x H x W of a clip; the source gives the shape of tensors."""
    if holds_tensors(data):
        return tuple(open_source(data).shape)  # type: ignore[attr-defined]
    image = (data.channels, data.size, data.size)
    return (data.frames, *image) if data.frames else image


def check(config: Config) -> None:
    """Checks the configuration alone, without opening the source.

    Raises UserError for keys that do not apply to tensors, naming all of them, and for samples too large to be whitened.
    """
    data = config.data
    if not holds_tensors(data):
        whitening.check(data, sample_shape(data))
        return
    subject = f"data.source = {data.source} holds arrays that are not images"
    if data.frames or data.store == "jpeg":
        raise UserError(f"{subject}; leave {'data.frames' if data.frames else 'data.store'} out")
    method = config.distill.method
    if method in CROPPING:
        raise UserError(f"{subject}, but distill.method = {method} crops images; use dm, dc, mtt or coreset")
    section = getattr(config.distill, method, None)
    if wrong := {key: value for key, value in NEUTRAL.items() if getattr(section, key, value) != value}:
        settings = " ".join(f"distill.{method}.{key}={value}" for key, value in wrong.items())
        raise UserError(f"{subject}; {method}'s image augmentations do not apply to them; set {settings}")


@dataclass(frozen=True)
class TensorDecoder:
    """Accepts arrays of one shape whose numbers float32 holds."""

    shape: tuple[int, ...]

    def __call__(self, raw: bytes | Array) -> Array:
        """-> a new float32 array. Raises SampleRejected for another shape and for values that are not finite numbers."""
        if not isinstance(raw, np.ndarray) or raw.dtype.kind not in "fiub":
            raise SampleRejected(
                "no array of numbers: missing, or its lists differ in length or lack numbers; correct it"
            )
        if raw.shape != self.shape:
            raise SampleRejected(f"its shape is {[*raw.shape]}, that of all others {[*self.shape]}")
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32)
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise SampleRejected(f"{count} of its values are not finite in 32 bits; correct them")
        return values

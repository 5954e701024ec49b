"""Export formats of a synthetic set: class folders of images, frames or videos, and Hugging Face's Parquet.

Samples are uint8 images [n, C, H, W] or clips [n, T, C, H, W]. Every export is published atomically. Only videos are lossy:
their `card.json` says by how much.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import FRAMES_PER_SECOND, png, to_frames
from distill_at_scale.data.codecs.mp4 import encode_mp4

ENLARGED = 2  # a pixel becomes 2 x 2: yuv420p keeps one colour for each 2 x 2 block
ENCODER = {"crf": "6", "preset": "slow", "bf": "0"}  # 43 dB on coloured noise, more on natural scenes; no B frames
YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float32) / 255
YUV_OFFSET = (16, 128, 128)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Array = np.ndarray[Any, Any]


class Samples(NamedTuple):
    values: Array  # uint8 [n, C, H, W] or [n, T, C, H, W], or float32 [n, *shape]
    labels: Sequence[int]
    class_names: Sequence[str]


def write_imagefolder(folder: Path, samples: Samples) -> None:
    """`<class>/<number>.png`; for clips `<class>/<number>/<frame>.png`. Raises UserError if the folder is not empty."""

    def write(target: Path, sample: Array) -> None:
        frames = to_frames(sample)
        if sample.ndim == 3:
            frames[0].save(target.with_suffix(".png"))
            return
        target.mkdir()
        for t, frame in enumerate(frames):
            frame.save(target / f"{t:05d}.png")

    _write_by_class(folder, samples, write)


def write_videofolder(folder: Path, samples: Samples, card: Mapping[str, Any]) -> None:
    """`<class>/<number>.mp4` (H.264, FRAMES_PER_SECOND, no B frames) of clips [n, T, C, H, W], and the card.

    Raises UserError for images, for a folder that is not empty, and without an H.264 encoder.
    """
    if samples.values.ndim != 5:
        raise UserError("the set holds images, not clips; use export_imagefolder, export_parquet or export_pt")
    export = {"format": "mp4, H.264, yuv420p (BT.601)", "lossy": True, "enlarged": ENLARGED, **ENCODER}
    export |= {"frames_per_second": FRAMES_PER_SECOND, "exact_pixels": "export_imagefolder, export_parquet"}

    def write(target: Path, clip: Array) -> None:
        video = encode_mp4(_yuv420(clip), FRAMES_PER_SECOND, ENCODER, "yuv420p")
        target.with_suffix(".mp4").write_bytes(video)

    text = json.dumps({**card, "export": export}, indent=1) + "\n"
    _write_by_class(folder, samples, write, {"card.json": text})


def write_parquet(path: Path, samples: Samples) -> None:
    """One file in Hugging Face's layout: `image`, or for clips `frames`, a list of images; and `label`."""
    is_clips, rows = samples.values.ndim == 5, []
    for i, sample in enumerate(samples.values):
        names = [f"{i:05d}/{t:05d}.png" for t in range(len(sample))] if is_clips else [f"{i:05d}.png"]
        frames = [{"bytes": png([f]), "path": name} for f, name in zip(to_frames(sample), names, strict=True)]
        rows.append(frames if is_clips else frames[0])
    feature: dict[str, Any] = {"_type": "Image"}
    if is_clips:
        # every release of `datasets` reads "Sequence", the older name of a list
        feature = {"feature": feature, "_type": "Sequence"}
    column = pa.array(rows, pa.list_(IMAGE) if is_clips else IMAGE)
    _write_table(path, "frames" if is_clips else "image", column, feature, samples)


def write_tensor_parquet(path: Path, samples: Samples) -> None:
    """One file with `values`, nested lists of the float32 [n, *shape], and `label`."""
    column: pa.Array = pa.array(np.ascontiguousarray(samples.values, np.float32).reshape(-1))
    feature: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    for size in reversed(samples.values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, size, dtype=np.int32), column)
        feature = {"feature": feature, "_type": "Sequence"}
    _write_table(path, "values", column, feature, samples)


def _write_table(path: Path, name: str, column: pa.Array, feature: Any, samples: Samples) -> None:
    features = {name: feature, "label": {"_type": "ClassLabel", "names": list(samples.class_names)}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(name, column.type), ("label", pa.int64())], metadata)
    with publish(path) as temporary:
        pq.write_table(pa.table([column, pa.array(samples.labels, pa.int64())], schema=schema), temporary)


def _write_by_class(
    folder: Path, samples: Samples, write: Callable[[Path, Array], None], extra_files: Mapping[str, str] | None = None
) -> None:
    """Call `write(<class>/<number>, sample)` for every sample and add text files to the root; publish it all at once."""
    names = _folder_names(samples.class_names)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; export to a new folder")
    with publish(folder) as temporary:
        for i, (sample, label) in enumerate(zip(samples.values, samples.labels, strict=True)):
            target = temporary / names[label] / f"{i:05d}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, sample)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def _yuv420(clip: Array) -> Array:
    """uint8 [T, C, H, W] -> the planes of yuv420p below each other, [T, 3H, 2W]: enlarged luma, chroma as it is.

    BT.601 in limited range, the default of readers. Done here because libswscale would blend the colours of neighbours.
    """
    color = np.broadcast_to(clip, (len(clip), 3, *clip.shape[2:])).astype(np.float32)
    yuv = np.einsum("ij,tjhw->tihw", YUV, color) + np.array(YUV_OFFSET, np.float32)[:, None, None]
    y, u, v = np.moveaxis(yuv.round().clip(0, 255).astype(np.uint8), 1, 0)
    large = y.repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    planes = [plane.reshape(len(clip), -1) for plane in (large, u, v)]
    return np.concatenate(planes, 1).reshape(len(clip), -1, large.shape[2])


def _folder_names(class_names: Sequence[str]) -> list[str]:
    """Class names as safe folder names; an unusable or repeated one becomes `class-<label>`."""
    names: list[str] = []
    for label, name in enumerate(class_names):
        safe = "".join("_" if c in (os.sep, "/", "\\", "\0") else c for c in name).strip()
        usable = safe not in ("", ".", "..") and safe.casefold() not in {other.casefold() for other in names}
        names.append(safe if usable else f"class-{label}")
    return names

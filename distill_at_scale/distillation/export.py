"""A synthetic set in the layouts that others read: class folders of images, frames or videos, and Hugging Face's Parquet.

Pixels are uint8, images [n, C, H, W] or clips [n, T, C, H, W], with labels int [n]. Everything is published in one step.
Videos alone lose something; how much, and what their readers must know, is in the `card.json` beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import FRAMES_PER_SECOND, png, to_frames
from distill_at_scale.data.codecs.mp4 import encode_mp4

ENLARGED = 2  # sides of a video's pixels: 4:2:0 keeps one colour for each 2 x 2, so every pixel keeps its own
ENCODER = {"crf": "6", "preset": "slow", "bf": "0"}  # 43 dB on coloured noise, more on scenes; no B frames
YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float32) / 255
YUV_ZERO = (16, 128, 128)
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Array = np.ndarray[Any, Any]


def imagefolder(folder: Path, pixels: Array, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """`<class>/<number>.png`; of clips `<class>/<number>/<frame>.png`.

    Raises UserError where the folder is there and not empty.
    """

    def write(target: Path, sample: Array) -> None:
        frames = to_frames(sample)
        if sample.ndim == 3:
            frames[0].save(target.with_suffix(".png"))
            return
        target.mkdir()
        for t, frame in enumerate(frames):
            frame.save(target / f"{t:05d}.png")

    _by_class(folder, pixels, labels, class_names, write)


def videofolder(
    folder: Path, pixels: Array, labels: Sequence[int], class_names: Sequence[str], card: Mapping[str, Any]
) -> None:
    """`<class>/<number>.mp4` (H.264, FRAMES_PER_SECOND, no B frames) of clips [n, T, C, H, W], and the card.

    Every pixel becomes ENLARGED x ENLARGED, so that 4:2:0, which every player knows, keeps its colour, and sides are even.
    Raises UserError where the set holds images, where the folder is there and not empty, and without an H.264 encoder.
    """
    if pixels.ndim != 5:
        raise UserError("the set holds images, not clips; use export_imagefolder, export_parquet or export_pt")
    export = {"format": "mp4, H.264, yuv420p (BT.601)", "lossy": True, "enlarged": ENLARGED, **ENCODER}
    export |= {"frames_per_second": FRAMES_PER_SECOND, "exact_pixels": "export_imagefolder, export_parquet"}
    extra = {"card.json": json.dumps({**card, "export": export}, indent=1) + "\n"}
    _by_class(
        folder, pixels, labels, class_names, lambda path, clip: write_video(path.with_suffix(".mp4"), clip), extra
    )


def parquet(path: Path, pixels: Array, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """One file in Hugging Face's layout: `image`, or of clips `frames`, a list of images; and `label`."""
    clips, image = pixels.ndim == 5, {"_type": "Image"}
    rows: list[Any] = []
    for i, sample in enumerate(pixels):
        names = [f"{i:05d}/{t:05d}.png" for t in range(len(sample))] if clips else [f"{i:05d}.png"]
        frames = [{"bytes": png([f]), "path": name} for f, name in zip(to_frames(sample), names, strict=True)]
        rows.append(frames if clips else frames[0])
    name, kind = ("frames", pa.list_(PICTURE)) if clips else ("image", PICTURE)
    feature = {"feature": image, "_type": "Sequence"} if clips else image  # every release reads this name of a list
    features = {name: feature, "label": {"_type": "ClassLabel", "names": list(class_names)}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(name, kind), ("label", pa.int64())], described)
    with publish(path) as temporary:
        pq.write_table(pa.table([pa.array(rows, kind), pa.array(labels, pa.int64())], schema=schema), temporary)


def value_parquet(path: Path, values: Array, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """One file with `values`, nested lists of the float32 [n, *shape], and `label`, with the classes' names."""
    column: pa.Array = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, size, dtype=np.int32), column)
    features: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    for _ in values.shape[1:]:
        features = {"feature": features, "_type": "Sequence"}
    described = {"values": features, "label": {"_type": "ClassLabel", "names": list(class_names)}}
    schema = pa.schema(
        [("values", column.type), ("label", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": described}})},
    )
    with publish(path) as temporary:
        pq.write_table(pa.table([column, pa.array(labels, pa.int64())], schema=schema), temporary)


def _by_class(
    folder: Path,
    pixels: Array,
    labels: Sequence[int],
    class_names: Sequence[str],
    write: Callable[[Path, Array], None],
    extra: Mapping[str, str] | None = None,
) -> None:
    """`write(<class>/<number>, sample)` for every sample, and text files in the root; the whole folder in one step."""
    names = _folder_names(class_names)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; export to a new folder")
    with publish(folder) as temporary:
        for i, (sample, label) in enumerate(zip(pixels, labels, strict=True)):
            target = temporary / names[label] / f"{i:05d}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, sample)
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def write_video(path: Path, clip: Array) -> None:
    """uint8 [T, C, H, W] -> an mp4 file of T frames, 2H x 2W pixels."""
    path.write_bytes(encode_mp4(_yuv420(clip), FRAMES_PER_SECOND, ENCODER, "yuv420p"))


def _yuv420(clip: Array) -> Array:
    """uint8 [T, C, H, W] -> the planes of yuv420p below each other, [T, 3H, 2W]: brightness enlarged, colour as it is.

    BT.601 in the narrow range, which readers take for granted; libswscale would blend the colours of neighbours.
    """
    color = np.broadcast_to(clip, (len(clip), 3, *clip.shape[2:])).astype(np.float32)
    yuv = np.einsum("ij,tjhw->tihw", YUV, color) + np.array(YUV_ZERO, np.float32)[:, None, None]
    y, u, v = np.moveaxis(yuv.round().clip(0, 255).astype(np.uint8), 1, 0)
    large = y.repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    planes = [plane.reshape(len(clip), -1) for plane in (large, u, v)]
    return np.concatenate(planes, 1).reshape(len(clip), -1, large.shape[2])


def _folder_names(names: Sequence[str]) -> list[str]:
    """Class names made safe as folder names; one that is unusable or taken gets its label's number."""
    found: list[str] = []
    for label, name in enumerate(names):
        safe = "".join("_" if c in (os.sep, "/", "\\", "\0") else c for c in name).strip()
        usable = safe not in ("", ".", "..") and safe.casefold() not in {other.casefold() for other in found}
        found.append(safe if usable else f"class-{label}")
    return found

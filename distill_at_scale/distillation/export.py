"""Exports of a synthetic set, methods of `SyntheticSet`. Every export is published atomically.

Each export carries the card, the names of the classes in the order of their labels, and a README with lines that load it:
as files in a folder, or inside a single file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import FRAMES_PER_SECOND, png, to_frames
from distill_at_scale.data.codecs.mp4 import encode_mp4
from distill_at_scale.distillation.export_readme import Format, readme

ENLARGED = 2  # a pixel becomes 2 x 2: yuv420p keeps one colour for each 2 x 2 block
ENCODER = {"crf": "6", "preset": "slow", "bf": "0"}  # 43 dB on coloured noise, more on natural scenes; no B frames
YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float32) / 255
YUV_OFFSET = (16, 128, 128)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Array = np.ndarray[Any, Any]
SyntheticSet = Any  # synthetic_set.SyntheticSet; that module imports this one


def export_imagefolder(synthetic: SyntheticSet, folder: str | Path) -> None:
    """Write `<class>/<number>.png`, 8 bits per channel (clipped), as torchvision's ImageFolder reads it.

    A clip becomes a folder of frames, `<class>/<number>/00000.png` and so on: the "rawframes" of video toolkits. Readers
    number classes in the order of the sorted folder names. Where the names of the classes do not sort in the order of their
    labels, each folder is `<label>_<name>`, such as `03_cat`.

    Raises UserError if the folder exists and is not empty, or the set holds tensors.
    """

    def write(target: Path, sample: Array) -> None:
        frames = to_frames(sample)
        if sample.ndim == 3:
            frames[0].save(target.with_suffix(".png"))
            return
        target.mkdir()
        for t, frame in enumerate(frames):
            frame.save(target / f"{t:05d}.png")

    _write_by_class(Path(folder), synthetic, write, "imagefolder", {"format": "png"})


def export_videofolder(synthetic: SyntheticSet, folder: str | Path) -> None:
    """Write clips as `<class>/<number>.mp4` (H.264, 8 frames per second); folders are named as by `export_imagefolder`.

    Lossy (43 dB on coloured noise), and every pixel becomes 2 x 2, as the card says.

    Raises UserError if the folder exists and is not empty, the set holds no clips, or there is no H.264 encoder.
    """
    if synthetic.kind != "tensors" and synthetic.images.dim() != 5:
        raise UserError("the set holds images, not clips; use export_imagefolder, export_parquet or export_pt")
    export = {"format": "mp4, H.264, yuv420p (BT.601)", "lossy": True, "enlarged": ENLARGED, **ENCODER}
    export |= {"frames_per_second": FRAMES_PER_SECOND, "exact_pixels": "export_imagefolder, export_parquet"}

    def write(target: Path, clip: Array) -> None:
        target.with_suffix(".mp4").write_bytes(encode_mp4(_yuv420(clip), FRAMES_PER_SECOND, ENCODER, "yuv420p"))

    _write_by_class(Path(folder), synthetic, write, "videofolder", export)


def export_parquet(synthetic: SyntheticSet, path: str | Path) -> None:
    """Write Parquet in Hugging Face's layout, which `datasets.load_dataset` reads.

    `path` is a file `*.parquet`, whose metadata have the card and the README, or a folder for them and the data.
    Columns: `label` and `image`; for clips `frames`, a list of images; for tensors `values`, nested lists of float32, which
    `data.source: tensors` reads.

    Raises UserError if the folder exists and is not empty.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        notes = {"distill_at_scale": json.dumps(synthetic.card), "readme": readme(synthetic, "parquet file", path.name)}
        with publish(path) as temporary:
            pq.write_table(_table(synthetic, notes), temporary)
        return
    with _new_folder(path) as temporary:
        temporary.mkdir()
        pq.write_table(_table(synthetic, {}), temporary / "train-00000-of-00001.parquet")
        _write_notes(temporary, synthetic, "parquet folder", path.name, {"format": "parquet"})


def export_pt(synthetic: SyntheticSet, path: str | Path) -> None:
    """Write a `.pt` file with images, labels, card, README and small extras, for `torch.load(path, weights_only=True)`.

    For whitened images it also has whitening_mean and whitening_matrix. It lacks the labels of views.
    """
    content: dict[str, Any] = {"images": synthetic.images, "labels": synthetic.labels, "card": synthetic.card}
    content["readme"] = readme(synthetic, "pt", Path(path).name)
    if (whitening := synthetic.whitening) is not None:
        content |= {"whitening_mean": whitening.mean, "whitening_matrix": whitening.matrix}
    with publish(Path(path)) as temporary:
        torch.save(content | synthetic.small_extras, temporary)


def _table(synthetic: SyntheticSet, metadata: dict[str, str]) -> pa.Table:
    """The set in Hugging Face's layout."""
    name = "values" if synthetic.kind == "tensors" else "frames" if synthetic.images.dim() == 5 else "image"
    column, feature = (_tensor_column if name == "values" else _image_column)(synthetic.values().numpy())
    features = {name: feature, "label": {"_type": "ClassLabel", "names": synthetic.class_names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), **metadata}
    schema = pa.schema([(name, column.type), ("label", pa.int64())], metadata)
    return pa.table([column, pa.array(synthetic.labels.tolist(), pa.int64())], schema=schema)


def _image_column(values: Array) -> tuple[pa.Array, dict[str, Any]]:
    """A column of PNG files, and its feature in `datasets`."""
    is_clips, rows = values.ndim == 5, []
    for i, sample in enumerate(values):
        names = [f"{i:05d}/{t:05d}.png" for t in range(len(sample))] if is_clips else [f"{i:05d}.png"]
        frames = [{"bytes": png([f]), "path": name} for f, name in zip(to_frames(sample), names, strict=True)]
        rows.append(frames if is_clips else frames[0])
    if not is_clips:
        return pa.array(rows, IMAGE), {"_type": "Image"}
    # every release of `datasets` reads "Sequence", the older name of a list
    return pa.array(rows, pa.list_(IMAGE)), {"feature": {"_type": "Image"}, "_type": "Sequence"}


def _tensor_column(values: Array) -> tuple[pa.Array, dict[str, Any]]:
    """A column of nested lists of float32, and its feature in `datasets`."""
    column: pa.Array = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    feature: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    for size in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, size, dtype=np.int32), column)
        feature = {"feature": feature, "_type": "Sequence"}
    return column, feature


def _write_by_class(
    folder: Path, synthetic: SyntheticSet, write: Callable[[Path, Array], None], kind: Format, facts: dict[str, Any]
) -> None:
    """Call `write(<class>/<number>, sample)` for every sample and add the notes to the root; publish it all at once."""
    if synthetic.kind == "tensors":
        raise UserError("the set holds arrays that are not images; use export_parquet or export_pt")
    names, samples = folder_names(synthetic.class_names), synthetic.values().numpy()
    with _new_folder(folder) as temporary:
        for i, (sample, label) in enumerate(zip(samples, synthetic.labels.tolist(), strict=True)):
            target = temporary / names[label] / f"{i:05d}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, sample)
        _write_notes(temporary, synthetic, kind, folder.name, facts | {"folders": names})


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary path that becomes `folder`. Raises UserError if the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; export to a new folder")
    with publish(folder) as temporary:
        yield temporary


def _write_notes(folder: Path, synthetic: SyntheticSet, kind: Format, name: str, facts: dict[str, Any]) -> None:
    """card.json, classes.txt (a name per line, in the order of the labels), README.md, and the whitening if there is one."""
    card = json.dumps({**synthetic.card, "export": facts}, indent=1) + "\n"
    classes = "".join(" ".join(one.split()) + "\n" for one in synthetic.class_names)
    for file, text in (("card.json", card), ("classes.txt", classes), ("README.md", readme(synthetic, kind, name))):
        (folder / file).write_text(text, encoding="utf-8")
    if synthetic.whitening is not None:
        synthetic.whitening.save(folder)


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


MAX_NAME_BYTES = 200  # of a folder; file systems allow 255, and a label stands in front


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Class names as safe folder names that sort in the order of the labels.

    An unusable or repeated name becomes `class-<label>`. If the names do not sort in label order, all get their label in front.
    """
    names, taken = list[str](), set[str]()
    for label, name in enumerate(class_names):
        safe = "".join("_" if c in (os.sep, "/", "\\", "\0") else c for c in name).strip()
        safe = safe.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip()
        usable = safe not in ("", ".", "..") and safe.casefold() not in taken
        names.append(safe if usable else f"class-{label}")
        taken.add(safe.casefold())
    if names == sorted(set(names)):  # a class may be called class-1 itself
        return names
    digits = len(str(len(names) - 1))
    return [f"{label:0{digits}d}_{name}" for label, name in enumerate(names)]

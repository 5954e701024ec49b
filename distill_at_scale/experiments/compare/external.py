"""Sets from elsewhere: an image folder, a `.pt` file, a Hugging Face Parquet, or the folder of a synthetic set.

Images must have the size and the channels of the prepared data: another size would not be the same set.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import ImageDecoder, SampleRejected
from distill_at_scale.data.ingest.plan import open_source
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.export import folder_names
from distill_at_scale.experiments.compare.sets import SetTensors, tensors_of

Refuse = Callable[[str], UserError]


def load(name: str, path: str, data: PreparedDataset, normalization: Normalization) -> SetTensors:
    """The set that `compare.external` names, in the normalisation of the first run.

    Raises UserError, which names the key, the file and the problem, for a set that does not fit the data.
    """
    place = Path(path).expanduser()

    def refuse(problem: str) -> UserError:
        return UserError(f"compare.external: {name} = {path}: {problem}")

    if not place.exists():
        raise refuse("there is no such file or folder")
    if place.is_dir() and any((place / part).exists() for part in ("synthetic.safetensors", synthetic_set.SET)):
        synthetic = synthetic_set.load(place)
        if synthetic.class_names != data.class_names:
            raise refuse("its classes are not those of the data; name a set of the same classes in the same order")
        result = tensors_of(synthetic, normalization)
    elif place.suffix == ".pt":
        result = _from_pt(place, data, normalization, refuse)
    elif place.suffix == ".parquet" or (place.is_dir() and any(place.rglob("*.parquet"))):
        result = _from_source("parquet", place, data, normalization, refuse)
    elif place.is_dir():
        result = _from_source("imagefolder", place, data, normalization, refuse)
    else:
        raise refuse("it is neither a folder of class folders, a .pt file, a .parquet file nor a synthetic set")
    if tuple(result.images.shape[1:]) != data.shape:
        raise refuse(f"its samples have the shape {[*result.images.shape[1:]]}, those of the data {[*data.shape]}")
    present = set(result.labels.tolist())
    if empty := [name for label, name in enumerate(data.class_names) if label not in present]:
        raise refuse(f"it has no sample of {len(empty)} classes, for example {empty[0]!r}; add them")
    return result


def _from_pt(path: Path, data: PreparedDataset, normalization: Normalization, refuse: Refuse) -> SetTensors:
    """images uint8, or float: normalised if there is a `card` or `mean` and `std`, else from 0 to 1; labels int64 [n]."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = str(error).partition("\n")[0]
        raise refuse(f"it cannot be read ({problem}); save a dict of tensors with torch.save") from None
    images, labels = (content.get(key) if isinstance(content, Mapping) else None for key in ("images", "labels"))
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise refuse("it must hold a dict with the tensors images [n, *shape] and labels [n]")
    if labels.dtype.is_floating_point or labels.shape != images.shape[:1] or not len(labels):
        raise refuse(f"labels must be class numbers, one for each of the {len(images)} images")
    if int(labels.min()) < 0 or int(labels.max()) >= len(data.class_names):
        raise refuse(f"a label is outside 0..{len(data.class_names) - 1}, the classes of the data")
    if not torch.isfinite(images.float()).all():
        raise refuse("some values are not finite")
    card, low, high = content.get("card"), float(images.min()), float(images.max())
    own = card.get("normalization") if isinstance(card, Mapping) else None
    own = {key: content[key].tolist() for key in ("mean", "std")} if own is None and "mean" in content else own
    size = 1 if images.dtype == torch.uint8 else 4
    if images.dtype != torch.uint8 and own is not None:
        images = Normalization.of_card(own).invert(images.float()) * normalization.scale
        if "whitening_matrix" in content:
            raise refuse("its images are whitened; export the set as a synthetic set or as Parquet")
    elif images.dtype != torch.uint8 and normalization.scale != 1:
        if low < -1e-4 or high > 1 + 1e-4:
            raise refuse(
                f"its values go from {low:.3g} to {high:.3g}; give uint8, floats from 0 to 1, or also the tensors mean and std "
                "per channel with which the images are normalised"
            )
        images = images.float() * normalization.scale
    if tuple(images.shape[1:]) != data.shape:
        raise refuse(f"its samples have the shape {[*images.shape[1:]]}, those of the data {[*data.shape]}")
    soft = content.get("soft_labels")
    if soft is not None and soft.shape != (len(labels), len(data.class_names)):
        raise refuse(f"soft_labels must be logits [{len(labels)}, {len(data.class_names)}]")
    return SetTensors(normalization.apply(images), labels.long(), len(labels), size, soft)


def _from_source(
    layout: str, path: Path, data: PreparedDataset, normalization: Normalization, refuse: Refuse
) -> SetTensors:
    if data.kind != "images":
        raise refuse(f"a set of {data.kind} must be a .pt file or a synthetic set")
    side, pixels = data.shape[-1], list[np.ndarray[Any, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():  # the name of a file in a folder must say which split it is
            (Path(folder) / "train.parquet").symlink_to(path.resolve())
        section = DataSection(
            source=layout,
            path=str(path) if path.is_dir() else folder,
            size=side,
            channels=1 if data.shape[0] == 1 else 3,
        )
        try:
            source, decoder = open_source(section), ImageDecoder(side, section.channels, "square", section.max_pixels)
            rows = source.listing("train")
            samples = list(zip(rows["sample_id"].to_pylist(), source.read(rows), strict=True))
        except UserError as error:
            raise refuse(str(error)) from None
    for name, raw in samples:
        try:
            shape = Image.open(io.BytesIO(raw)).size if isinstance(raw, bytes) else np.shape(raw)[1::-1]
            if shape != (side, side):
                raise refuse(
                    f"{name} has {shape[0]} x {shape[1]} pixels, the data {side} x {side}; give images of that size"
                )
            pixels.append(decoder(raw))
        except (SampleRejected, OSError) as error:
            raise refuse(f"{name} cannot be used: {error}") from None
    labels = _labels(source.class_names, rows["label"].to_numpy(), data.class_names, refuse)
    images = normalization.apply(torch.from_numpy(np.stack(pixels)))
    return SetTensors(images, torch.from_numpy(labels), len(labels), 1)


def _labels(names: Sequence[str], labels: np.ndarray[Any, Any], classes: Sequence[str], refuse: Refuse) -> Any:
    """Labels in the data's classes: by name, by the folder names of an export, or by number where all names are numbers."""
    known = {name: label for label, name in enumerate(folder_names(classes))}
    known |= {name: label for label, name in enumerate(classes)}
    if not set(names) & set(known) and all(name.isdecimal() for name in names):
        known = {str(label): label for label in range(len(classes))}
    if unknown := [name for name in names if name not in known]:
        raise refuse(
            f"its class {unknown[0]!r} is none of the data's: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)}"
        )
    return np.array([known[name] for name in names], np.int64)[labels]

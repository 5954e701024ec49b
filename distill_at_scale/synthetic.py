"""The result: a synthetic set with everything needed to use it, saved without pickles and exported to common layouts.

`synthetic.safetensors` holds images (float32, normalised, [n, *shape]), labels (int64 [n]) and, if the method learns
it, the network's learning rate; `card.json` says what the numbers mean. `load(folder)` is the one call that a user
needs.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from distill_at_scale import tensors
from distill_at_scale.data.pool import Normalization
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import publish

PREVIEW_CLASSES, PREVIEW_COLUMNS, PREVIEW_SIDE = 100, 10, 64


@dataclass
class SyntheticSet:
    """images float32 [n, *shape] (normalised as the card says), labels int64 [n]."""

    images: Tensor
    labels: Tensor
    card: dict[str, Any]
    snapshots: dict[int, Tensor] = field(default_factory=dict)  # step -> uint8 [m, *shape], the first images of the set

    @property
    def normalization(self) -> Normalization:
        return Normalization(tuple(self.card["normalization"]["mean"]), tuple(self.card["normalization"]["std"]))

    @property
    def class_names(self) -> list[str]:
        return self.card["class_names"]

    def pixels(self) -> Tensor:
        """uint8 [n, *shape], clipped to what can be shown."""
        return to_uint8(self.images, self.normalization)

    def save(self, folder: Path) -> None:
        """Publish the set as a folder, in one step."""
        with publish(folder) as temporary:
            temporary.mkdir()
            tensors.write(temporary / "synthetic.safetensors", {"images": self.images, "labels": self.labels})
            if self.snapshots:
                shots = {f"{step:08d}": pixels for step, pixels in self.snapshots.items()}
                tensors.write(temporary / "snapshots.safetensors", shots)
            (temporary / "card.json").write_text(json.dumps(self.card, indent=1) + "\n")
            preview(self).save(temporary / "preview.png", format="PNG")

    def export_imagefolder(self, folder: str | Path) -> None:
        """`<class>/<number>.png`, 8 bits per channel (clipped); torchvision's ImageFolder reads it.

        Raises UserError where the folder is there and not empty.
        """
        names = _folder_names(self.class_names)
        if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
            raise UserError(f"{folder} is there already and not empty; export to a new folder")
        with publish(Path(folder)) as temporary:
            for i, (pixels, label) in enumerate(zip(self.pixels(), self.labels.tolist(), strict=True)):
                target = temporary / names[label] / f"{i:05d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                to_image(pixels).save(target)

    def export_parquet(self, path: str | Path) -> None:
        """One Parquet file in Hugging Face's image layout; `datasets.load_dataset("parquet", ...)` reads it."""
        rows = [{"bytes": _png(p), "path": f"{i:05d}.png"} for i, p in enumerate(self.pixels())]
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": self.class_names}}
        kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
        table = pa.table([pa.array(rows, kind.field("image").type), self.labels.numpy()], schema=kind)
        with publish(Path(path)) as temporary:
            pq.write_table(
                table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), temporary
            )

    def export_pt(self, path: str | Path) -> None:
        """A plain `.pt` with images, labels and the card; loads with `torch.load(path, weights_only=True)`."""
        with publish(Path(path)) as temporary:
            torch.save({"images": self.images, "labels": self.labels, "card": self.card}, temporary)


def load(folder: str | Path) -> SyntheticSet:
    """Read a synthetic set.

    Raises UserError where the folder holds none.
    """
    folder = Path(folder)
    if (folder / "synthetic").is_dir():
        folder = folder / "synthetic"
    try:
        saved = tensors.load(folder / "synthetic.safetensors")
        card = json.loads((folder / "card.json").read_text())
        shots = tensors.load(folder / "snapshots.safetensors") if (folder / "snapshots.safetensors").exists() else {}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no synthetic set; run `distill-at-scale distill CONFIG` first") from None
    except Exception as error:
        raise UserError(f"the synthetic set in {folder} is damaged: {error}") from None
    return SyntheticSet(saved["images"], saved["labels"], card, {int(k): v for k, v in sorted(shots.items())})


def to_uint8(images: Tensor, normalization: Normalization) -> Tensor:
    return (normalization.invert(images) * 255).round().clamp(0, 255).to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> a picture, grey for one channel."""
    array = pixels.numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def grid(pixels: Tensor, columns: int, side: int = PREVIEW_SIDE, gap: int = 2) -> Image.Image:
    """uint8 [n, C, H, W] -> one picture of n tiles, row by row, each enlarged without smoothing to at least `side`."""
    factor = max(1, math.ceil(side / pixels.shape[-1]))
    cell = pixels.shape[-1] * factor + gap
    rows = math.ceil(len(pixels) / columns)
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap), "white")
    for i, tile in enumerate(pixels):
        picture = to_image(tile).resize((cell - gap, cell - gap), Image.Resampling.NEAREST)
        sheet.paste(picture, (i % columns * cell + gap, i // columns * cell + gap))
    return sheet


def preview(synthetic: SyntheticSet) -> Image.Image:
    """The first images of the first classes: a row of classes at one image per class, else a row per class."""
    ipc = max(1, len(synthetic.labels) // max(1, len(synthetic.class_names)))
    columns = PREVIEW_COLUMNS if ipc == 1 else min(ipc, PREVIEW_COLUMNS)
    shown = synthetic.pixels()[: ipc * PREVIEW_CLASSES].view(-1, ipc, *synthetic.images.shape[1:])[:, :columns]
    return grid(shown.flatten(0, 1), columns)


def _png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _folder_names(names: list[str]) -> list[str]:
    """Class names made safe as folder names; one that is unusable or taken gets its label's number."""
    found: list[str] = []
    for label, name in enumerate(names):
        safe = "".join("_" if c in (os.sep, "/", "\\", "\0") else c for c in name).strip()
        usable = safe not in ("", ".", "..") and safe.casefold() not in {other.casefold() for other in found}
        found.append(safe if usable else f"class-{label}")
    return found

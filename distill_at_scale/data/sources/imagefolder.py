"""Images in one folder per class: `train/<class>/*.JPEG`, and `val/` or `test/` where there is one.

Ids are the POSIX paths relative to the root, split included. Without a `train` folder, class folders right below the
root are the training split. Classes are in the order of their sorted names, from the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config import DataSection
from distill_at_scale.data.sources.base import data_root, listing, split_of
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import digest

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class ImageFolder:
    def __init__(self, config: DataSection) -> None:
        self.config, self.root = config, data_root(config)
        folders = {split_of(p.name): p for p in sorted(self.root.iterdir()) if p.is_dir()}
        self.folders: dict[str, Path] = {split: folders[split] for split in ("train", "test") if split in folders}
        if "train" not in self.folders:
            self.folders["train"] = self.root
        train = self.folders["train"]
        others = {folder for folder in self.folders.values() if folder != train}
        self.class_names = [p.name for p in _visible_folders(train) if p not in others]
        if not self.class_names:
            raise UserError(f"{train} holds no class folders; the layout is train/<class>/<image>.jpg")

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.folders]

    def listing(self, split: str) -> pa.Table:
        """Raises UserError for a class folder that the training split does not have, or where there is no image."""
        folder, paths, labels = self.folders[split], [], []
        known = {name: label for label, name in enumerate(self.class_names)}
        if split == "test" and (extra := [p.name for p in _visible_folders(folder) if p.name not in known]):
            raise UserError(f"{folder / extra[0]} is a class that {self.folders['train']} does not have")
        for name, label in known.items():
            found = _images(folder / name)
            paths += [path.relative_to(self.root).as_posix() for path in found]
            labels += [label] * len(found)
        if not paths:
            raise UserError(f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
        return listing(paths, labels, paths, [0] * len(paths))

    def digest(self, split: str) -> str:
        paths = self.listing(split)["location"].to_pylist()
        return digest([(path, _size(self.root / path)) for path in paths])

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        try:
            return [(self.root / path).read_bytes() for path in rows["location"].to_pylist()]
        except FileNotFoundError:
            data_root(self.config)  # all of it gone is no matter of one sample
            raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # a dangling link; reading it rejects the sample


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return sorted(found, key=lambda p: p.as_posix())

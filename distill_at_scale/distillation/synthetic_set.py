"""The result: a synthetic set with everything needed to use it, saved without pickles and exported to common layouts.

`synthetic.safetensors` holds images (float32, normalised, [n, C, H, W], clips [n, T, C, H, W], or arrays of another shape),
labels (int64 [n]) and what else the method made (a soft label per image, for example); `card.json` says what the numbers
mean, and `whitening.safetensors` is there where they are whitened. What is large and mostly not wanted (the labels of
views, the teacher behind them) lies in files of its own, which are read when asked for. `load(folder)` is the one call that
a user needs. The layouts themselves are in `distillation/export.py`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import Frames, grid, png, to_pixels
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.prepared.whitening import Whitening
from distill_at_scale.distillation import export as exports
from distill_at_scale.distillation.multi_formation import parts_of
from distill_at_scale.distillation.soft_labels import StoredLabels, Teacher, TeacherFacts, TeacherLabels
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.storage.filesystem import shown
from distill_at_scale.storage.object_store import is_remote
from distill_at_scale.storage.sync import fetched

APART = ("labels", "teacher")  # extras called `labels/...` lie in labels.safetensors, and so on
SET = "synthetic"  # its folder in a run's
PREVIEW_CLASSES, PREVIEW_COLUMNS, PREVIEW_SIDE = 100, 10, 64
PREVIEW_BYTES = 4 * 2**20  # uncompressed, of the clips in an animated preview


@dataclass
class SyntheticSet:
    """images float32 [n, C, H, W], or clips [n, T, C, H, W] (normalised as the card says), labels int64 [n]."""

    images: Tensor
    labels: Tensor
    card: dict[str, Any]
    snapshots: dict[int, Tensor] = field(default_factory=dict)  # step -> `values` of the first of the set, then
    extras: dict[str, Tensor] = field(default_factory=dict)  # what else the method made: soft labels, a learned rate
    whitening: Whitening | None = None  # of the images, where the card speaks of one
    folder: Path | None = None  # from which it was loaded

    @property
    def normalization(self) -> Normalization:
        return Normalization.of_card(self.card["normalization"], self.whitening)

    @property
    def kind(self) -> str:
        """What the samples are: images, clips or tensors (arrays of another meaning)."""
        return self.card.get("kind") or ("clips" if self.images.dim() == 5 else "images")

    @property
    def class_names(self) -> list[str]:
        return self.card["class_names"]

    @property
    def protocol(self) -> TrainingProtocol:
        """The training that the set expects."""
        return TrainingProtocol.of(self.card["protocol"])

    def training_set(self) -> TrainingSet:
        """What a network is trained on: the images, taken apart where one holds several (IDC), with their labels."""
        factor = self.card.get("formation", 1)
        images, labels = parts_of(self.images, factor), self.labels.repeat_interleave(factor**2)
        soft = {key: value for key, value in self.extras.items() if "/" not in key}
        views = self._views() if self.protocol.labels == "views" else None
        return TrainingSet(images, labels, soft=soft, views=views)

    def _views(self) -> StoredLabels:
        held = self.apart("labels")
        if "values" not in held or held["values"].shape[1:2] != self.labels.shape:
            raise UserError(
                f"the set{f' in {self.folder}' if self.folder else ''} lacks the labels of its views (labels.safetensors, for "
                f"{len(self.labels)} images); load it from the folder that it was saved in, or distil again"
            )
        return StoredLabels.of_tensors(held, len(self.class_names))

    def apart(self, name: str) -> dict[str, Tensor]:
        """Tensors of a group of its own, "labels" or "teacher", read if they are not in memory; empty if there are none.

        Raises UserError where their file is damaged or gone.
        """
        held = {key.partition("/")[2]: value for key, value in self.extras.items() if key.startswith(f"{name}/")}
        if held or self.folder is None:
            return held
        path = self.folder / f"{name}.safetensors"
        try:
            return safetensors_io.load(path)
        except Exception as error:
            raise UserError(f"{path} cannot be read ({error}), and the set needs it; distil again") from None

    def teacher(self, device: torch.device, network: str | None = None) -> Teacher:
        """The network whose answers are the labels of the views.

        Where it is a user's own code, `network` must name it: a card alone runs nothing. Raises UserError.
        """
        facts = TeacherFacts.of(self.card["teacher"]).trusted(network)
        return Teacher.of(facts, self.apart("teacher"), device)

    def asked(self, device: torch.device, network: str | None = None) -> TeacherLabels:
        """The teacher, asked under the very protocol that the set's own labels were made by; `network` as of `teacher`."""
        facts = self.card["soft_labels"]
        return TeacherLabels(self.teacher(device, network), facts["epochs"], facts["top_k"], self.protocol.temperature)

    def pixels(self) -> Tensor:
        """uint8 [n, C, H, W] or [n, T, C, H, W], clipped to what can be shown.

        Raises UserError where the set holds neither images nor clips.
        """
        if self.kind == "tensors":
            raise UserError(
                "the set holds arrays, which have no pixels; values() gives them on the scale of the real data"
            )
        return self.values()

    def values(self) -> Tensor:
        """The samples as real ones are stored: uint8 pixels, or the numbers of other arrays as float32 [n, *shape]."""
        return self.normalization.stored(self.images)

    def save(self, folder: Path) -> None:
        """Publish the set as a folder, in one step."""
        with publish(folder) as temporary:
            temporary.mkdir()
            held = {"images": self.images, "labels": self.labels}
            plain = {key: value for key, value in self.extras.items() if "/" not in key}
            safetensors_io.write(temporary / "synthetic.safetensors", held | plain)
            for name in APART:
                self._write_apart(temporary, name)
            if self.snapshots:
                shots = {f"{step:08d}": pixels for step, pixels in self.snapshots.items()}
                safetensors_io.write(temporary / "snapshots.safetensors", shots)
            if self.whitening is not None:
                self.whitening.save(temporary)
            (temporary / "card.json").write_text(json.dumps(self.card, indent=1) + "\n")
            (temporary / "preview.png").write_bytes(png(preview(self)))

    def _write_apart(self, folder: Path, name: str) -> None:
        file = f"{name}.safetensors"
        if any(key.startswith(f"{name}/") for key in self.extras):
            safetensors_io.write(folder / file, self.apart(name))
        elif self.folder is not None and (self.folder / file).exists():
            shutil.copyfile(self.folder / file, folder / file)

    def export_imagefolder(self, folder: str | Path) -> None:
        """`<class>/<number>.png`, 8 bits per channel (clipped); torchvision's ImageFolder reads it.

        Clips become one folder of frames each, `<class>/<number>/00000.png` and so on, the "rawframes" of video toolkits.
        Raises UserError where the folder is there and not empty, and where the set holds neither images nor clips.
        """
        self._need_pictures()
        exports.imagefolder(Path(folder), *self._shown())

    def export_videofolder(self, folder: str | Path) -> None:
        """Clips as `<class>/<number>.mp4`, which every player and video loader reads, and a `card.json` beside the classes.

        Lossy, though barely (43 dB on coloured noise), and every pixel becomes 2 x 2: the card says so.
        Raises UserError where the set holds images, and where the folder is there and not empty.
        """
        self._need_pictures()
        exports.videofolder(Path(folder), *self._shown(), self.card)

    def export_parquet(self, path: str | Path) -> None:
        """One Parquet file in Hugging Face's layout; `datasets.load_dataset("parquet", ...)` reads it.

        Columns: label and `image`, or of clips `frames`, a list of images; of other arrays `values`, nested lists of float32,
        which `data.source: tensors` reads again.
        """
        write = exports.value_parquet if self.kind == "tensors" else exports.parquet
        write(Path(path), *self._shown())

    def _need_pictures(self) -> None:
        if self.kind == "tensors":
            raise UserError("the set holds arrays that are no images; use export_parquet or export_pt")

    def _shown(self) -> tuple[exports.Array, list[int], list[str]]:
        return self.values().numpy(), self.labels.tolist(), self.class_names

    def export_pt(self, path: str | Path) -> None:
        """A plain `.pt` with images, labels and the card; loads with `torch.load(path, weights_only=True)`.

        Where the images are whitened, it also holds whitening_mean and whitening_matrix. The labels of views are not in it.
        """
        with publish(Path(path)) as temporary:
            held = {"images": self.images, "labels": self.labels, "card": self.card}
            if self.whitening is not None:
                held |= {"whitening_mean": self.whitening.mean, "whitening_matrix": self.whitening.matrix}
            plain = {key: value for key, value in self.extras.items() if "/" not in key}
            torch.save(held | plain, temporary)


def load(folder: str | Path) -> SyntheticSet:
    """Read a synthetic set from a folder on a disk or, by its URI, on object storage.

    Raises UserError where the folder holds none.
    """
    named = shown(str(folder))
    folder = fetched(str(folder), SET) if is_remote(folder) else Path(folder)
    if (folder / SET).is_dir():
        folder = folder / SET
    try:
        saved = safetensors_io.load(folder / "synthetic.safetensors")
        card = json.loads((folder / "card.json").read_text())
        whitening = Whitening.load(folder) if card.get("whitening") else None
        shots = (
            safetensors_io.load(folder / "snapshots.safetensors") if (folder / "snapshots.safetensors").exists() else {}
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{named} holds no synthetic set; run `distill-at-scale distill CONFIG` first") from None
    except Exception as error:
        raise UserError(f"the synthetic set in {named} is damaged: {error}") from None
    if wrong := _wrong(saved, card):
        raise UserError(f"the synthetic set in {named} is damaged: {wrong}")
    Normalization.of_card(card["normalization"])
    images, labels = saved.pop("images"), saved.pop("labels")
    snapshots = {int(k): v for k, v in sorted(shots.items()) if k.isdecimal()}
    return SyntheticSet(images, labels, card, snapshots, saved, whitening, folder)


def _wrong(saved: dict[str, Tensor], card: Any) -> str | None:
    """What is wrong with a set that somebody gave: its tensors and its card must speak of the same samples and classes."""
    names = card.get("class_names") if isinstance(card, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its card does not list class_names"
    if not isinstance(card.get("normalization"), dict) or not isinstance(card.get("protocol", {}), dict):
        return "its card lacks the normalization, or its protocol is none"
    images, labels = saved.get("images"), saved.get("labels")
    if images is None or images.dtype != torch.float32 or images.dim() < 2 or not torch.isfinite(images).all():
        return "it lacks images [n, *shape] of finite float32"
    if labels is None or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"it lacks labels int64 [{len(images)}]"
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        return f"a label is outside 0..{len(names) - 1}"
    return None


def preview(synthetic: SyntheticSet) -> Frames:
    """The first samples of the first classes: a row of classes at one sample per class, else a row per class.

    One picture of images, one per frame of clips; of these as many as PREVIEW_BYTES allow.
    """
    ipc = max(1, len(synthetic.labels) // max(1, len(synthetic.class_names)))
    columns = PREVIEW_COLUMNS if ipc == 1 else min(ipc, PREVIEW_COLUMNS)
    shown = torch.from_numpy(to_pixels(synthetic.values()[: ipc * PREVIEW_CLASSES].numpy()))
    shown = shown[: ipc * PREVIEW_CLASSES].unflatten(0, (-1, ipc))[:, :columns].flatten(0, 1)
    if shown.dim() == 5:
        fit = max(1, PREVIEW_BYTES // shown[0].numel())
        columns = min(columns, fit)
        shown = shown[: fit - fit % columns]
    return grid(shown.numpy(), columns, PREVIEW_SIDE)

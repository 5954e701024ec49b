"""The result of a distillation: a synthetic set with everything needed to use it, saved without pickles.

The files and the card are described in `distillation/README.md`; the exports are in `export.py`.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import Frames, grid, png, to_pixels
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.prepared.whitening import Whitening
from distill_at_scale.distillation import export
from distill_at_scale.distillation.multi_formation import split_parts
from distill_at_scale.distillation.soft_labels import StoredLabels, Teacher, TeacherFacts, TeacherLabels
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.distillation.train_loader import TrainLoader
from distill_at_scale.storage.filesystem import redact_uri
from distill_at_scale.storage.object_store import is_remote
from distill_at_scale.storage.sync import fetched

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Transform

GROUPS = ("teacher",)  # extras named `teacher/...` are saved in teacher.safetensors
SET, CARD, LABELS = "synthetic", "card.json", "labels"  # the folder in a run folder, and a file and a folder in it
AGAIN = "restore it from a copy, or distil again with run.redo=distill"
PREVIEW_CLASSES, PREVIEW_COLUMNS, PREVIEW_SIDE = 100, 10, 64
PREVIEW_BYTES = 4 * 2**20  # uncompressed, of an animated preview


@dataclass
class SyntheticSet:
    """Distilled samples with their labels and their card.

    **The images are normalised already**: give them to a network as they are, and give it real images only through
    `test_transform()`. A second normalisation ruins the accuracy without an error.

    `len(s)` is the number of stored samples, `s[i]` is (sample, label), and `s[:10]` is a pair of tensors.

    Attributes:
        images: float32 [n, C, H, W], clips [n, T, C, H, W] or tensors [n, *shape], normalised as the card says.
        labels: int64 [n], indices into `class_names`.
        card: the content of card.json: normalisation, training protocol, method and its options, fingerprints.
        snapshots: step -> stored values (as from `values`) of the first samples before that step.
        extras: other tensors of the method: soft labels, for example.
        whitening: of the images, if the card has one.
        folder: from which the set was loaded.
        labels_of_views: folder with the soft labels of views, one file per epoch (`soft_labels.StoredLabels`).
    """

    images: Tensor
    labels: Tensor
    card: dict[str, Any]
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    whitening: Whitening | None = None
    folder: Path | None = None
    labels_of_views: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        """For an int: (float32 of one sample's shape, int); for a slice or a list of indices: tensors [k, *shape], [k]."""
        if hasattr(index, "__index__"):
            return self.images[operator.index(index)], int(self.labels[operator.index(index)])
        return self.images[index], self.labels[index]

    @property
    def normalization(self) -> Normalization:
        return Normalization.of_card(self.card["normalization"], self.whitening)

    @property
    def kind(self) -> str:
        """images, clips or tensors (arrays of any other meaning)."""
        return self.card.get("kind") or ("clips" if self.images.dim() == 5 else "images")

    @property
    def class_names(self) -> list[str]:
        return self.card["class_names"]

    @property
    def protocol(self) -> TrainingProtocol:
        """The training that the set expects."""
        return TrainingProtocol.from_card(self.card["protocol"])

    def training_set(self) -> TrainingSet:
        """The images and labels that a network trains on; multi-formation images (IDC) are split into their parts.

        Raises UserError if the set lacks the labels of its views.
        """
        (images, labels), views = self._parts(), None
        if self.protocol.labels == "views":
            count = self.card.get("soft_labels", {}).get("epochs", 0)
            views = StoredLabels(self.labels_of_views or Path(LABELS), count, len(self.class_names))
            if not count or (problem := views.problem(len(self.labels))):
                raise UserError(
                    f"the set{f' in {self.folder}' if self.folder else ''} lacks the labels of its views"
                    f"{f': {problem}' if count else ''}; load it from the folder that it was saved in, or distil again"
                )
        return TrainingSet(images, labels, soft=self.small_extras, views=views)

    def as_dataset(self) -> TensorDataset:
        """A torch dataset of (float32 *shape, label int64 []), normalised already, for a DataLoader with any options.

        Multi-formation images (IDC) are split into their parts, so it may be longer than the set. The labels are hard, also
        where the set has soft labels; `train_loader` has those.
        """
        images, labels = self._parts()
        return TensorDataset(images, labels)

    def train_loader(
        self, batch_size: int | None = None, shuffle: bool = True, seed: int = 0, augment: bool = True
    ) -> TrainLoader:
        """Batches (images, targets) of the training that the set expects; each iteration is the next epoch.

        Images are float32 [b, *shape], normalised already. With `augment` they have the augmentation of `s.protocol`.
        Targets are int64 [b], for `F.cross_entropy`. They are probabilities, float32 [b, classes], if the protocol mixes
        images (CutMix) or has soft labels: per image (tesla) or for the views of each epoch (sre2l, rded), at the
        temperature `s.protocol.temperature`. `F.cross_entropy` takes both. The protocol also has the epochs, the optimizer
        and the learning rate.

        Args:
            batch_size: images per batch; None: as in the protocol. Labels of views exist for the protocol's batches only.
            shuffle: a new order for each epoch.
            seed: decides order and augmentation; the global random state is neither read nor changed.
            augment: False: images as stored. A set with labels of views then has hard labels.

        Raises:
            UserError: the set has labels of views, and another batch size or order is wanted; or its labels are missing.
        """
        classes = len(self.class_names)
        return TrainLoader(self.training_set(), self.protocol, classes, batch_size, shuffle, seed, augment)

    def test_transform(self, resize: str | None = None) -> Transform:
        """The transform (torchvision.transforms.v2) of real images for a network that is trained on the set.

        It takes a PIL image or a uint8 tensor [..., C, H, W] of any size, and gives float32 [..., *shape]: resized as by
        ingest, then normalised (and whitened) as the card says. For clips it takes the frames that are used, uint8 [T, C,
        H, W]. For other arrays it takes tensors on the scale of the real data, and only normalises.

        Args:
            resize: "square" or "crop" (`data.resize`), for a set whose card does not say it.

        Raises:
            UserError: neither the card nor `resize` says how images are resized.
        """
        from distill_at_scale.distillation.prepared_transform import prepared_transform  # loads torchvision

        return prepared_transform(self.card, self.images.shape[1:], self.normalization, resize)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Images and labels to train on; multi-formation images (IDC) are split into their parts."""
        factor = self.card.get("formation", 1)
        return split_parts(self.images, factor), self.labels.repeat_interleave(factor**2)

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group of extras, "teacher", read from its file if necessary; {} without them.

        Raises UserError if the file is damaged or missing.
        """
        tensors = {key.partition("/")[2]: value for key, value in self.extras.items() if key.startswith(f"{name}/")}
        if tensors or self.folder is None:
            return tensors
        path = self.folder / f"{name}.safetensors"
        try:
            return safetensors_io.load(path)
        except Exception as error:
            raise UserError(f"{path} cannot be read ({error}), and the set needs it; distil again") from None

    def teacher(self, device: torch.device, network: str | None = None) -> Teacher:
        """The network whose logits are the labels of the views.

        Raises UserError if the teacher is custom code that `network` does not name: a card never runs code.
        """
        facts = TeacherFacts.from_card(self.card["teacher"]).trusted(network)
        return Teacher.from_state(facts, self.group("teacher"), device)

    def teacher_labels(self, device: torch.device, network: str | None = None) -> TeacherLabels:
        """Labels of any views by the same teacher and protocol as the set's own; `network` as in `teacher`."""
        facts = self.card["soft_labels"]
        return TeacherLabels(self.teacher(device, network), facts["epochs"], facts["top_k"], self.protocol.temperature)

    def pixels(self) -> Tensor:
        """uint8 [n, C, H, W] or [n, T, C, H, W], clipped to 0..255. Raises UserError for a set of tensors."""
        if self.kind == "tensors":
            raise UserError("the set holds arrays, which have no pixels; values() has them on their own scale")
        return self.values()

    def values(self) -> Tensor:
        """The samples on the scale of the real data: uint8 pixels, or float32 [n, *shape] for tensors."""
        return self.normalization.stored(self.images)

    def save(self, folder: Path) -> None:
        """Write the set to a folder, atomically."""
        with publish(folder) as temporary:
            temporary.mkdir()
            tensors = {"images": self.images, "labels": self.labels, **self.small_extras}
            safetensors_io.write(temporary / "synthetic.safetensors", tensors)
            for name in GROUPS:
                file = f"{name}.safetensors"
                if any(key.startswith(f"{name}/") for key in self.extras):
                    safetensors_io.write(temporary / file, self.group(name))
                elif self.folder is not None and (self.folder / file).exists():
                    shutil.copyfile(self.folder / file, temporary / file)
            if self.labels_of_views is not None and self.labels_of_views.is_dir():
                shutil.copytree(self.labels_of_views, temporary / LABELS, copy_function=shutil.copyfile)
            if self.snapshots:
                snapshots = {f"{step:08d}": values for step, values in self.snapshots.items()}
                safetensors_io.write(temporary / "snapshots.safetensors", snapshots)
            if self.whitening is not None:
                self.whitening.save(temporary)
            (temporary / CARD).write_text(json.dumps(self.card, indent=1) + "\n", encoding="utf-8")
            (temporary / "preview.png").write_bytes(png(preview(self)))

    export_imagefolder, export_videofolder = export.export_imagefolder, export.export_videofolder
    export_parquet, export_pt = export.export_parquet, export.export_pt

    @property
    def small_extras(self) -> dict[str, Tensor]:
        """The extras that are saved with the images."""
        return {key: value for key, value in self.extras.items() if "/" not in key}


def publish_in_run(synthetic: SyntheticSet, target: Path, facts: Mapping[str, Any]) -> None:
    """Copy a set loaded from its folder to a run folder, atomically, with facts about the run in its card."""
    assert synthetic.folder is not None
    synthetic.card |= facts
    with publish(target) as temporary:
        shutil.copytree(synthetic.folder, temporary, copy_function=shutil.copyfile)
        (temporary / CARD).write_text(json.dumps(synthetic.card, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path) -> SyntheticSet:
    """Read a synthetic set.

    Args:
        folder: the set's folder or a run folder, on a disk or by its URI in an object store.

    Raises:
        UserError: the folder holds no set, or the set is damaged.
    """
    name = redact_uri(str(folder))
    folder = fetched(str(folder), SET) if is_remote(folder) else Path(folder)
    if (folder / SET).is_dir():
        folder = folder / SET
    try:
        tensors = safetensors_io.load(folder / "synthetic.safetensors")
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        whitening = Whitening.load(folder) if card.get("whitening") else None
        path = folder / "snapshots.safetensors"
        snapshots = safetensors_io.load(path) if path.exists() else {}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} holds no synthetic set; run `distill-at-scale distill CONFIG` first") from None
    except Exception as error:
        raise UserError(f"the synthetic set in {name} is damaged: {error}; {AGAIN}") from None
    if problem := _problem(tensors, card):
        raise UserError(f"the synthetic set in {name} is damaged: {problem}; {AGAIN}")
    Normalization.of_card(card["normalization"])
    images, labels = tensors.pop("images"), tensors.pop("labels")
    by_step = {int(k): v for k, v in sorted(snapshots.items()) if k.isdecimal()}
    of_views = folder / LABELS
    return SyntheticSet(
        images, labels, card, by_step, tensors, whitening, folder, of_views if of_views.is_dir() else None
    )


def _problem(tensors: dict[str, Tensor], card: Any) -> str | None:
    """The first problem of an untrusted set: its tensors and its card must describe the same samples and classes."""
    names = card.get("class_names") if isinstance(card, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its card does not list class_names"
    if not isinstance(card.get("normalization"), dict) or not isinstance(card.get("protocol", {}), dict):
        return "its card lacks the normalization, or its protocol is not an object"
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or images.dtype != torch.float32 or images.dim() < 2 or not torch.isfinite(images).all():
        return "it lacks images [n, *shape] of finite float32"
    if labels is None or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"it lacks labels int64 [{len(images)}]"
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        return f"a label is outside 0..{len(names) - 1}"
    return None


def preview(synthetic: SyntheticSet) -> Frames:
    """A grid of the first samples of the first classes; one row per class, or rows of classes at one sample per class.

    One picture for images, one per frame for clips, of as many samples as fit into PREVIEW_BYTES.
    """
    ipc = max(1, len(synthetic.labels) // max(1, len(synthetic.class_names)))
    columns = PREVIEW_COLUMNS if ipc == 1 else min(ipc, PREVIEW_COLUMNS)
    samples = torch.from_numpy(to_pixels(synthetic.values()[: ipc * PREVIEW_CLASSES].numpy()))
    samples = samples[: ipc * PREVIEW_CLASSES].unflatten(0, (-1, ipc))[:, :columns].flatten(0, 1)
    if samples.dim() == 5:
        fit = max(1, PREVIEW_BYTES // samples[0].numel())
        columns = min(columns, fit)
        samples = samples[: fit - fit % columns]
    return grid(samples.numpy(), columns, PREVIEW_SIDE)

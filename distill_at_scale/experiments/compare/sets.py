"""The sets of a comparison: their tensors, their bytes, and real samples of the same size.

Bytes are those on disk: the image (a synthetic one in float32; a real one as in `prepared/`: uint8, above 128 pixels JPEG), 8
bytes for its class, and its soft labels. One soft label per image takes 4 bytes per class. Labels of views take 2 bytes per
class for every labelled epoch, as in `labels/`. The teacher is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill_at_scale.config.experiments import CompareSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation.multi_formation import assemble_parts
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.selection.ranking import build_ranking

Kind = Literal["distilled", "external", "tiles", "baseline", "full"]
CLASS_BYTES = 8  # of a label, int64
EASIEST = ("loss", "loss_early", "loss_converged", "el2n")  # criteria whose lowest scores are the easiest samples
COLUMNS = {"herding": ("herding",), "k_center": ("k_center",), "easiest": EASIEST, "cad": ("cad",)}


@dataclass(frozen=True)
class SetTensors:
    """Images float32 [n, *shape] in the first run's normalisation, labels int64 [n], and learned soft labels.

    `stored` images hold the n training images (IDC stores several in one); a stored value takes `value_bytes` on disk. `crop`
    is that of the set's own training (pca).
    """

    images: Tensor
    labels: Tensor
    stored: int
    value_bytes: int
    soft: Tensor | None = None
    crop: tuple[float, float] | None = None

    def entry(self, name: str, kind: Kind, cost: float | None, folder: Path) -> Entry:
        """Write the tensors to a file in `folder`; returns the entry of the set."""
        file = folder / f"{digest(name)[:16]}.safetensors"
        soft = {} if self.soft is None else {"soft_labels": self.soft}
        safetensors_io.save(file, {"images": self.images, "labels": self.labels, **soft})
        size, training = self.images[0].numel() * self.value_bytes, len(self.labels)
        return Entry(name, kind, size, self.stored, training, cost=cost, file=file, own_soft=bool(soft), crop=self.crop)


def tensors_of(synthetic: SyntheticSet, normalization: Normalization) -> SetTensors:
    """A distilled set in another normalisation than its own, with its learned soft labels at temperature 1."""
    data, own = synthetic.training_set(), synthetic.normalization
    images, soft = data.images, data.soft.get("soft_labels")
    if own != normalization or own.whitening is not None or normalization.whitening is not None:
        images = normalization.apply(own.invert(images) * own.scale)
    soft = None if soft is None else soft / synthetic.protocol.temperature
    return SetTensors(images, data.labels, len(synthetic), 4, soft, synthetic.protocol.crop)


def tiles(
    run_manifest: Path, data: PreparedDataset, normalization: Normalization, ipc: int, factor: int,
    crop: tuple[float, float] | None,
) -> SetTensors:  # fmt: skip
    """The set of the method pca: of each class the samples that a manifest ranks first, factor x factor of them per image.

    A class with too few samples gets fewer images. Raises UserError for a class with too few for one image.
    """
    ranks, images, labels = manifest.read(run_manifest, ["rank"])[0]["rank"].to_numpy(), [], list[int]()
    for label, own in enumerate(np.split(ranks, np.cumsum(data.counts("train"))[:-1])):
        order = np.argsort(own, kind="stable")
        order = order[own[order] != manifest.HELD_OUT]
        number = min(ipc, len(order) // factor**2)
        if not number:
            name = data.class_names[label]
            raise UserError(
                f"the class {name!r} has fewer than {factor**2} samples for one image; lower distill.pca.factor"
            )
        places = order[: number * factor**2]
        pixels = torch.from_numpy(data.take("train", label, np.sort(places))[np.argsort(np.argsort(places))])
        images.append(assemble_parts(normalization.apply(pixels), factor))
        labels += [label] * number
    return SetTensors(torch.cat(images), torch.tensor(labels), len(labels), 4, crop=crop)


def label_bytes(labels: str, classes: int, section: CompareSection, epochs: int) -> int:
    """Bytes of the labels of one training image: its class, and soft labels."""
    if labels == "hard":
        return CLASS_BYTES
    if labels == "soft":
        return CLASS_BYTES + 4 * classes
    top_k = section.teacher.top_k
    each = 2 * classes if top_k is None or top_k >= classes else 4 * top_k
    return CLASS_BYTES + min(epochs, section.teacher.label_epochs) * each


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard: a set with its tensors, or real samples at one budget.

    Attributes:
        name: of a set, or of a baseline.
        per_class: of a baseline, its samples per class for each kind of labels; empty for sets and the whole training split.
        stored, training: stored images of a set, and the images that networks see (IDC stores several in one).
        image_bytes: of one stored image.
        cost: seconds of scoring, of selection and the search for it, and of distillation; None if unknown.
        file: of its tensors, or of the order in which its samples are taken.
    """

    name: str
    kind: Kind
    image_bytes: int
    stored: int = 0
    training: int = 0
    budget: str = ""
    per_class: Mapping[str, int] = field(default_factory=dict)
    cost: float | None = None
    file: Path | None = None
    own_soft: bool = False  # whether it has soft labels of its own
    crop: tuple[float, float] | None = None  # of its images (pca): added to the augmentation of labels hard and soft

    @property
    def title(self) -> str:
        return f"{self.name}, {self.budget}" if self.budget else self.name

    def needs_teacher(self, labels: str) -> bool:
        """Whether these labels are the teacher's."""
        return labels == "views" or (labels == "soft" and not self.own_soft)

    def images(self, labels: str, counts: Sequence[int]) -> tuple[int, int]:
        """Its stored images, and those that networks see, with these labels; `counts` are the training samples per class."""
        if self.kind != "baseline":
            return self.stored, self.training
        number = sum(min(self.per_class[labels], count) for count in counts)
        return number, number

    def bytes(self, labels: str, counts: Sequence[int], each: int) -> int:
        """Its bytes on disk, with labels of `each` bytes per training image."""
        stored, training = self.images(labels, counts)
        return stored * self.image_bytes + training * each


def baselines(sets: Sequence[Entry], names: Mapping[str, Path | None], data: PreparedDataset, section: CompareSection,
              epochs: int, scoring: float) -> list[Entry]:  # fmt: skip
    """The entries of real samples: as many images per class as each set has, or as many as fit into its bytes. Where not even
    one per class fits, it is one, and the budget says so.

    `names` are the baselines that can be drawn, with the files of their orders; `scoring` is the time of the scores in seconds.
    """
    counts, budgets = data.counts("train"), dict[tuple[tuple[str, int], ...], list[str]]()
    for one in sets if "images" in section.budgets else ():
        ipc = max(1, one.stored // len(counts))
        budgets[tuple((labels, ipc) for labels in section.labels)] = [f"{ipc} per class"]
    for one in sets if "bytes" in section.budgets else ():
        fitting, over = [], []
        for labels in section.labels:
            each = label_bytes(labels, len(counts), section, epochs)
            room = one.bytes(labels, counts, each) // (len(counts) * (data.stored_bytes + each))
            fitting.append((labels, max(1, min(max(counts), room))))
            over += [] if room else [labels]
        note = f" (with {' and '.join(over)} labels one image per class is more)" if over else ""
        budgets.setdefault(tuple(fitting), []).append(f"bytes of {one.name}{note}")
    return [
        Entry(name, "baseline", data.stored_bytes, budget="; ".join(texts), per_class=dict(budget),
              cost=scoring if file else 0.0, file=file)
        for name, file in names.items() for budget, texts in budgets.items()
    ]  # fmt: skip


def orders(
    run_scores: Path, wanted: Sequence[str], counts: Sequence[int]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """For each baseline that can be drawn, the positions within each class in its order; for each other one a line that says
    what it needs.

    The order of herding, k_center and cad is that of their useful end; `easiest` takes the lowest losses.
    """
    table, facts = score_table.read(run_scores)
    found, missing = dict[str, dict[str, Tensor]](), []
    for name in wanted:
        column = next((column for column in COLUMNS[name] if column in table.column_names), None)
        if column is None:
            which = COLUMNS[name][0]
            missing.append(
                f"{name}: scores.parquet has no column {which}; add {which} to score.criterion and score again"
            )
            continue
        low = name == "easiest" or facts.get("useful", {}).get(column, "low") == "low"
        keys = build_ranking(column, low, "useful", 0).keys(table[column].to_numpy())
        by_class = enumerate(np.split(keys, np.cumsum(counts)[:-1]))
        found[name] = {str(label): torch.from_numpy(np.argsort(own, kind="stable")) for label, own in by_class}
    return found, missing

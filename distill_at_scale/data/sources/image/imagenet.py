"""ImageNet as it is unpacked: `train/<wnid>/*.JPEG`, and `val/` in class folders or flat with a list of labels.

Classes are the sorted WordNet ids of the training folders. Which lists and mappings are understood is told in
`imagenet_labels.py`; `val_labels` checks them against the images and serves the archives (`imagenet_tar`) as well. The
official test split has no labels and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import listing
from distill_at_scale.data.sources.image import imagenet_labels
from distill_at_scale.data.sources.image.folders import EXTENSIONS, FolderSource, complete, images
from distill_at_scale.data.sources.image.imagenet_labels import Labels
from distill_at_scale.storage.filesystem import Store

GET_LIST = (
    "put the devkit (ILSVRC2012_devkit_t12.tar.gz, as it is or unpacked) or Kaggle's LOC_val_solution.csv there, "
    "or set data.val_labels"
)
GET_MAPPING = "put the devkit (ILSVRC2012_devkit_t12.tar.gz or its meta.mat) there, or set data.synsets"


class Imagenet(FolderSource):
    """The folders; a `val/` without class folders is flat, and a flat `test/` has no labels and is no split."""

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        folder = self.folders.get("test", "")
        if folder.lower().startswith("test") and not self.store.names(folder)[0]:
            del self.folders["test"]

    def listing_of(self, split: str) -> pa.Table:
        """Raises UserError where folders and classes differ, or images and labels do."""
        if split == "test" and not self.store.names(self.folders["test"])[0]:
            paths, sizes = images(self.store, self.folders["test"])
            if not len(paths):
                raise UserError(f"{self.store.place(self.folders['test'])} holds no images; unpack them there")
            ids = paths.to_pylist()
            labels = val_labels(self.store, self.config, ids, self.class_names)
            return listing(paths, labels, paths, [0] * len(ids), sizes)
        if split == "test" and (stray := _stray(self.store, self.folders["test"])):
            raise UserError(
                f"{self.store.place(stray)} lies beside class folders; sort it into its folder or remove it"
            )
        found = super().listing_of(split)
        complete(self, split, found)
        return found


def _stray(store: Store, folder: str) -> str | None:
    return next((f"{folder}/{name}" for name in store.names(folder)[1] if name.lower().endswith(EXTENSIONS)), None)


def val_labels(
    store: Store, config: DataSection, file_names: Sequence[str], class_names: Sequence[str]
) -> list[int]:  # fmt: skip
    """The label (place in `class_names`) of every validation image, in the order of `file_names`.

    `file_names` may carry folders; only their last part counts. The list and the mapping are data.val_labels and
    data.synsets, else those with the usual names near the root of `store`. Raises UserError where list or mapping are
    missing or of the wrong numbering, where a number or WordNet id is unknown, or where images and labels do not match.
    """
    labels = _labels(store, config)
    names = [PurePosixPath(name).name for name in file_names]
    if len(set(names)) != len(names):
        raise UserError(f"two validation images in {store.place()} have the same file name; keep one of them")
    if len(labels.values) != len(names):
        raise UserError(
            f"{labels.place} has {len(labels.values):,} labels for {len(names):,} validation images in {store.place()}; "
            "complete the images, or give the list that belongs to them (data.val_labels)"
        )
    wnids = _wnids(labels, store, config, class_names)
    if labels.stems is None:  # the list speaks of the sorted files
        order = {name: i for i, name in enumerate(sorted(names))}
        wanted = [wnids[order[name]] for name in names]
    else:
        wanted = _by_stem(labels, wnids, names)
    return _places(wanted, names, labels, class_names)


def _labels(store: Store, config: DataSection) -> Labels:
    if config.val_labels is not None:
        return imagenet_labels.read_labels(imagenet_labels.named_file(store, config.val_labels, "data.val_labels"))
    file = next(imagenet_labels.find(store, imagenet_labels.LISTS), None)
    if file is None:
        raise UserError(
            f"the validation images in {store.place()} lie in no class folders and have no list: {GET_LIST}"
        )
    return imagenet_labels.read_labels(file)


def _wnids(labels: Labels, store: Store, config: DataSection, class_names: Sequence[str]) -> list[str]:
    """The WordNet id of every entry of a list."""
    if not labels.numbered:
        return labels.values
    first, known, place = _numbering(labels, store, config, class_names)
    numbers = [int(value) - first for value in labels.values]
    bad = next((i for i, number in enumerate(numbers) if not 0 <= number < len(known)), None)
    if bad is not None:
        hint = " (it seems to number the images, not their classes)" if _counts_up(labels) else ""
        raise UserError(
            f"{labels.place}, label {bad + 1}: {labels.values[bad]} is outside {first}..{first + len(known) - 1}, "
            f"the numbers of {place}{hint}; give the list and the mapping that belong together"
        )
    return [known[number] for number in numbers]


def _numbering(
    labels: Labels, store: Store, config: DataSection, class_names: Sequence[str]
) -> tuple[int, Sequence[str], str]:
    """The first number of a numbering, its WordNet ids in order, and where that is said."""
    if config.synsets is not None:
        mapping = imagenet_labels.read_mapping(imagenet_labels.named_file(store, config.synsets, "data.synsets"))
        if labels.stems is not None:
            return int(mapping.place.endswith(".mat")), mapping.wnids, mapping.place
        mappings = [mapping]
    elif labels.stems is not None:
        file = next(imagenet_labels.find(store, imagenet_labels.SORTED_MAPPINGS), None)
        found = imagenet_labels.read_mapping(file) if file else None
        if found is None or found.devkit:
            return 0, sorted(class_names), "the sorted class folders"
        return 0, found.wnids, found.place
    else:
        names = (*imagenet_labels.DEVKIT_MAPPINGS, *imagenet_labels.SORTED_MAPPINGS)
        mappings = [imagenet_labels.read_mapping(file) for file in imagenet_labels.find(store, names)]
    return _devkit(labels, mappings, store)


def _devkit(
    labels: Labels, mappings: list[imagenet_labels.Mapping], store: Store
) -> tuple[int, Sequence[str], str]:  # fmt: skip
    for mapping in mappings:
        if mapping.devkit:
            return 1, mapping.wnids, mapping.place
    if not mappings:
        raise UserError(
            f"{labels.place} numbers the classes as the devkit does, and nothing near {store.place()} says what the "
            f"numbers mean: {GET_MAPPING}"
        )
    raise UserError(
        f"{labels.place} numbers the classes as the devkit does, but {mappings[0].place} lists them in the order of "
        f"their WordNet ids, which would give wrong labels: {GET_MAPPING}"
    )


def _counts_up(labels: Labels) -> bool:
    return labels.values == [str(number) for number in range(1, len(labels.values) + 1)]


def _by_stem(labels: Labels, wnids: list[str], names: list[str]) -> list[str]:
    given = dict(zip(labels.stems or [], wnids, strict=True))
    missing = [name for name in names if imagenet_labels.stem(name) not in given]
    if missing:
        raise UserError(f"{labels.place} has no label for {missing[0]}; give the list that belongs to these images")
    return [given[imagenet_labels.stem(name)] for name in names]


def _places(
    wanted: list[str], names: list[str], labels: Labels, class_names: Sequence[str]
) -> list[int]:  # fmt: skip
    place = {wnid: i for i, wnid in enumerate(class_names)}
    bad = next((i for i, wnid in enumerate(wanted) if wnid not in place), None)
    if bad is not None:
        raise UserError(
            f"{labels.place}: the class {wanted[bad]!r} of {names[bad]} is not one of the {len(place)} training classes; "
            "complete train/, or give the list that belongs to these images"
        )
    return [place[wnid] for wnid in wanted]

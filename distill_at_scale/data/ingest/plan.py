"""The plan of an ingest: which samples of a source are wanted, their final labels, and fixed chunks of them.

`data/ingest/chunks.py` decodes one chunk and publishes it; `merge.py` sorts all pieces by class into shards. Chunks do not depend on
the number of workers, so neither do the shards. Ray is not needed; `data/ingest/plan.py` uses it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.load import Config, suggest
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import SET_ASIDE, Source
from distill_at_scale.data.sources.class_subsets import class_list, explicit_order
from distill_at_scale.storage.filesystem import shown

CONTRACT = ("splits", "listing", "digest", "read")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class IngestPlan:
    """What is to be ingested: the class names and, per split, the listing with final labels."""

    class_names: list[str]
    source_class_names: list[str]  # every class of the source, in the order of its labels
    listings: dict[str, pa.Table]
    source: str  # content hash of what the source holds
    aside: dict[str, pa.Table] = field(default_factory=dict)  # what the source itself set aside (schema SET_ASIDE)

    def chunks(self, size: int) -> list[tuple[str, int, pa.Table]]:
        """(split, index, rows) of every fixed chunk."""
        return [
            (split, i, table.slice(i * size, size))
            for split, table in self.listings.items()
            for i in range(-(-table.num_rows // size))
        ]

    def on_disk(self, folder: Path) -> IngestPlan:
        """The same plan, whose listings lie in files: every process maps them, and none holds or is sent them."""
        kept = {}
        for split, table in self.listings.items():
            path = listing_path(folder, split)
            with publish(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            kept[split] = mapped(path)
        return replace(self, listings=kept)

    @property
    def samples(self) -> int:
        """Samples that are to be read."""
        return sum(table.num_rows for table in self.listings.values())

    @property
    def known(self) -> int:
        """With those that the source set aside."""
        return self.samples + sum(table.num_rows for table in self.aside.values())


def listing_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.listing"


def mapped(path: Path) -> pa.Table:
    """An Arrow file as a table whose memory is the file."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def open_source(data: DataSection) -> Source:
    return resolve("data.source", data.source, SOURCES, CONTRACT)(data)


def plan(config: Config) -> IngestPlan:
    """List the samples of every split.

    Raises UserError for a missing path, a split without samples, an unknown class, or a class without training samples.
    """
    data = config.data
    source = open_source(data)
    splits = _splits(source, data)
    listings = {name: source.listing(split) for name, split in splits.items()}
    aside = {name: set_aside(source, split) for name, split in splits.items()}
    every = list(source.class_names)
    if data.class_names is not None:
        every, labels = explicit_order(every, data.class_names)
        listings, aside = _relabel_all(listings, labels), _relabel_all(aside, labels)
    names = every
    if data.classes is not None:
        names = _subset(class_list(data.classes), every)
        labels = [names.index(name) if name in names else -1 for name in every]
        listings, aside = _relabel_all(listings, labels), _relabel_all(aside, labels)
    listings = _filled(listings)
    if "test" not in listings and data.holdout:
        listings["train"], listings["test"] = _hold_out(listings["train"], data.holdout, config.run.seed)
    listings = _filled(listings)
    counts = np.bincount(listings["train"]["label"].to_numpy(), minlength=len(names))
    if (empty := np.flatnonzero(counts == 0)).size:
        raise UserError(_without_samples(names, empty, aside.get("train"), shown(data.path or data.source)))
    return IngestPlan(names, every, listings, _content(source, splits, names, every, listings), aside)


def _without_samples(names: list[str], empty: Array, aside: pa.Table | None, place: str) -> str:
    """Which classes have no training sample, why perhaps, and what to do."""
    few = f"the class {names[empty[0]]!r} has no training sample in {place}"
    many = f"{len(empty)} of {len(names)} classes have no training sample in {place}, for example {names[empty[0]]!r}"
    why = ""
    if aside is not None and aside.num_rows:
        mine = aside.filter(np.isin(aside["label"].to_numpy(), [*empty, -1]))
        row = (mine if mine.num_rows else aside).slice(0, 1).to_pylist()[0]
        why = f" ({row['sample_id']}: {row['reason']})"
    action = "complete the data, or name the classes to use in data.classes (a list, or a text file with one a line)"
    return f"{few if len(empty) == 1 else many}{why}; {action}"


def _filled(listings: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Without splits that hold nothing, as a test split may."""
    return {split: table for split, table in listings.items() if table.num_rows or split == "train"}


def _splits(source: Source, data: DataSection) -> dict[str, str]:
    """Our name of each split -> the source's: `data.train_split` is what is distilled.

    Raises UserError where the source has no such split.
    """
    there = source.splits()
    wanted = "train" if data.train_split == "train" else "test"
    if wanted not in there:
        place = shown(data.path or data.source)
        others = {"train": "train", "test": "val"}
        raise UserError(
            f"{place} holds no split {data.train_split!r}, only {', '.join(others[s] for s in there) or 'none'}; complete it, "
            f"or set data.train_split to the one that is to be distilled (with data.holdout for a test split)"
        )
    return {"train": "test"} if wanted == "test" else {split: split for split in there}


def set_aside(source: Source, split: str) -> pa.Table:
    """What a source itself sets aside of a split (schema SET_ASIDE); most sources, nothing."""
    find = getattr(source, "set_aside", None)
    return SET_ASIDE.empty_table() if find is None else find(split)


def _content(
    source: Source, splits: dict[str, str], names: list[str], every: list[str], listings: dict[str, pa.Table]
) -> str:
    """Covers the samples, the classes in their order, and every sample's label."""
    labels = {split: hashlib.sha256(t["label"].to_numpy().tobytes()).hexdigest() for split, t in listings.items()}
    digests = {name: source.digest(split) for name, split in splits.items()}
    return json.dumps([digests, digest([names, every, labels])])


def _subset(wanted: list[str], known: list[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            raise UserError(f"data.classes: {name!r} is not a class of this data set; {suggest(name, known)}")
    if len(set(wanted)) != len(wanted) or not wanted:
        raise UserError("data.classes must name at least one class, and each once")
    return list(wanted)


def _relabel_all(tables: dict[str, pa.Table], labels: list[int]) -> dict[str, pa.Table]:
    return {split: _relabel(table, labels) for split, table in tables.items()}


def _relabel(table: pa.Table, labels: list[int]) -> pa.Table:
    """Labels through a table old -> new; rows whose new label is -1 are left out, those that had none stay without."""
    old = table["label"].to_numpy()
    new = np.where(old < 0, -1, np.array(labels, np.int32)[old])
    return table.set_column(1, "label", pa.array(new, pa.int32())).filter(pa.array((new >= 0) | (old < 0)))


def _hold_out(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """A class-wise random split; which samples are held out depends on ids and seed, not on their order on disk."""
    labels = table["label"].to_numpy()
    by_id = np.asarray(pa.compute.sort_indices(table["sample_id"]))
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = by_id[labels[by_id] == label]
        order = rng.numpy_generator(seed, "holdout", int(label)).permutation(len(members))
        held[members[order[: int(share * len(members) + 0.5)]]] = True
    return table.filter(pa.array(~held)), table.filter(pa.array(held))

"""Plans an ingest: which samples of a source to read, their final labels, and fixed chunks of them.

`chunks.py` decodes one chunk and publishes it; `merge.py` sorts all part files by class into shards. Chunks do not depend on
the number of workers, so neither do the shards.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.explain import suggest
from distill_at_scale.config.load import Config
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING, SET_ASIDE, Source
from distill_at_scale.data.sources.class_subsets import class_list, explicit_order
from distill_at_scale.storage.filesystem import redact_uri

CONTRACT = ("splits", "listing", "digest", "read")


@dataclass(frozen=True)
class IngestPlan:
    """The class names and, per split, the listing of samples with final labels."""

    class_names: list[str]
    source_class_names: list[str]  # all classes of the source, in the order of its labels
    listings: dict[str, pa.Table]
    source: str  # content hash of the source
    # samples that the source itself rejects (schema SET_ASIDE)
    aside: dict[str, pa.Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # lines of the source on its choices
    origins: dict[str, str] = field(default_factory=dict)  # where a split comes from, if not from the one of its name

    def chunks(self, size: int) -> list[tuple[str, int, pa.Table]]:
        """(split, index, rows) of each chunk."""
        tables = [(s, table, i) for s, table in self.listings.items() for i in range(-(-table.num_rows // size))]
        return [(split, i, table.slice(i * size, size)) for split, table, i in tables]

    def on_disk(self, folder: Path) -> IngestPlan:
        """The same plan with its listings in files, which processes map instead of receiving copies."""
        files = {}
        for split, table in self.listings.items():
            path = listing_path(folder, split)
            with publish(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            files[split] = map_arrow(path)
        return replace(self, listings=files)

    def excerpt(self, classes: int, each: int) -> IngestPlan:
        """About `each` training samples of some classes, and as large a share of the others: neighbours, as they are read."""
        train = self.listings["train"]
        present = np.unique(train["label"].to_numpy())
        labels = present[np.unique(np.linspace(0, len(present) - 1, min(classes, len(present))).astype(int))]
        parts = {}
        for split, table in self.listings.items():
            own, run = table["label"].to_numpy(), max(1, each * table.num_rows // train.num_rows)
            few = table.take(np.sort(np.concatenate([np.flatnonzero(own == label)[:run] for label in labels])))
            column = pa.array(np.searchsorted(labels, few["label"].to_numpy()), pa.int32())
            parts[split] = few.set_column(few.column_names.index("label"), "label", column)
        names = [self.class_names[label] for label in labels]
        return replace(self, class_names=names, listings=_without_empty(parts), aside={})

    @property
    def counts(self) -> dict[str, np.ndarray[Any, Any]]:
        """Split -> samples per class, int [classes]."""
        size = len(self.class_names)
        return {split: np.bincount(table["label"].to_numpy(), minlength=size) for split, table in self.listings.items()}

    def describe(self) -> str:
        """One line: the number of classes, the first and the last; per split the samples, and the least and most per class."""
        names = self.class_names
        shown = ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])
        parts = [f"{len(names):,} class{'es' if len(names) > 1 else ''} ({shown})"]
        for split, counts in self.counts.items():
            least, most = int(counts.argmin()), int(counts.argmax())
            per_class = f"{counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
            if counts[least] == counts[most]:
                per_class = f"{counts[least]:,}"
            total = int(counts.sum())
            name = f"{split} ({self.origins[split]})" if split in self.origins else split
            parts.append(f"{name}: {total:,} sample{'s' if total != 1 else ''}, {per_class} per class")
        return "; ".join(parts)

    @property
    def samples(self) -> int:
        return sum(table.num_rows for table in self.listings.values())

    @property
    def known(self) -> int:
        """Number of samples, including those that the source rejects."""
        return self.samples + sum(table.num_rows for table in self.aside.values())


def listing_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.listing"


def map_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def open_source(data: DataSection) -> Source:
    """Raises UserError if a source of the user's own does not keep the contract."""
    kind = resolve("data.source", data.source, SOURCES, CONTRACT)
    if ":" not in data.source:
        return kind(data)
    try:
        inspect.signature(kind).bind(data)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.source = {data.source!r} cannot be called with the section `data`: {error}") from None
    source: Source = kind(data)
    _check(source, data.source)
    return source


def _check(source: Source, name: str) -> None:
    """Compare what a source of the user's own returns with the contract, except `read`."""
    names, splits = source.class_names, source.splits()
    if not isinstance(names, Sequence) or not names or not all(isinstance(entry, str) for entry in names):
        raise UserError(f"class_names of {name} must be a list of texts, not {names!r:.80}")
    if not isinstance(splits, Sequence) or not splits or not set(splits) <= {"train", "test"}:
        raise UserError(f"splits of {name} must return ['train'] or ['train', 'test'], not {splits!r:.80}")


def _listing(source: Source, split: str, name: str) -> pa.Table:
    """The listing of a split. Raises UserError if that of a user's own source is no listing, or a label is no class."""
    table, classes = source.listing(split), len(source.class_names)
    if ":" not in name:
        return table
    if not isinstance(table, pa.Table) or not set(LISTING.names) <= set(table.column_names):
        raise UserError(f"listing of {name} must return what `listing(...)` of data/sources/base.py builds")
    labels = table["label"].to_numpy()
    if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
        raise UserError(f"listing of {name} has the label {wrong[0]}, but class_names has {classes} classes")
    return table


def plan(config: Config) -> IngestPlan:
    """List the samples of every split.

    Raises UserError for a missing path, a split without samples, an unknown class, or a class without training samples.
    """
    data = config.data
    source = open_source(data)
    splits = _splits(source, data)
    listings = {name: _listing(source, split, data.source) for name, split in splits.items()}
    aside = {name: set_aside(source, split) for name, split in splits.items()}
    origins = {"train": "the val split"} if splits["train"] == "test" else {}
    source_names = list(source.class_names)
    if data.class_names is not None:
        source_names, labels = explicit_order(source_names, data.class_names)
        listings, aside = _relabel(listings, labels), _relabel(aside, labels)
    names = source_names
    if data.classes is not None:
        names = list(class_list(data.classes))
        if odd := [name for name in names if name not in source_names]:
            hint = suggest(odd[0], source_names)
            raise UserError(f"data.classes: {odd[0]!r} is not a class of this data set; {hint}")
        if len(set(names)) != len(names) or not names:
            raise UserError("data.classes must name at least one class, and each once")
        labels = [names.index(name) if name in names else -1 for name in source_names]
        listings, aside = _relabel(listings, labels), _relabel(aside, labels)
    listings = _without_empty(listings)
    notes = list(getattr(source, "notes", list)())
    if len(source_names) == 1:
        notes.append("warning: the data have a single class, which nothing can learn to tell apart; check data.path")
    if "test" in listings and data.holdout:
        notes.append(f"warning: data.holdout = {data.holdout:g} has no effect: the data have a test split of their own")
    elif data.holdout:
        listings["train"], listings["test"] = _hold_out(listings["train"], data.holdout, config.run.seed)
        origins["test"] = "held out"
    listings = _without_empty(listings)
    counts = np.bincount(listings["train"]["label"].to_numpy(), minlength=len(names))
    if (empty := np.flatnonzero(counts == 0)).size:
        raise UserError(_without_samples(names, empty, aside.get("train"), redact_uri(data.path or data.source)))
    # the hash covers the samples, the classes in their order, and the label of each sample
    hashes = {split: hashlib.sha256(t["label"].to_numpy().tobytes()).hexdigest() for split, t in listings.items()}
    digests = {name: source.digest(split) for name, split in splits.items()}
    content = json.dumps([digests, digest([names, source_names, hashes])])
    return IngestPlan(names, source_names, listings, content, aside, tuple(notes), origins)


def _without_samples(names: list[str], empty: np.ndarray[Any, Any], aside: pa.Table | None, place: str) -> str:
    one = f"the class {names[empty[0]]!r} has no training sample in {place}"
    many = f"{len(empty)} of {len(names)} classes have no training sample in {place}, for example {names[empty[0]]!r}"
    why = ""
    if aside is not None and aside.num_rows:
        related = aside.filter(np.isin(aside["label"].to_numpy(), [*empty, -1]))
        row = (related if related.num_rows else aside).slice(0, 1).to_pylist()[0]
        why = f" ({row['sample_id']}: {row['reason']})"
    action = "complete the data, or name the classes to use in data.classes (a list, or a text file with one a line)"
    return f"{one if len(empty) == 1 else many}{why}; {action}"


def _without_empty(listings: dict[str, pa.Table]) -> dict[str, pa.Table]:
    return {split: table for split, table in listings.items() if table.num_rows or split == "train"}


def _splits(source: Source, data: DataSection) -> dict[str, str]:
    """Our name of each split -> the source's. Raises UserError if the source lacks the split `data.train_split`."""
    present = source.splits()
    wanted = "train" if data.train_split == "train" else "test"
    if wanted not in present:
        place, keys = redact_uri(data.path or data.source), {"train": "train", "test": "val"}
        problem = f"{place} holds no split {data.train_split!r}, only {', '.join(keys[s] for s in present) or 'none'}"
        hint = "set data.train_split to the one that is to be distilled (with data.holdout for a test split)"
        raise UserError(f"{problem}; complete it, or {hint}")
    return {"train": "test"} if wanted == "test" else {split: split for split in present}


def set_aside(source: Source, split: str) -> pa.Table:
    """The samples of a split that a source itself rejects (schema SET_ASIDE); most sources reject none."""
    method = getattr(source, "set_aside", None)
    return SET_ASIDE.empty_table() if method is None else method(split)


def _relabel(tables: dict[str, pa.Table], labels: list[int]) -> dict[str, pa.Table]:
    """Maps labels old -> new. Drops rows whose new label is -1, except rows that had no label."""
    relabelled = {}
    for split, table in tables.items():
        old = table["label"].to_numpy()
        new = np.where(old < 0, -1, np.array(labels, np.int32)[old])
        table = table.set_column(1, "label", pa.array(new, pa.int32()))
        relabelled[split] = table.filter(pa.array((new >= 0) | (old < 0)))
    return relabelled


def _hold_out(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """A class-wise random split, which depends on ids and seed but not on the order on disk."""
    labels = table["label"].to_numpy()
    by_id = np.asarray(pa.compute.sort_indices(table["sample_id"]))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = by_id[labels[by_id] == label]
        order = rng.numpy_generator(seed, "holdout", int(label)).permutation(len(members))
        held_out[members[order[: int(share * len(members) + 0.5)]]] = True
    return table.filter(pa.array(~held_out)), table.filter(pa.array(held_out))

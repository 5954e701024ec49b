"""Looks at a data set for `init`: which source reads it, its splits and classes, and a look at some samples.

The sources themselves list the samples. Each layout with evidence is tried; the first that lists the data is taken.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from distill_at_scale.config.explain import suggest
from distill_at_scale.config.load import Config, validate
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.inspection import layouts, samples
from distill_at_scale.data.inspection.layouts import MEDIA, TARS, Layout, Survey
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import EVALUATION, Source, split_word
from distill_at_scale.storage.filesystem import is_uri, join_path

HOLDOUT = 0.2
FRAMES = 8
ARRAY_FILES = (".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".pkl", ".csv", ".tfrecord")
READ = (
    "class folders of images, videos or sounds (train/<class>/…, val/<class>/…), ImageNet and Tiny-ImageNet as unpacked or as "
    "official tars, Hugging Face's Parquet files, WebDataset tars, torchvision's stored sets, Kinetics, UCF-101, HMDB-51, "
    "Something-Something V2, arrays in Parquet files"
)
ARRAYS = (
    "train-*.parquet and test-*.parquet with the columns values (list<float32>, nested for several axes, channels first, "
    "all of one shape) and label (int64 or string), read by data.source=tensors"
)


@dataclass(frozen=True)
class Inspection:
    """A data set as a source lists it, and what a look at some samples showed."""

    data: dict[str, Any]  # keys of the section `data` that read it, with their values
    why: str  # the evidence for the layout
    others: list[str]  # other sources that may fit
    plan: ingest.IngestPlan
    look: samples.Look
    kind: str  # images, clips or tensors
    held_out: bool  # the test split is split off, as the data have none
    remarks: list[str]  # mistakes that the path suggests

    @property
    def counts(self) -> list[int]:
        """Training samples per class."""
        return self.plan.counts["train"].tolist()

    def lines(self) -> list[str]:
        """What was found, for people."""
        others = f"; also possible: {', '.join(f'--source {name}' for name in self.others)}" if self.others else ""
        lines = [f"layout: {self.data['source']} ({self.why}){others}", self.plan.describe()]
        if self.data.get("train_split"):
            split = self.data["train_split"]
            lines.append(f"there is no training split, so the {split} split is distilled (data.train_split)")
        if self.held_out:
            share = f"{self.data['holdout']:.0%} of each class"
            lines.append(f"there is no test split, so {share} become one (data.holdout)")
        if aside := sum(table.num_rows for table in self.plan.aside.values()):
            lines.append(f"{aside:,} more samples cannot be used; validate lists them with their reasons")
        if len(self.plan.class_names) == 1:
            lines.append("a single class: is the folder one level too high or too low?")
        return [*lines, *self.plan.notes[:3], *self.remarks, f"{self.kind}: {self.look.line()}"]


def inspect(path: str, source: str | None, seed: int) -> Inspection:
    """Find the source that reads `path` (a folder, a file or a URI), list the data, and look at some samples.

    Args:
        source: the name of a source, or package.module:Object, to use instead of the one that fits best.

    Raises:
        UserError: no source reads the data; the message says what the folder holds.
        Unreachable: the folder cannot be read.
    """
    if source is not None and ":" not in source and source not in SOURCES:
        raise UserError(f"--source {source}: the layout is unknown; {suggest(source, SOURCES)}")
    store, named = layouts.open_store(path)
    if named is None:
        path = store.path
    survey = None
    if source is not None:
        candidates = [Layout(source, "as --source says")]
        if source in ("parquet", "tensors", "audiofolder"):  # their columns or pattern
            survey = Survey.of(store)
            candidates = [layout for layout in layouts.fitting(survey) if layout.source == source] or candidates
    elif named is not None:
        candidates = [named]
    else:
        survey = Survey.of(store)
        candidates = layouts.fitting(survey)
        _refuse_other_roots(survey, candidates)
        if not candidates:
            raise UserError(_misfit(survey))
    errors: list[str] = []
    for layout in candidates:
        try:
            opened, config, plan, held_out = _list(layout, path, seed)
        except Unreachable:
            raise
        except UserError as error:
            guess = "" if source else f"it looks like {layout.source} ({layout.why}), but: "
            errors.append(f"{guess}{error}")
            continue
        rows = pa.concat_tables(plan.listings.values())
        seen = samples.look(opened, config.data, rows, seed)
        kind = "tensors" if seen.shape else "clips" if getattr(opened, "clips", False) else "images"
        others = [other.source for other in candidates if other.source != layout.source]
        values, remarks = _values(config.data), _neighbours(path, held_out)
        return Inspection(values, layout.why, others, plan, seen, kind, held_out, remarks)
    raise UserError(errors[0])


def _list(layout: Layout, path: str, seed: int) -> tuple[Source, Config, ingest.IngestPlan, bool]:
    """The source, its configuration and its listings; whether the test split is held out."""
    data = {"source": layout.source, "path": path, **layout.keys}
    opened = ingest.open_source(validate({"data": data}).data)
    if getattr(opened, "clips", False):
        data["frames"] = FRAMES
    if layout.source == "audiofolder":
        data |= samples.sound_settings(opened, seed)
        opened = ingest.open_source(validate({"data": data}).data)
    if "train" not in opened.splits():
        data["train_split"] = "val"
    config = validate({"run": {"seed": seed}, "data": data})
    plan = ingest.plan(config)
    held_out = "test" not in plan.listings
    if held_out:
        least = int(plan.counts["train"].min())
        config = validate({"run": {"seed": seed}, "data": {**data, "holdout": HOLDOUT if least > 2 else 0.25}})
        plan = ingest.plan(config)
    return opened, config, plan, held_out


def _neighbours(path: str, held_out: bool) -> list[str]:
    """A remark on a local folder that is itself one split of a data set, as in PATH/train next to PATH/val."""
    if not held_out or is_uri(path) or split_word(os.path.basename(os.path.abspath(path))) != "train":
        return []
    parent, name = os.path.split(os.path.abspath(path))
    others = [other for other in sorted(os.listdir(parent)) if other != name and split_word(other) in EVALUATION]
    others = [other for other in others if os.path.isdir(os.path.join(parent, other))]
    return [f"{parent} also holds {others[0]}/: with --data {parent} it is the test split"] if others else []


def _values(data: DataSection) -> dict[str, Any]:
    return {key: getattr(data, key) for key in data.model_fields_set}


def _refuse_other_roots(survey: Survey, candidates: list[Layout]) -> None:
    """Raises UserError if the folder holds data sets in subfolders, and for splits within classes."""
    if survey.split_folders():
        return
    roots = [f for f in sorted(survey.folders) if f and survey.split_folders(f)]
    roots = [f for f in roots if not any(map(split_word, f.split("/")))]
    roots = [f for f in roots if not any(f.startswith(f"{other}/") for other in roots)]
    roots = [f for f in roots if any(survey.count(kind, f) for kind in MEDIA) and f.count("/") < 4]
    tables = {path.partition("/")[0] for path in survey.others if path.endswith(".parquet") and "/" in path}
    other = sorted(tables - {root.partition("/")[0] for root in roots})
    marked = bool(candidates) and candidates[0].source not in ("imagefolder", "videofolder", "audiofolder")
    if not roots or (marked and len([*roots, *other]) == 1):
        return  # of a layout with lists or tables the only split folders may lie deeper, as in videos/train/
    place, inner = survey.store.place(), survey.split_folders(roots[0])
    if all(not survey.folders[join_path(root, name)] for root in roots for name in survey.split_folders(root)):
        problem = f"{place} has the splits within the classes ({roots[0]}/{inner[0]}/…)"
        if not inner or roots[0] in ("images", "labels"):
            problem = f"{place} holds splits without class folders ({roots[0]}/{inner[0]}/), as sets for detection do"
            raise UserError(f"{problem}; sort the pictures into one folder per class: {inner[0]}/<class>/…")
        raise UserError(f"{problem}; turn the order around: {inner[0]}/{roots[0].rpartition('/')[2]}/…")
    roots += other
    places = [survey.store.place(root) for root in roots[:5]]
    more = f" (and {len(roots) - 5} more)" if len(roots) > 5 else ""
    what = "holds several data sets" if len(roots) > 1 else "is above the root of the data"
    raise UserError(f"{place} {what}; did you mean {' or '.join(places)}{more}?")


def _misfit(survey: Survey) -> str:
    """Why no layout fits: what the folder holds, what is read, and what to do."""
    place, endings = survey.store.place(), survey.endings
    if not endings:
        return f"{place} holds no files; check the path"
    counted = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in endings.most_common(5))
    names = survey.folders[""]
    folders = f"; folders: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "; no folders"
    seen = f"{place} fits no layout. It holds {sum(endings.values()):,} files ({counted}){folders}."
    flat = {kind: survey.count(kind) for kind in MEDIA if survey.count(kind)}
    archives = sum(endings[ending] for ending in (".zip", ".7z", ".rar", *TARS))
    arrays = sum(endings[ending] for ending in ARRAY_FILES)
    if flat:
        kind = max(flat, key=lambda name: flat[name])
        listed = next((path for path in survey.others if path.endswith(".csv")), None)
        advice = f"The {kind}s lie in no class folders, so their classes are unknown: sort them into <class>/ folders"
        advice += f" as {listed} says" if listed else ""
        if kind == "sound":
            advice += ", or set data.label_pattern to find them in the names (data/README.md, Sound)"
        if kind == "image":
            advice += ", or write Parquet files with the columns image (the files' bytes) and label"
    elif archives:
        advice = "Unpack the archives; tars are read in place only as WebDataset or as ImageNet's and Kinetics' own"
    elif arrays:
        advice = f"Arrays can be given as {ARRAYS}"
    elif endings[".parquet"]:
        advice = f"Its Parquet files have no column with images (binary, or struct<bytes, path>); arrays: {ARRAYS}"
    else:
        advice = "Give the folder that holds the data, or write a source of your own (data/README.md)"
    return f"{seen} {advice}. Layouts that are read: {READ}."

"""What can be known to be wrong before a run: names that mean nothing, and networks or weights that do not fit the data.

What is broken in the samples themselves is found by the decoder, in `pipeline.Pipeline.validate`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from distill_at_scale.config.fields import Section
from distill_at_scale.config.load import Config, suggest
from distill_at_scale.config.registry import resolve
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.clip import decoders_for
from distill_at_scale.data.ingest import derived_splits, sample_types
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import stores_jpeg
from distill_at_scale.data.ingest.merge import unused
from distill_at_scale.data.ingest.sample_types import sample_shape
from distill_at_scale.data.prepared.format import JPEG_RATIO
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.shared import teacher as teachers
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec, builder, mixes_samples
from distill_at_scale.pruning.criteria import CRITERIA
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO, build_criteria, column_of
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.pruning.selection import ranking

TALLEST = 65_500  # pixels of a JPEG, which holds the frames of a clip below each other
KINDS = 12  # of reasons that are counted


def check_names(config: Config) -> None:
    """Resolve every name in the configuration before anything is computed.

    Raises UserError for the first that is unknown or does not keep its contract.
    """
    _check_kind(config, resolve("data.source", config.data.source, SOURCES, ingest.CONTRACT))
    sample_types.check(config)
    _check_criteria(config)
    builder("score.network", config.score.network)
    builder("distill.network", config.distill.network)
    for name in config.evaluate.networks:
        builder("evaluate.networks", name)
    _check_augmentations(config)
    Augmentation(_protocol(config).augment)


def _check_criteria(config: Config) -> None:
    """Names of criteria, and of several that are weighed their weights; every imported name may be selected by."""
    score, chosen = config.score, config.criterion
    imported.check_names(score, {**CRITERIA, MONTE_CARLO: None})
    build_criteria(score)
    _check_columns(score)
    known = {**dict.fromkeys(score.criteria), **dict.fromkeys(score.imported)}
    if config.select.criterion == {}:
        raise UserError(
            "select.criterion = {} weighs nothing; give names with weights, for example {loss: 0.7, el2n: 0.3}"
        )
    if isinstance(chosen, str):
        resolve("select.criterion", chosen, {**known, ranking.RANDOM: None}) if ":" not in chosen else None
        return
    for name, weight in chosen.items():
        if name not in known:
            raise UserError(
                f"select.criterion weighs {name!r}, which is not scored; {suggest(name, known)} (score.criterion)"
            )
        if weight <= 0:
            raise UserError(
                f"select.criterion: the weight of {name!r} is {weight:g}; it must be above 0 (or leave it out)"
            )
    ranking.build_ranking(chosen, True, config.select.order, 0)


def _check_columns(score: ScoreSection) -> None:
    """Every criterion has a column of its own: a plug-in's is called like its class."""
    names: dict[str, str] = {}
    for name in dict.fromkeys([*score.criteria, *score.imported]):
        column = column_of(name)
        other = names.setdefault(column, name)
        if other != name or (":" in name and (column in imported.RESERVED or column.endswith("_values"))):
            whose = f"of {other!r}" if other != name else "with a meaning of its own"
            raise UserError(
                f"score.criterion = {name!r} would be the column {column!r} of the score table, which is one {whose}; give the "
                "class another name"
            )


def _check_augmentations(config: Config) -> None:
    own = getattr(config.distill, config.distill.method, None)
    for key, value in own.model_dump().items() if isinstance(own, Section) else ():
        if key.endswith("augment"):
            try:
                Augmentation(value)
            except UserError as error:
                raise UserError(f"distill.{config.distill.method}.{key}: {error}") from None


def _protocol(config: Config) -> TrainingProtocol:
    found = distill.method_class(config).protocol(config)
    if not isinstance(found, TrainingProtocol):
        raise UserError(
            f"distill.method = {config.distill.method!r} does not keep the contract: its protocol(config) gives "
            f"{type(found).__name__}, not a distill_at_scale.distillation.student.TrainingProtocol"
        )
    return found


def _check_kind(config: Config, source: Any) -> None:
    """Images or clips: a source of our own is one or the other."""
    clips, frames, name = getattr(source, "clips", False), config.data.frames, config.data.source
    if frames:
        decoders_for(config.data)
        if stores_jpeg(config.data) and frames * config.data.size > TALLEST:
            raise UserError(
                f"{frames} frames of {config.data.size} pixels do not fit into one JPEG; set data.store=raw, or lower one"
            )
    if clips and frames is None:
        raise UserError(f"data.source = {name} holds videos; set data.frames, for example data.frames=8")
    if frames and not clips and name in SOURCES:
        raise UserError(f"data.source = {name} holds images, so data.frames = {frames} has no meaning; leave it out")


class Shaped(Protocol):
    """What networks are checked against: prepared data, or what will be."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str | None: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def source_class_names(self) -> list[str]: ...


@dataclass(frozen=True)
class PlannedDataset:
    shape: tuple[int, ...]
    class_names: list[str]
    source_class_names: list[str]
    counts: list[int]  # of the training samples, by class
    tested: bool
    kind: str | None = None

    def has_test(self) -> bool:
        return self.tested


def planned(config: Config, plan: ingest.IngestPlan) -> PlannedDataset:
    """What the prepared data will be; which classes a choice by variance leaves is not known yet, the largest stand in.

    Raises UserError where `data.transform` needs more classes than there are.
    """
    counts = np.bincount(plan.listings["train"]["label"].to_numpy(), minlength=len(plan.class_names)).tolist()
    left = derived_splits.derived_counts(config.data, counts, config.run.seed)
    return PlannedDataset(
        sample_shape(config.data),
        [plan.class_names[label] for label in left.classes],
        plan.source_class_names,
        left.counts,
        "test" in plan.listings,
        "tensors" if sample_types.holds_tensors(config.data) else None,
    )


def check_networks(config: Config, prepared: Shaped) -> None:
    """Build every network of the run once, for the data's shape, and send one image through it.

    Raises UserError for one that does not fit, before anything is trained.
    """
    for key, name, width, depth in _wanted(config):
        spec = NetworkSpec(name, prepared.shape, len(prepared.class_names), width, depth, prepared.kind)
        _check_network(key, spec, distill.method_class(config).batch_norm)


def check_weights(config: Config, prepared: Shaped) -> None:
    """Load every ready-made checkpoint once; raises UserError for one that does not fit."""
    for check in (pretrained.check, teachers.check_weights):
        check(config, prepared.shape, prepared.class_names, prepared.source_class_names)


def _wanted(config: Config) -> list[tuple[str, str, int, int | None]]:
    """(configuration key, name, width, depth) of every network of the run."""
    score, made = config.score, config.distill
    wanted = [
        ("score.network", score.network, score.width, score.depth),
        ("distill.network", made.network, made.width, made.depth),
    ]
    wanted += [("evaluate.networks", name, made.width, made.depth) for name in config.evaluate.networks]
    return wanted


def _built(key: str, spec: NetworkSpec) -> torch.nn.Module:
    try:
        return spec.build(0)
    except UserError as error:
        raise UserError(f"{key} = {spec.name!r}: {error}") from None


@torch.no_grad()
def _check_network(key: str, spec: NetworkSpec, batch_norm: str) -> None:
    try:
        network = _built(key, spec)
        if key == "distill.network" and batch_norm == "refused" and mixes_samples(network):
            raise UserError(
                f"{key} = {spec.name!r} has batch norm, under which the samples of a batch are not independent, as "
                "matching needs; take a network with instance norm (convnet, resnet18; of clips convnet3d, r3d_18)"
            )
        network.eval()(torch.zeros(1, *spec.shape))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} = {spec.name!r} cannot take images of shape {spec.shape}: {error}") from None


def space(config: Config, plan: ingest.IngestPlan, free: int) -> str:
    """What an ingest needs on the disk at its end, when pieces and shards are both there; `free` is in bytes."""
    part = JPEG_RATIO if stores_jpeg(config.data) else 1
    each = math.prod(sample_shape(config.data)) * (4 if sample_types.holds_tensors(config.data) else 1)
    derived = sum(planned(config, plan).counts) if config.data.transform != "none" else 0
    needed = int((2 * plan.samples + derived) * each * part)
    unit, name = (1e9, "GB") if max(needed, free) >= 1e9 else (1e6, "MB")
    line = (
        f"  ingest needs about {needed / unit:.1f} {name} on the run folder's disk, {free / unit:.1f} {name} are free"
    )
    return line + (": NOT ENOUGH, it will stop when the disk is full" if needed > free else "")


def summary(plan: ingest.IngestPlan, listed: pa.Table, path: Path) -> list[str]:
    """What a user wants to read after every sample was looked at; `listed` has the schema `merge.SET_ASIDE`.

    Raises UserError where a class would lose all its training samples.
    """
    train, bad = plan.listings["train"], unused(listed)
    lost_ids = bad.filter(pc.equal(bad["split"], "train"))["sample_id"].combine_chunks()
    left = train.filter(pc.invert(pc.is_in(train["sample_id"], lost_ids)))
    counts = np.bincount(left["label"].to_numpy(), minlength=len(plan.class_names))
    if (lost := np.flatnonzero(counts == 0)).size:
        mine = train.filter(pc.equal(train["label"], int(lost[0])))["sample_id"].combine_chunks()
        first = bad.filter(pc.is_in(bad["sample_id"], mine)).slice(0, 1).to_pylist()
        why = f", for example {first[0]['sample_id']!r}: {first[0]['reason']}" if first else ""
        raise UserError(f"no training sample of the class {plan.class_names[lost[0]]!r} can be used{why}; see {path}")
    remarks = listed.filter(listed["used"])
    lines = [f"  all {plan.samples} samples can be used"]
    if bad.num_rows:
        lines = [f"  {bad.num_rows} of {plan.known} samples cannot be used; all are listed in {path}", *_some(bad)]
    if remarks.num_rows:
        lines += [f"  {remarks.num_rows} samples can be used, with a remark, listed there too", *_some(remarks)]
    return lines


def _some(rows: pa.Table) -> list[str]:
    """How often each kind of reason occurs, and the first samples."""
    kinds = Counter(re.sub(r"(?<![A-Za-z])\d[\d.,:]*|'[^']*'", "…", reason) for reason in rows["reason"].to_pylist())
    counted = [f"    {count:,} × {kind}" for kind, count in kinds.most_common(KINDS)] if rows.num_rows > 5 else []
    counted += [f"    and {len(kinds) - KINDS} more kinds of reason"] if counted and len(kinds) > KINDS else []
    some = [f"  {row['sample_id']}: {row['reason']}" for row in rows.slice(0, 5).to_pylist()]
    return counted + some + ([f"  ... and {rows.num_rows - 5} more"] if rows.num_rows > 5 else [])

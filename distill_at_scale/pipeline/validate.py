"""Checks before a run: names in the configuration, and whether networks and weights fit the data.

`Pipeline.validate` decodes the samples themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from distill_at_scale.config.explain import suggest
from distill_at_scale.config.fields import Section
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.config.registry import resolve
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.clip import decoders_for
from distill_at_scale.data.ingest import derived_splits, sample_types
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import stores_jpeg
from distill_at_scale.data.ingest.merge import unused
from distill_at_scale.data.ingest.reasons import kinds_of
from distill_at_scale.data.ingest.sample_types import sample_shape
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import JPEG_RATIO
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods.shared import teacher
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models import pretrained, weight_check
from distill_at_scale.models.spec import NetworkSpec, builder, in_parts, mixes_samples
from distill_at_scale.pruning.criteria import CRITERIA
from distill_at_scale.pruning.criteria.factory import (
    MONTE_CARLO,
    build_criteria,
    check_classes,
    column_of,
    needs_features,
)
from distill_at_scale.pruning.proxies.train import network_spec
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.pruning.scoring.classifier import check_features
from distill_at_scale.pruning.selection import orders, quotas, ranking

MAX_JPEG_HEIGHT = 65_500  # pixels; the frames of a clip are stacked in one JPEG
MAX_REASONS = 12  # kinds of reason that are counted in a summary


@dataclass(frozen=True)
class PlannedDataset:
    """What the prepared data will be, or are, and what is kept of them."""

    shape: tuple[int, ...]  # of one sample
    class_names: list[str]
    source_class_names: list[str]
    counts: list[int]  # training samples per class
    tests: int  # test samples
    kind: str  # images, clips or tensors
    kept: list[int]  # samples per class after selection
    jpeg: bool = False  # whether samples are stored as JPEG
    listing: ingest.IngestPlan | None = None  # None if ingest is done

    def has_test(self) -> bool:
        return self.tests > 0

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def train(self) -> int:
        return sum(self.counts)

    @property
    def samples(self) -> int:
        return self.train + self.tests

    @property
    def values(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape)

    @property
    def held(self) -> int:
        """Bytes of a sample in memory, in its stored data type."""
        return self.values * (4 if self.kind == "tensors" else 1)

    @property
    def stored(self) -> int:
        """Approximate bytes of a prepared sample on disk."""
        return max(1, int(self.held * (JPEG_RATIO if self.jpeg else 1)))


def planned(config: Config, plan: ingest.IngestPlan) -> PlannedDataset:
    """From a listing; broken samples are not known yet. Where data.transform selects classes by variance, the largest classes
    are assumed. Raises UserError where data.transform needs more classes than there are.
    """
    derived = derived_splits.derived_counts(config.data, plan.counts["train"].tolist(), config.run.seed)
    names, shape = [plan.class_names[label] for label in derived.classes], sample_shape(config.data)
    tests = int(plan.counts["test"][derived.classes].sum()) if "test" in plan.listings else 0
    kind = "tensors" if sample_types.holds_tensors(config.data) else "clips" if len(shape) == 4 else "images"
    kept = quotas.expected(config.select, config.min_per_class, derived.counts)
    sizes = shape, names, plan.source_class_names, derived.counts, tests, kind, kept
    return PlannedDataset(*sizes, stores_jpeg(config.data), plan)


def known(config: Config, prepared: PreparedDataset, manifest_path: Path | None) -> PlannedDataset:
    """From finished stages; `manifest_path` is None before selection."""
    counts, names = prepared.counts("train"), (prepared.class_names, prepared.source_class_names)
    kept = quotas.expected(config.select, config.min_per_class, counts)
    kept = manifest.facts(manifest_path)["kept_per_class"] if manifest_path else kept
    tests, jpeg = sum(prepared.counts("test")), bool(prepared.meta.get("jpeg"))
    return PlannedDataset(prepared.shape, *names, counts, tests, prepared.kind, kept, jpeg)


def check_names(config: Config) -> None:
    """Resolve all names in the configuration. Raises UserError for one that is unknown or breaks its contract."""
    # a built-in source holds either images or clips; data.frames must agree with it
    data, source, frames, size = config.data, config.data.source, config.data.frames, config.data.size
    clips = getattr(resolve("data.source", source, SOURCES, ingest.CONTRACT), "clips", False)
    if frames:
        decoders_for(data)
    if frames and stores_jpeg(data) and frames * size > MAX_JPEG_HEIGHT:
        raise UserError(f"{frames} frames of {size} pixels do not fit into one JPEG; set data.store=raw, or lower one")
    if clips and frames is None:
        raise UserError(f"data.source = {source} holds videos; set data.frames, for example data.frames=8")
    if frames and not clips and source in SOURCES:
        raise UserError(f"data.source = {source} holds images, so data.frames = {frames} has no meaning; leave it out")
    sample_types.check(config)
    _check_criteria(config)
    for candidate in config.select.auto.portfolio or [] if config.select.keep == "auto" else ():
        keys = {"select.keep": 1.0} | {f"select.{key}": value for key, value in candidate.items()}
        _check_criteria(with_overrides(config, keys, f"select.auto.portfolio ({candidate})"))
    builder("score.network", config.score.network)
    builder("distill.network", config.distill.network)
    for name in config.evaluate.networks:
        builder("evaluate.networks", name)
    method = config.distill.method
    section = getattr(config.distill, method, None)
    for key, value in section.model_dump().items() if isinstance(section, Section) else ():
        if key.endswith("augment"):
            try:
                Augmentation(value)
            except UserError as error:
                raise UserError(f"distill.{method}.{key}: {error}") from None
    protocol = engine.method_class(config).protocol(config)
    if not isinstance(protocol, TrainingProtocol):
        raise UserError(
            f"distill.method = {method!r} does not keep the contract: its protocol(config) gives "
            f"{type(protocol).__name__}, not a distill_at_scale.distillation.student.TrainingProtocol"
        )
    Augmentation(protocol.augment)


def _check_criteria(config: Config) -> None:
    """Names of criteria, their columns in the score table, and the weights of a sum of several."""
    score, chosen = config.score, config.criterion
    imported.check_names(score, {**CRITERIA, MONTE_CARLO: None})
    build_criteria(score)
    known = {**dict.fromkeys(score.criteria), **dict.fromkeys(score.imported)}
    orders.check(config.select.order, known)
    if orders.CLUSTERS in ([chosen] if isinstance(chosen, str) else chosen):
        raise UserError(
            "select.criterion = 'clusters' numbers groups of samples and ranks none; name another scored criterion, or random"
        )
    columns: dict[str, str] = {}
    for name in known:  # the column of a plug-in has the name of its class
        column = column_of(name)
        other = columns.setdefault(column, name)
        if other != name or (":" in name and (column in imported.RESERVED or column.endswith("_values"))):
            whose = f"of {other!r}" if other != name else "with a meaning of its own"
            raise UserError(
                f"score.criterion = {name!r} would be the column {column!r} of the score table, which is one {whose}; give the "
                "class another name"
            )
    if chosen == {}:
        advice = "give names with weights, for example {loss: 0.7, el2n: 0.3}"
        raise UserError(f"select.criterion = {{}} weighs nothing; {advice}")
    if isinstance(chosen, str):
        if ":" not in chosen:
            resolve("select.criterion", chosen, {**known, ranking.RANDOM: None})
        return
    for name, weight in chosen.items():
        if name not in known:
            advice = f"{suggest(name, known)} (score.criterion)"
            raise UserError(f"select.criterion weighs {name!r}, which is not scored; {advice}")
        if weight <= 0:
            advice = "it must be above 0 (or leave it out)"
            raise UserError(f"select.criterion: the weight of {name!r} is {weight:g}; {advice}")
    ranking.build_ranking(chosen, True, config.select.order, 0)


class DataShape(Protocol):
    """The part of prepared or planned data that networks depend on."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str | None: ...

    @property
    def class_names(self) -> list[str]: ...


@torch.no_grad()
def check_networks(config: Config, data: DataShape) -> None:
    """Build each network for the data's shape and pass one sample through it. Raises UserError if one does not fit."""
    score, distill = config.score, config.distill
    networks = [
        ("score.network", score.network, score.width, score.depth),
        ("distill.network", distill.network, distill.width, distill.depth),
        *(("evaluate.networks", name, distill.width, distill.depth) for name in config.evaluate.networks),
    ]
    for key, name, width, depth in networks:
        spec = NetworkSpec(name, data.shape, len(data.class_names), width, depth, data.kind)
        try:
            try:
                network = spec.build(0)
            except UserError as error:
                raise UserError(f"{key} = {name!r}: {error}") from None
            batch_norm = engine.method_class(config).batch_norm
            if key == "distill.network" and batch_norm == "refused" and mixes_samples(network):
                raise UserError(
                    f"{key} = {name!r} has batch norm, under which the samples of a batch are not independent, as "
                    "matching needs; take a network with instance norm (convnet, resnet18; of clips convnet3d, r3d_18)"
                )
            logits = network.eval()(torch.zeros(1, *spec.shape))
            given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            if given != (1, spec.classes):
                raise UserError(f"{key} = {name!r} returns {given} for one sample; it must return (1, {spec.classes})")
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{key} = {name!r} cannot take images of shape {spec.shape}: {error}") from None


def check_scoring(config: Config, data: DataShape) -> None:
    """Raises UserError for a criterion that needs more classes, or features that the network does not have."""
    check_classes(config.score, len(data.class_names))
    if any(map(needs_features, build_criteria(config.score).values())):
        check_features(network_spec(config.score, data.shape, len(data.class_names), data.kind))


def check_weights(config: Config, data: PreparedDataset | PlannedDataset) -> None:
    """Load each ready-made checkpoint. Raises UserError for one that does not fit."""
    for check in (pretrained.check, teacher.check_weights):
        check(config, data.shape, data.class_names, data.source_class_names)


@torch.no_grad()
def check_weights_on_data(config: Config, data: PreparedDataset, teacher_only: bool = False) -> list[str]:
    """Test each ready-made checkpoint on a sample of the training split; returns a line for each.

    Raises UserError for one that is clearly worse than guessing, unless score.check_weights is false.
    """
    names = [] if teacher_only else config.score.weight_names
    section = getattr(config.distill, config.distill.method, None)
    if not config.score.check_weights or not (names or getattr(section, "teacher_weights", None)):
        return []
    pixels, labels = map(torch.from_numpy, data.sample("train", weight_check.SAMPLES, config.run.seed))
    spec, lines = network_spec(config.score, data.shape, len(data.class_names), data.kind), []
    for name in names:
        loaded = pretrained.load(name, spec, data.class_names, data.source_class_names)
        network = replace(spec, classes=loaded.outputs).build(0).eval()
        network.load_state_dict(loaded.state)
        normalization = normalization_of(data, whitened=False)
        if loaded.normalization is not None:
            mean, std = loaded.normalization
            normalization = replace(normalization, mean=mean, std=std)
        logits = in_parts(network, normalization.apply(pixels), spec.microbatch(torch.device("cpu")))
        logits = logits if loaded.classes is None else logits[:, loaded.classes]
        check = weight_check.check_on_sample(f"score.weights = {name!r}", logits, labels, data.class_names)
        lines.append(f"  score.weights = {name}: {check.line()}")
    if (teachers := teacher.check_on_sample(config, data, pixels, labels)) is not None:
        lines.append(f"  teacher_weights: {teachers.line()}")
    return lines


def space(config: Config, plan: ingest.IngestPlan, free: int) -> str:
    """A line on the disk space at the end of an ingest, when part files and shards both exist; `free` is in bytes."""
    sample_bytes = math.prod(sample_shape(config.data)) * (4 if sample_types.holds_tensors(config.data) else 1)
    derived = planned(config, plan).train if config.data.transform != "none" else 0
    need = int((2 * plan.samples + derived) * sample_bytes * (JPEG_RATIO if stores_jpeg(config.data) else 1))
    needed, there = (f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB" for size in (need, free))
    line = f"  ingest needs about {needed} on the run folder's disk, {there} are free"
    return line + (": NOT ENOUGH, it will stop when the disk is full" if need > free else "")


def summary(plan: ingest.IngestPlan, listed: pa.Table, path: Path) -> list[str]:
    """Lines on rejected or remarked samples: `listed`, the table at `path`. Raises UserError if a class has no sample
    left.
    """
    train, bad = plan.listings["train"], unused(listed)
    bad_ids = bad.filter(pc.equal(bad["split"], "train"))["sample_id"].combine_chunks()
    usable = train.filter(pc.invert(pc.is_in(train["sample_id"], bad_ids)))
    counts = np.bincount(usable["label"].to_numpy(), minlength=len(plan.class_names))
    if (empty := np.flatnonzero(counts == 0)).size:
        ids = train.filter(pc.equal(train["label"], int(empty[0])))["sample_id"].combine_chunks()
        first = bad.filter(pc.is_in(bad["sample_id"], ids)).slice(0, 1).to_pylist()
        why = f", for example {first[0]['sample_id']!r}: {first[0]['reason']}" if first else ""
        raise UserError(f"no training sample of the class {plan.class_names[empty[0]]!r} can be used{why}; see {path}")
    remarks = listed.filter(listed["used"])
    lines = [f"  all {plan.samples} samples can be used"]
    if bad.num_rows:
        lines = [f"  {bad.num_rows} of {plan.known} samples cannot be used; all are listed in {path}", *reasons(bad)]
    if remarks.num_rows:
        lines += [f"  {remarks.num_rows} samples can be used, with a remark, listed there too", *reasons(remarks)]
    return lines


def reasons(rows: pa.Table) -> list[str]:
    """How often each kind of reason occurs, and the first samples."""
    lines = [f"  {row['sample_id']}: {row['reason']}" for row in rows.slice(0, 5).to_pylist()]
    if rows.num_rows <= 5:
        return lines
    kinds = kinds_of(rows["reason"].to_pylist())
    counted = [f"    {len(places):,} × {kind}" for kind, places in list(kinds.items())[:MAX_REASONS]]
    if len(kinds) > MAX_REASONS:
        counted.append(f"    and {len(kinds) - MAX_REASONS} more kinds of reason")
    return [*counted, *lines, f"  ... and {rows.num_rows - 5} more"]

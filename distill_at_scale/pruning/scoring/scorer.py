"""One pass over the data that scores each sample with every checkpoint that some criterion needs.

Within a chunk, batches have one fixed size (the last one is padded), so the numbers do not depend on the number of scorers.
A scored chunk is published at once and never repeated.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.models import precision, pretrained
from distill_at_scale.models.forward_mode import ForwardMode
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.criteria import factory
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.classifier import (
    BatchOutputs,
    Classifier,
    CompiledClassifier,
    random_projection,
)

FEATURES = "features"  # column of the part files only: the features of all trials at the last epoch, side by side
ScoringUnit = tuple[Chunk, Path]  # the chunk to score, and the part file to write


@dataclass(frozen=True)
class ScoringCheckpoint:
    """Weights of a network with `outputs` logits and its normalization; `columns` are the logits of the data's classes
    (None: all)."""

    state: Mapping[str, Tensor]
    mean: Tensor
    std: Tensor
    outputs: int
    columns: list[int] | None
    epoch: int


def forward_mode(spec: NetworkSpec, score: ScoreSection, passes: int, on_gpu: bool) -> ForwardMode:
    """How samples pass the checkpoints; `passes` is samples times checkpoints."""
    return ForwardMode(spec, score.compile, score.precision, on_gpu, passed=passes)


def describe(prepared: PreparedDataset, config: Config) -> str:
    """How samples are scored, for the user."""
    score = config.score
    trials, count = score.checkpoint_counts
    checkpoints = trials * len(factory.needed_epochs(factory.build_criteria(score).values(), count))
    spec = proxy.network_spec(score, prepared.shape, len(prepared.class_names), prepared.kind)
    mode = forward_mode(spec, score, sum(prepared.counts()) * checkpoints, precision.on_gpu(config))
    return f"scoring: {mode.note}"


def score_part_path(folder: Path, chunk: Chunk) -> Path:
    return folder / f"chunk-{chunk.index:06d}.parquet"


class Scorer:
    """Holds all needed checkpoints on one device and scores chunks.

    `spent` takes the seconds of read (which runs ahead in a thread), forward and write.
    """

    def __init__(
        self, config: Config, prepared: Path, checkpoints: Path, device: torch.device, spent: TimeSpent | None = None
    ):
        score, self.device, self.spent = config.score, device, spent or TimeSpent()
        self.prepared, self.dimensions = PreparedDataset(prepared), score.features
        self.criteria, (_, epochs) = factory.build_criteria(score), score.checkpoint_counts
        self.epochs = {name: set(factory.epochs_of(criterion, epochs)) for name, criterion in self.criteria.items()}
        self.spec = proxy.network_spec(score, self.prepared.shape, len(self.prepared.class_names), self.prepared.kind)
        self.microbatch = self.spec.microbatch(device)
        self.checkpoints = list(self._load(score, checkpoints, factory.needed_epochs(self.criteria.values(), epochs)))
        passes = sum(self.prepared.counts()) * len(self.checkpoints)
        mode = forward_mode(self.spec, score, passes, device.type == "cuda")
        self.memory_format = self.spec.memory_format("score", device, mode.compiled)
        self.classifiers: dict[int, CompiledClassifier] = {}
        for outputs in {checkpoint.outputs for checkpoint in self.checkpoints}:
            classifier = Classifier(replace(self.spec, classes=outputs), device, self.memory_format)
            self.classifiers[outputs] = CompiledClassifier(classifier, mode, self.microbatch)
        # on a GPU its share of the machine's cores; on a CPU a scorer has one core for everything
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        self.decoding_threads = max(1, (os.cpu_count() or 1) // gpus) if gpus else 1

    def _load(self, score: ScoreSection, folder: Path, epochs: Sequence[int]) -> Iterator[ScoringCheckpoint]:
        if score.weights:
            for file in score.weight_names:
                loaded = pretrained.load(file, self.spec, self.prepared.class_names, self.prepared.source_class_names)
                yield self._checkpoint(loaded.state, loaded.outputs, loaded.normalization, loaded.classes, 0)
            return
        for trial, epoch in itertools.product(range(score.trials), epochs):
            state = proxy.weights_of(safetensors_io.load(proxy.checkpoint_path(folder, trial, epoch), again=True))
            yield self._checkpoint(state, self.spec.classes, None, None, epoch)

    def _checkpoint(
        self, state: Mapping[str, Tensor], outputs: int, normalization: Any, columns: list[int] | None, epoch: int
    ) -> ScoringCheckpoint:
        network = replace(self.spec, classes=outputs).build(0)
        network.load_state_dict(state)
        mean, std = normalization or (self.prepared.mean, self.prepared.std)
        mean, std = (torch.tensor(values, device=self.device).view(self.spec.channel_shape) for values in (mean, std))
        # the state dict of a network also holds version metadata
        return ScoringCheckpoint(network.to(self.device).state_dict(), mean, std, outputs, columns, epoch)

    def score(self, units: Sequence[ScoringUnit]) -> Iterator[int]:
        """Score and publish chunks; yields the number of samples of each, also of those already published."""
        published = {path for _, path in units if path.exists()}
        yield from (chunk.rows for chunk, path in units if path in published)
        missing = [unit for unit in units if unit[1] not in published]
        batches = prefetch(self._read(chunk) for chunk, _ in missing)
        for (chunk, path), (rows, pixels) in zip(missing, batches, strict=True):
            with self.spent.on("forward"):
                scored = self._score(rows, pixels)
            with self.spent.on("write"), publish(path) as temporary:
                pq.write_table(scored, temporary)
            yield chunk.rows

    def _read(self, chunk: Chunk) -> tuple[pa.Table, Tensor]:
        """Ids and labels, and the decoded pixels uint8 [n, *shape]; runs ahead in a thread."""
        with self.spent.on("read"):
            table = self.prepared.read(chunk)
            pixels = torch.from_numpy(np.array(self.prepared.pixels(table, self.decoding_threads)))
            pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        return table.select(["sample_id", "label"]), pixels

    @torch.no_grad()
    def _score(self, rows: pa.Table, pixels: Tensor) -> pa.Table:
        """sample_id, label, float32 lists [checkpoints] per criterion, and `features` [trials * dimensions] if needed."""
        labels = torch.from_numpy(rows["label"].to_numpy().astype(np.int64)).to(self.device)
        pixels = pixels.to(self.device, non_blocking=True)
        if missing := -len(pixels) % self.microbatch:  # full batches of one size: one shape, one result
            pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        pixels = self.memory_format.images(pixels)  # once, and as bytes
        values: dict[str, list[Tensor]] = {n: [] for n, c in self.criteria.items() if not factory.is_class_criterion(c)}
        features: list[Tensor] = []
        for checkpoint in self.checkpoints:
            used_by = {name: c for name, c in self.criteria.items() if checkpoint.epoch in self.epochs[name]}
            classifier = self.classifiers[checkpoint.outputs]
            classifier.load(checkpoint.state, checkpoint.mean, checkpoint.std)
            with_features = any(map(factory.needs_features, used_by.values()))
            outputs = BatchOutputs(classifier, pixels, labels, checkpoint.columns, with_features)
            for name, criterion in used_by.items():
                if factory.is_class_criterion(criterion):
                    continue
                observed = criterion.observe(outputs)
                if observed.shape != labels.shape:
                    raise UserError(
                        f"the criterion {name} returns values of shape {tuple(observed.shape)} for {len(labels)} samples; its "
                        "observe must return one number per sample"
                    )
                values[name].append(observed)
            if any(map(factory.is_class_criterion, used_by.values())):
                features.append(random_projection(outputs.features, self.dimensions))
        columns = {name: torch.stack(observed, 1) for name, observed in values.items()}
        columns |= {FEATURES: torch.cat(features, 1)} if features else {}
        lists = {name: matrix_to_lists(matrix.float().cpu().numpy()) for name, matrix in columns.items()}
        return pa.table({"sample_id": rows["sample_id"], "label": rows["label"], **lists})


def matrix_to_lists(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """[n, ...] -> n float32 lists."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), math.prod(values.shape[1:]))

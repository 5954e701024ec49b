"""One pass over the data in which every sample is scored with every checkpoint that some criterion looks at.

The work is cut into the fixed chunks of the prepared shards and, within them, into batches of one fixed size (the last
one padded), so the numbers do not depend on how many scorers share the work. A chunk is published when it is scored and
not done again; the next one is read meanwhile. Left out: what criteria make of the values (`table.py`).
"""

from __future__ import annotations

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
from distill_at_scale.models import pretrained
from distill_at_scale.models.spec import NetworkSpec, will_compile
from distill_at_scale.pruning.criteria.base import Criterion
from distill_at_scale.pruning.criteria.factory import (
    build_criteria,
    epochs_of,
    is_class_criterion,
    needed_epochs,
    needs_features,
)
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.classifier import (
    BatchOutputs,
    Classifier,
    CompiledClassifier,
    check_features,
    random_projection,
)

FEATURES = "features"  # of the last epoch of all trials, side by side: a column of pieces, not of the table
ScoringUnit = tuple[Chunk, Path]  # what to score, and where the result goes


@dataclass(frozen=True)
class ScoringCheckpoint:
    """Weights of a network with so many outputs, what it expects, and which outputs are the data's classes (None: all)."""

    state: Mapping[str, Tensor]
    mean: Tensor
    std: Tensor
    outputs: int
    columns: list[int] | None = None
    epoch: int = 0


def check(config: Config, prepared: PreparedDataset) -> None:
    """Raises UserError, before anything is trained, where a criterion needs features that the network has not."""
    if any(needs_features(criterion) for criterion in build_criteria(config.score).values()):
        names = prepared.class_names
        check_features(proxy.network_spec(config.score, prepared.shape, len(names), prepared.kind))


class Scorer:
    """Holds every checkpoint that some criterion looks at on one device and scores chunks."""

    def __init__(
        self, config: Config, prepared: Path, checkpoints: Path, device: torch.device, spent: TimeSpent | None = None
    ):
        """`spent` takes the seconds of read (which runs ahead of the rest), forward and write."""
        score, self.device, self.spent = config.score, device, spent or TimeSpent()
        self.prepared, self.dimensions = PreparedDataset(prepared), score.features
        self.criteria = build_criteria(score)
        (_, epochs), self.last = score.checkpoint_counts, score.checkpoint_counts[1] - 1
        self.needed = needed_epochs(self.criteria.values(), epochs)
        self.epochs = {name: set(epochs_of(criterion, epochs)) for name, criterion in self.criteria.items()}
        self.spec = proxy.network_spec(score, self.prepared.shape, len(self.prepared.class_names), self.prepared.kind)
        self.at_once = self.spec.at_once(device)
        self.checkpoints = self._given(score) if score.weights else self._trained(score, checkpoints)
        work = self.spec.work(sum(self.prepared.counts()) * len(self.checkpoints))
        self.layout = self.spec.layout("score", device, will_compile(score.compile, work))
        self.eyes: dict[int, CompiledClassifier] = {}
        for outputs in {checkpoint.outputs for checkpoint in self.checkpoints}:
            classifier = Classifier(replace(self.spec, classes=outputs), score.precision, device, self.layout)
            self.eyes[outputs] = CompiledClassifier(classifier, self.at_once, score.compile, work)

    def _trained(self, score: ScoreSection, folder: Path) -> list[ScoringCheckpoint]:
        places = [(t, e) for t in range(score.trials) for e in self.needed]
        found = ((e, proxy.weights_of(safetensors_io.load(proxy.checkpoint_path(folder, t, e)))) for t, e in places)
        return [self._checkpoint(state, self.spec, None, None, epoch) for epoch, state in found]

    def _given(self, score: ScoreSection) -> list[ScoringCheckpoint]:
        names = self.prepared.class_names, self.prepared.source_class_names
        found = (pretrained.load(name, self.spec, *names) for name in score.weight_names)
        return [
            self._checkpoint(g.state, replace(self.spec, classes=g.outputs), g.normalization, g.classes) for g in found
        ]

    def _checkpoint(
        self,
        state: Mapping[str, Tensor],
        spec: NetworkSpec,
        normalization: Any,
        columns: list[int] | None,
        epoch: int = 0,
    ) -> ScoringCheckpoint:
        """Through a network of the kind, so that what belongs to a state beside its tensors stays with it."""
        network = spec.build(0)
        network.load_state_dict(state)
        mean, std = normalization or (self.prepared.mean, self.prepared.std)
        mean, std = (torch.tensor(values, device=self.device).view(spec.columns) for values in (mean, std))
        return ScoringCheckpoint(network.to(self.device).state_dict(), mean, std, spec.classes, columns, epoch)

    def score(self, units: Sequence[ScoringUnit]) -> Iterator[int]:
        """Score and publish chunks; yields the number of samples of each, also of those that were there already."""
        there = {target for _, target in units if target.exists()}
        yield from (chunk.rows for chunk, target in units if target in there)
        missing = [unit for unit in units if unit[1] not in there]
        for (chunk, target), (table, pixels) in zip(missing, prefetch(self._read(c) for c, _ in missing), strict=True):
            with self.spent.on("forward"):
                scored = self._score(table, pixels)
            with self.spent.on("write"), publish(target) as temporary:
                pq.write_table(scored, temporary)
            yield chunk.rows

    def _read(self, chunk: Chunk) -> tuple[pa.Table, Tensor]:
        """Ids and labels, and the pixels uint8 [n, *shape], decoded where they are JPEGs; runs ahead in a thread."""
        with self.spent.on("read"):
            table = self.prepared.read(chunk)
            pixels = torch.from_numpy(np.array(self.prepared.pixels(table, decoding_threads(self.device))))
            pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        return table.select(["sample_id", "label"]), pixels

    @torch.no_grad()
    def _score(self, table: pa.Table, pixels: Tensor) -> pa.Table:
        """sample_id, label and float32 lists: of a criterion [its checkpoints], and `features` [trials * dimensions]."""
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64)).to(self.device)
        pixels = self._padded(pixels.to(self.device, non_blocking=True))
        pixels = self.layout.images(pixels)  # once, and as bytes
        of_each = {name: criterion for name, criterion in self.criteria.items() if not is_class_criterion(criterion)}
        values: dict[str, list[Tensor]] = {name: [] for name in of_each}
        features: list[Tensor] = []
        for checkpoint in self.checkpoints:
            seen = self._look(checkpoint, pixels, labels)
            for name, criterion in of_each.items():
                if checkpoint.epoch in self.epochs[name]:
                    values[name].append(_observed(name, criterion, seen))
            if checkpoint.epoch == self.last and len(of_each) < len(self.criteria):
                features.append(random_projection(seen.features, self.dimensions))
        columns = {"sample_id": table["sample_id"], "label": table["label"]}
        columns |= {name: _lists(torch.stack(found, 1)) for name, found in values.items()}
        return pa.table(columns | ({FEATURES: _lists(torch.cat(features, 1))} if features else {}))

    def _look(self, checkpoint: ScoringCheckpoint, pixels: Tensor, labels: Tensor) -> BatchOutputs:
        eye = self.eyes[checkpoint.outputs]
        eye.load(checkpoint.state, checkpoint.mean, checkpoint.std)
        wide = any(checkpoint.epoch in self.epochs[n] and needs_features(c) for n, c in self.criteria.items())
        return BatchOutputs(eye, pixels, labels, checkpoint.columns, wide)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Whole batches of one size: one shape, one result."""
        missing = -len(pixels) % self.at_once
        return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels


def decoding_threads(device: torch.device) -> int:
    """A GPU waits for its share of the machine's cores; a scorer on a CPU has one core for everything."""
    return max(1, (os.cpu_count() or 1) // torch.cuda.device_count()) if device.type == "cuda" else 1


def _observed(name: str, criterion: Criterion, seen: BatchOutputs) -> Tensor:
    """A criterion's values [n]. Raises UserError for another shape."""
    found = criterion.observe(seen)
    if found.shape != seen.labels.shape:
        raise UserError(
            f"the criterion {name} makes values of shape {tuple(found.shape)} of {len(seen.labels)} samples; its observe "
            "must return one number for each"
        )
    return found


def _lists(values: Tensor) -> pa.FixedSizeListArray:
    """float32 [n, width] -> n lists."""
    flat = values.float().cpu().numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(flat).reshape(-1)), flat.shape[1])


def score_part_path(pieces: Path, chunk: Chunk) -> Path:
    return pieces / f"chunk-{chunk.index:06d}.parquet"

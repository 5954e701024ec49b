"""One pass over the data in which every sample is scored with every checkpoint.

The work is cut into the fixed chunks of the prepared shards and, within them, into batches of one fixed size (the
last one padded), so the numbers do not depend on how many scorers share the work. A chunk is published when it is
scored and not done again; the next one is read meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from distill_at_scale import tensors
from distill_at_scale.config import Config
from distill_at_scale.data.prefetch import ahead
from distill_at_scale.data.shards import Chunk, Prepared
from distill_at_scale.networks import Layout, NetworkSpec, in_parts, maybe_compile, will_compile
from distill_at_scale.registry import resolve
from distill_at_scale.rundir import publish
from distill_at_scale.scoring import proxy, weights
from distill_at_scale.scoring.criteria import CRITERIA
from distill_at_scale.scoring.criteria.base import Criterion
from distill_at_scale.sections import ScoreSection

CRITERION_CONTRACT = ("useful", "observe", "aggregate")
Unit = tuple[Chunk, Path]  # what to score, and where the result goes


def criteria_of(names: Sequence[str]) -> dict[str, Criterion]:
    return {name: resolve("score.criterion", name, CRITERIA, CRITERION_CONTRACT)() for name in names}


class Classifier(nn.Module):
    """Stored values [n, *shape] -> logits float32 [n, classes]; the normalisation is part of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: NetworkSpec, precision: str, device: torch.device, layout: Layout):
        super().__init__()
        self.precision, self.device, self.spec, self.layout = precision, device, spec, layout
        self.network = spec.build(0)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(spec.columns))
        self.to(device).eval().requires_grad_(False)
        layout.network(self.network)

    def forward(self, pixels: Tensor) -> Tensor:
        images = ((pixels.float() if self.spec.tensors else pixels.float() / 255) - self.mean) / self.std
        with proxy.autocast(self.precision, self.device):
            return self.network(self.layout.images(images)).float()


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a network with so many outputs, what it expects, and which outputs are the data's classes (None: all)."""

    state: Mapping[str, Tensor]
    mean: Tensor
    std: Tensor
    outputs: int
    columns: list[int] | None = None


class Scorer:
    """Holds every checkpoint of every trial on one device and scores chunks."""

    def __init__(self, config: Config, prepared: Path, checkpoints: Path, device: torch.device):
        score, self.device = config.score, device
        self.prepared = Prepared(prepared)
        self.criteria: Mapping[str, Criterion] = criteria_of(score.criteria)
        self.spec = proxy.network_spec(score, self.prepared.shape, len(self.prepared.class_names), self.prepared.kind)
        self.at_once = self.spec.at_once(device)
        self.checkpoints = self._given(score) if score.weights else self._trained(score, checkpoints)
        work = self.spec.work(sum(self.prepared.counts()) * len(self.checkpoints))
        compiled = will_compile(score.compile, work)
        self.layout = self.spec.layout("score", device, compiled)
        self.classifiers: dict[int, tuple[Classifier, Callable[[Tensor], Tensor]]] = {}
        for outputs in {checkpoint.outputs for checkpoint in self.checkpoints}:
            classifier = Classifier(replace(self.spec, classes=outputs), score.precision, device, self.layout)
            self.classifiers[outputs] = classifier, maybe_compile(classifier, score.compile, work)

    def _trained(self, score: ScoreSection, folder: Path) -> list[Checkpoint]:
        trials, epochs = score.checkpoints
        paths = [proxy.checkpoint_path(folder, t, e) for t in range(trials) for e in range(epochs)]
        found = (proxy.weights_of(tensors.load(path)) for path in paths)
        return [self._checkpoint(state, self.spec, None, None) for state in found]

    def _given(self, score: ScoreSection) -> list[Checkpoint]:
        names = self.prepared.class_names, self.prepared.source_class_names
        found = (weights.load(name, self.spec, *names) for name in score.given_weights)
        return [
            self._checkpoint(g.state, replace(self.spec, classes=g.outputs), g.normalization, g.classes) for g in found
        ]

    def _checkpoint(
        self, state: Mapping[str, Tensor], spec: NetworkSpec, normalization: Any, columns: list[int] | None
    ) -> Checkpoint:
        """Through a network of the kind, so that what belongs to a state beside its tensors stays with it."""
        network = spec.build(0)
        network.load_state_dict(state)
        mean, std = normalization or (self.prepared.mean, self.prepared.std)
        mean, std = (torch.tensor(values, device=self.device).view(spec.columns) for values in (mean, std))
        return Checkpoint(network.to(self.device).state_dict(), mean, std, spec.classes, columns)

    def score(self, units: Sequence[Unit]) -> Iterator[int]:
        """Score and publish chunks; yields the number of samples of each, also of those that were there already."""
        there = {target for _, target in units if target.exists()}
        yield from (chunk.rows for chunk, target in units if target in there)
        missing = [unit for unit in units if unit[1] not in there]
        for (chunk, target), (table, pixels) in zip(missing, ahead(self._read(c) for c, _ in missing), strict=True):
            with publish(target) as temporary:
                pq.write_table(self._score(table, pixels), temporary)
            yield chunk.rows

    def _read(self, chunk: Chunk) -> tuple[pa.Table, Tensor]:
        """Ids and labels, and the pixels uint8 [n, *shape], decoded where they are JPEGs; runs ahead in a thread."""
        table = self.prepared.read(chunk)
        pixels = torch.from_numpy(np.array(self.prepared.pixels(table, decoding_threads(self.device))))
        pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        return table.select(["sample_id", "label"]), pixels

    @torch.no_grad()
    def _score(self, table: pa.Table, pixels: Tensor) -> pa.Table:
        """sample_id, label and, per criterion, float32 lists [checkpoints]."""
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64)).to(self.device)
        pixels = self._padded(pixels.to(self.device, non_blocking=True))
        pixels = self.layout.images(pixels)  # once, and as bytes
        values: dict[str, list[Tensor]] = {name: [] for name in self.criteria}
        for checkpoint in self.checkpoints:
            logits = self._logits(checkpoint, pixels)[: len(labels)]
            for name, criterion in self.criteria.items():
                values[name].append(criterion.observe(logits, labels))
        columns = {"sample_id": table["sample_id"], "label": table["label"]}
        columns |= {name: _lists(torch.stack(found, 1).cpu().numpy()) for name, found in values.items()}
        return pa.table(columns)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Whole batches of one size: one shape, one result."""
        missing = -len(pixels) % self.at_once
        return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels

    def _logits(self, checkpoint: Checkpoint, pixels: Tensor) -> Tensor:
        classifier, forward = self.classifiers[checkpoint.outputs]
        classifier.network.load_state_dict(checkpoint.state)
        classifier.mean.copy_(checkpoint.mean)
        classifier.std.copy_(checkpoint.std)
        logits = in_parts(forward, pixels, self.at_once)
        return logits if checkpoint.columns is None else logits[:, checkpoint.columns]


def decoding_threads(device: torch.device) -> int:
    """A GPU waits for its share of the machine's cores; a scorer on a CPU has one core for everything."""
    return max(1, (os.cpu_count() or 1) // torch.cuda.device_count()) if device.type == "cuda" else 1


def _lists(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

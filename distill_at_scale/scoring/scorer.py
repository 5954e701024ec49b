"""One pass over the data in which every sample is scored with every checkpoint.

The work is cut into the fixed chunks of the prepared shards and, within them, into batches of one fixed size (the
last one padded), so the numbers do not depend on how many scorers share the work. A chunk is published when it is
scored and not done again; the next one is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill_at_scale.config import Config
from distill_at_scale.data.pool import Normalization
from distill_at_scale.data.prefetch import ahead
from distill_at_scale.data.shards import Chunk, Prepared
from distill_at_scale.networks import in_parts, maybe_compile
from distill_at_scale.registry import resolve
from distill_at_scale.rundir import publish
from distill_at_scale.scoring import proxy
from distill_at_scale.scoring.criteria import CRITERIA
from distill_at_scale.scoring.criteria.base import Criterion

CRITERION_CONTRACT = ("useful", "observe", "aggregate")
Unit = tuple[Chunk, Path]  # what to score, and where the result goes


def criteria_of(names: Sequence[str]) -> dict[str, Criterion]:
    return {name: resolve("score.criterion", name, CRITERIA, CRITERION_CONTRACT)() for name in names}


class Scorer:
    """Holds every checkpoint of every trial on one device and scores chunks."""

    def __init__(self, config: Config, prepared: Path, checkpoints: Path, device: torch.device):
        score = config.score
        self.device, self.precision = device, score.precision
        self.prepared = Prepared(prepared)
        self.normalization = Normalization(tuple(self.prepared.mean), tuple(self.prepared.std))
        self.criteria: Mapping[str, Criterion] = criteria_of(score.criteria)
        spec = proxy.network_spec(score, self.prepared.shape, len(self.prepared.class_names))
        trials, epochs = score.checkpoints
        paths = [proxy.checkpoint_path(checkpoints, t, e) for t in range(trials) for e in range(epochs)]
        self.weights = [proxy.load_proxy(spec, path, device).state_dict() for path in paths]
        self.network = spec.build(0).to(device).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.at_once = spec.at_once(device)
        images = sum(self.prepared.counts()) * len(paths)
        self.forward = maybe_compile(self._logits, score.compile, spec.work(images))

    def score(self, units: Sequence[Unit]) -> Iterator[int]:
        """Score and publish chunks; yields the number of samples of each, also of those that were there already."""
        there = {target for _, target in units if target.exists()}
        yield from (chunk.rows for chunk, target in units if target in there)
        missing = [unit for unit in units if unit[1] not in there]
        tables = ahead(self.prepared.read(chunk) for chunk, _ in missing)
        for (chunk, target), table in zip(missing, tables, strict=True):
            with publish(target) as temporary:
                pq.write_table(self._score(table), temporary)
            yield chunk.rows

    @torch.no_grad()
    def _score(self, table: pa.Table) -> pa.Table:
        """sample_id, label and, per criterion, float32 lists [checkpoints]."""
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64)).to(self.device)
        pixels = self._padded(torch.from_numpy(np.array(self.prepared.pixels(table))).to(self.device))
        values: dict[str, list[Tensor]] = {name: [] for name in self.criteria}
        for weights in self.weights:
            self.network.load_state_dict(weights)
            logits = in_parts(self.forward, pixels, self.at_once)[: len(labels)]
            for name, criterion in self.criteria.items():
                values[name].append(criterion.observe(logits, labels))
        columns = {"sample_id": table["sample_id"], "label": table["label"]}
        columns |= {name: _lists(torch.stack(found, 1).cpu().numpy()) for name, found in values.items()}
        return pa.table(columns)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Whole batches of one size: one shape, one result."""
        missing = -len(pixels) % self.at_once
        return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels

    def _logits(self, pixels: Tensor) -> Tensor:
        """uint8 [n, *shape] -> logits float32 [n, classes]."""
        images = self.normalization.apply(pixels).contiguous(memory_format=torch.channels_last)
        with proxy.autocast(self.precision, self.device):
            return self.network(images).float()


def _lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

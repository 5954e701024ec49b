"""One pass over the data in which every sample is scored with every proxy checkpoint.

The work is cut into the fixed chunks of the prepared shards and, within them, into batches of one fixed size (the
last one padded), so the numbers do not depend on how many scorers share the work. A chunk is published when it is
scored and not done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill_at_scale.config import Config
from distill_at_scale.data.pool import Normalization
from distill_at_scale.data.shards import Chunk, Prepared, pixels_of
from distill_at_scale.networks import in_parts, maybe_compile
from distill_at_scale.registry import resolve
from distill_at_scale.rundir import publish
from distill_at_scale.scoring import proxy
from distill_at_scale.scoring.criteria import CRITERIA
from distill_at_scale.scoring.criteria.base import Criterion

CRITERION_CONTRACT = ("useful", "observe", "aggregate")


def criteria_of(names: Sequence[str]) -> dict[str, Criterion]:
    return {name: resolve("score.criterion", name, CRITERIA, CRITERION_CONTRACT)() for name in names}


class Scorer:
    """Holds every checkpoint of every trial on one device and scores chunks."""

    def __init__(self, config: Config, prepared: Path, checkpoints: Path, device: torch.device):
        score = config.score
        self.device = device
        self.prepared = Prepared(prepared)
        self.normalization = Normalization(tuple(self.prepared.mean), tuple(self.prepared.std))
        self.criteria: Mapping[str, Criterion] = criteria_of(score.criteria)
        spec = proxy.network_spec(score, self.prepared.shape, len(self.prepared.class_names))
        self.loaded = spec.build(0).to(device).eval().requires_grad_(False)
        self.at_once = spec.at_once(device)
        paths = [proxy.checkpoint_path(checkpoints, t, e) for t in range(score.trials) for e in range(score.epochs)]
        self.weights = [proxy.load_proxy(spec, path, device).state_dict() for path in paths]
        images = sum(self.prepared.counts()) * len(paths)
        self.forward = maybe_compile(self.loaded, score.compile, spec.work(images))

    def score_chunk(self, chunk: Chunk, target: Path) -> int:
        """Score the samples of one chunk and publish them as `target`; returns how many there are."""
        if not target.exists():
            table = self.prepared.read(chunk)
            with publish(target) as temporary:
                pq.write_table(self._score(table), temporary)
        return chunk.rows

    @torch.no_grad()
    def _score(self, table: pa.Table) -> pa.Table:
        """sample_id, label and, per criterion, float32 lists [trials * epochs]."""
        pixels, labels = (
            torch.from_numpy(np.array(pixels_of(table))),
            torch.from_numpy(table["label"].to_numpy().astype(np.int64)),
        )
        values = {name: np.empty((len(labels), len(self.weights)), np.float32) for name in self.criteria}
        for column, weights in enumerate(self.weights):
            self.loaded.load_state_dict(weights)
            logits = in_parts(self._forward, pixels, self.at_once)
            for name, criterion in self.criteria.items():
                values[name][:, column] = criterion.observe(logits, labels).numpy()
        columns = {"sample_id": table["sample_id"], "label": table["label"]}
        columns |= {
            name: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) for name, v in values.items()
        }
        return pa.table(columns)

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, *shape] -> logits float32 [n, classes] on the CPU."""
        count = len(pixels)
        if count < self.at_once:  # a small chunk is padded too: one shape, one result
            pixels = torch.cat([pixels, pixels.new_zeros(self.at_once - count, *pixels.shape[1:])])
        return self.forward(self.normalization.apply(pixels.to(self.device))).float().cpu()[:count]

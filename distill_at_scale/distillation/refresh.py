"""Static pruning that follows the distillation: every `select.refresh` steps the kept samples of each class are chosen again.

The kept samples compete with a random part of the class (`select.refresh_pool`), rated by the method's network of that step
(`Method.judge`). As many are kept as before, from the same end of the ranking (`select.order`). Which samples those are is
part of the state.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core import rng
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Array
from distill_at_scale.data.sampling.class_sampler import MAX_THREADS, ClassSampler
from distill_at_scale.data.sampling.placement import kept_places, read_in_parts
from distill_at_scale.distillation.methods.base import ImageMethod
from distill_at_scale.distillation.methods.contract import Method
from distill_at_scale.pruning.selection.quotas import window
from distill_at_scale.pruning.selection.ranking import build_ranking, ranks_of


class Refresh:
    """The kept samples of one worker's classes and their renewal.

    Attributes:
        first, kept, pool: label -> positions within the class, ascending, of the samples that the manifest keeps, of those
            that are kept now, and of all that are not held out. Empty without `select.refresh`.
        share: of the kept samples that are not in the first set, a mean over the classes.
    """

    def __init__(
        self, config: Config, prepared: PreparedDataset, manifest: Path, sampler: ClassSampler, method: Method
    ) -> None:
        self.config, self.prepared, self.sampler, self.method = config, prepared, sampler, method
        labels = sampler.placement.counts if config.select.refresh else {}
        self.first, self.pool = (kept_places(prepared, manifest, labels, others) for others in (False, True))
        self.kept, self.share = dict(self.first), 0.0
        self.ranking = build_ranking("value", True, config.select.order, 0)

    def renew(self, step: int) -> None:
        """Choose the kept samples of each class after a step; all workers call it.

        A class stays as it is if a value is not finite.
        """
        judge, threads = self.method.judge(step), min(MAX_THREADS, os.cpu_count() or 1)
        for label, before in self.kept.items():
            candidates = self._candidates(label, step)
            if len(candidates) == len(before):
                continue
            parts = read_in_parts(self.prepared, label, candidates, threads)
            values = judge(label, (self.sampler.normalization.apply(x.to(self.sampler.device)) for x in parts)).cpu()
            if bool(torch.isfinite(values).all()):
                ranks = ranks_of(self.ranking.keys(values.numpy()))
                self._keep(label, candidates[window(self.config.select, ranks, len(before))])
                if isinstance(self.method, ImageMethod):
                    self.method.pruning.renew(label, before, self.kept[label])
        self._set_share()

    def _candidates(self, label: int, step: int) -> Array:
        """Positions of the samples that a renewal chooses from, ascending: the kept ones and a random part of the class."""
        pool = self.pool[label]
        order = rng.numpy_generator(self.config.distill_seed, "refresh pool", step, label).permutation(len(pool))
        drawn = pool[order[: math.ceil(self.config.select.refresh_pool * len(pool))]]
        return np.union1d(self.kept[label], drawn)

    def _keep(self, label: int, places: Array) -> None:
        if not np.array_equal(places, self.kept[label]):
            self.sampler.renew(self.prepared, {label: places})
            self.kept[label] = places

    def _set_share(self) -> None:
        new = [1 - np.isin(self.kept[label], own).mean() for label, own in self.first.items()]
        self.share = float(np.mean(new)) if new else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return {f"kept/{label}": torch.from_numpy(places.astype(np.int64)) for label, places in self.kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for label in self.first:
            self._keep(label, state[f"kept/{label}"].numpy().astype(np.int32))
        self._set_share()

"""Level 2, runtime pruning: which samples of a class's real batch count in this step (arXiv 2305.18381, section 3).

Rule `loss` drops the samples with the largest loss; for DM, which has none, those whose features are farthest from the mean
of the real batch and those that are nearest to it. Rule `ite` drops
the samples with the largest and the smallest effect on the synthetic gradient, beyond two thresholds: it takes the
logarithms of the effects as normal around the mean of the batch, with a running variance per class. A running mean, as in
the paper, does not work: each step's network scales all effects of a batch alike (on CIFAR-10 at drop 0.3 it drops 0.15 to
0.59 of a batch, the batch mean 0.28 to 0.32). Values are remembered, and batches observed in full every `refresh` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from distill_at_scale.config.methods import RuntimeSection
from distill_at_scale.data.prepared.format import Array

SMALLEST = 1e-6  # of the batch's largest effect: smaller ones are raised to this, because of the logarithm
MIN_DEVIATION = 1e-12


class RuntimePruning:
    """The runtime rule of one worker.

    In all methods `rows` [n] are the positions of a batch in the class's pool of `pool_size` samples.
    """

    def __init__(self, config: RuntimeSection, both_tails: bool = False):
        """`both_tails`: rule `loss` drops the smallest values too, all but the share `tail` of the dropped samples."""
        self.rule, self.tail = config.rule, config.tail if both_tails else 1.0
        self.drop = config.drop if config.rule != "none" else 0.0
        self.refresh, self.probes, self.decay = config.refresh, config.probes, config.decay
        self.memory: dict[int, Tensor] = {}  # label -> standardized value of each sample of the pool, 0 if unknown
        self.running: dict[int, Tensor] = {}  # label -> variance of the logarithms of effects, float64 [1]
        # the quantiles of the standard normal distribution that leave out `drop`
        below, above = self.drop * (1 - config.tail), self.drop * config.tail
        self.low = NormalDist().inv_cdf(below) if below > 0 else -math.inf
        self.high = -NormalDist().inv_cdf(above) if above > 0 else math.inf

    def drop_count(self, n: int) -> int:
        """How many of n samples are dropped (with rule `ite` on average); at least one stays."""
        return min(math.floor(self.drop * n + 1e-9), n - 1)

    def mask(self, values: Tensor) -> Tensor:
        """Values [n], standardized for rule `ite` -> bool [n], False for dropped samples.

        Rule `loss` drops the drop_count(n) largest, or a part of them among the smallest; later samples count as larger than
        equal ones.
        """
        if self.rule == "ite":
            keep = (values >= self.low) & (values <= self.high)
            keep[values.abs().argmin()] |= ~keep.any()
            return keep
        n, dropped = len(values), self.drop_count(len(values))
        largest = math.floor(dropped * self.tail + 0.5)
        keep = torch.zeros(n, dtype=torch.bool, device=values.device)
        keep[torch.argsort(values, stable=True)[dropped - largest : n - largest]] = True
        return keep

    def remembered_mask(self, label: int, rows: Tensor, pool_size: int, step: int) -> Tensor | None:
        """The mask of a batch from remembered values; None if the batch must be observed in full, or nothing is dropped."""
        if not self.drop_count(len(rows)) or step % self.refresh == 0:
            return None
        return self.mask(self._memory(label, pool_size)[rows])

    def values(self, **rules: Callable[[], Tensor]) -> Tensor:
        """The values of this rule, out of those that the method can compute: `loss=..., ite=...`."""
        return rules[self.rule]()

    def observe(self, label: int, rows: Tensor, pool_size: int, values: Tensor) -> Tensor:
        """The mask of a batch from its values [n], which are remembered.

        If a value is not finite, nothing is dropped or remembered: the step itself reports the divergence.
        """
        if not bool(torch.isfinite(values).all()):
            return torch.ones_like(values, dtype=torch.bool)
        if self.rule != "ite":
            self._remember(label, rows, pool_size, values)
            return self.mask(values)
        floor = max(float(values.max()) * SMALLEST, torch.finfo(values.dtype).tiny)
        logs = values.clamp_min(floor).double().log()
        variance = logs.var(correction=0).cpu().view(1)
        running = self.running.get(label, variance)
        running = self.running[label] = running + (1 - self.decay) * (variance - running)
        standard = (logs - logs.mean()) / running.sqrt().clamp_min(MIN_DEVIATION).to(logs.device)
        self._memory(label, pool_size)[rows] = standard.float().cpu()
        return self.mask(standard)

    def _remember(self, label: int, rows: Tensor, pool_size: int, values: Tensor) -> None:
        """Stores values standardized within the batch, since each step has another network."""
        if self.drop_count(len(rows)):
            deviation = values.std(correction=0).clamp_min(MIN_DEVIATION)
            self._memory(label, pool_size)[rows] = ((values - values.mean()) / deviation).float().cpu()

    def _memory(self, label: int, pool_size: int) -> Tensor:
        return self.memory.setdefault(label, torch.zeros(pool_size))

    def renew(self, label: int, before: Array, after: Array) -> None:
        """Follow a renewal of a class's pool; `before` and `after` [pool_size] identify its samples, ascending.

        Values of samples that stay are remembered at their new positions; new samples are unknown.
        """
        if label in self.memory:
            _, old, new = np.intersect1d(before, after, assume_unique=True, return_indices=True)
            values = torch.zeros(len(after))
            values[torch.from_numpy(new)] = self.memory[label][torch.from_numpy(old)]
            self.memory[label] = values

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"remembered/{label}": values for label, values in self.memory.items()}
        return state | {f"effects/{label}": variance for label, variance in self.running.items()}

    def load_state_dict(self, state: dict[str, Tensor], labels: list[int]) -> None:
        self.memory = {c: state[f"remembered/{c}"].clone() for c in labels if f"remembered/{c}" in state}
        self.running = {c: state[f"effects/{c}"].clone() for c in labels if f"effects/{c}" in state}

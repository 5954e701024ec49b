"""Level 2, runtime pruning: which samples of a class's real batch count in this step (METHOD.md section 3).

The matching core asks; a backend does not know the rule. Rule `loss` drops the floor(drop * n) samples with the
largest value: the cross-entropy that the matching forward pass computes (DC, DSA, IDC), or the distance to the synthetic
mean in feature space (DM). Rule `ite` drops the samples with the largest and with the smallest effect on the synthetic
images' gradient. It does not sort: the logarithms of the effects are taken to be normally distributed around the batch's
mean with the running variance of their class, and what lies beyond the thresholds that leave out `drop` is dropped, so that
the share is `drop` on the average only. A running mean, as in the paper, does not serve here: every step has another
network and another augmentation, which scale all effects of a batch alike (measured on CIFAR-10 at drop 0.3, decay 0.9:
a running mean drops 0.15 to 0.59 of a batch, depending on tail and method, the batch's own 0.28 to 0.32).

A look costs at least a forward pass, so values are remembered per sample: a full look every `refresh` steps, and in between
the samples to be dropped are not even loaded into the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from distill_at_scale.config.sections import RuntimeSection

SMALLEST = 1e-6  # of the batch's largest effect: what is less counts as this much, or no logarithm could be taken
FLAT = 1e-12  # a spread below this is none


class RuntimePruning:
    """The runtime rule of one worker."""

    def __init__(self, config: RuntimeSection):
        self.rule = config.rule
        self.drop = config.drop if config.rule != "none" else 0.0
        self.refresh, self.probes, self.decay = config.refresh, config.probes, config.decay
        self.memory: dict[int, Tensor] = {}  # label -> standardised value of each sample of the pool, 0 if not seen
        self.running: dict[int, Tensor] = {}  # label -> variance of the logarithms of effects, float64 [1]
        self.low, self.high = _quantile(self.drop * (1 - config.tail)), -_quantile(self.drop * config.tail)

    def dropped(self, n: int) -> int:
        """How many of n samples are dropped, with rule `ite` on the average; at least one stays."""
        return min(math.floor(self.drop * n + 1e-9), n - 1)

    def mask(self, values: Tensor) -> Tensor:
        """Values [n], standardised with rule `ite` -> bool [n], False for what is dropped.

        With rule `loss` the dropped(n) largest; ties drop the later sample.
        """
        if self.rule == "ite":
            return self._within(values)
        n = len(values)
        keep = torch.zeros(n, dtype=torch.bool, device=values.device)
        keep[torch.argsort(values, stable=True)[: n - self.dropped(n)]] = True
        return keep

    def forecast(self, label: int, rows: Tensor, held: int, step: int) -> Tensor | None:
        """From memory, the mask for a batch that has not been looked at; None means: look at all of it."""
        if not self.dropped(len(rows)) or step % self.refresh == 0:
            return None
        return self.mask(self._memory(label, held)[rows])

    def values(self, **rules: Callable[[], Tensor]) -> Tensor:
        """What this rule judges by, of the rules' values that the matching core can give: `loss=..., ite=...`."""
        return rules[self.rule]()

    def look(self, label: int, rows: Tensor, held: int, values: Tensor) -> Tensor:
        """The mask for a batch that was looked at in full, whose values are remembered.

        Where values are not finite, nothing is dropped and none is remembered: the step itself has to find that out.
        """
        if not bool(torch.isfinite(values).all()):
            return torch.ones_like(values, dtype=torch.bool)
        if self.rule != "ite":
            self._remember(label, rows, held, values)
            return self.mask(values)
        standard = self._standardised(label, values)
        self._memory(label, held)[rows] = standard.float().cpu()
        return self.mask(standard)

    def _within(self, standard: Tensor) -> Tensor:
        keep = (standard >= self.low) & (standard <= self.high)
        keep[standard.abs().argmin()] |= ~keep.any()
        return keep

    def _standardised(self, label: int, effects: Tensor) -> Tensor:
        """Logarithms from the batch's mean, in the class's running deviations, in which this batch is counted first."""
        logs = effects.clamp_min(max(float(effects.max()) * SMALLEST, torch.finfo(effects.dtype).tiny)).double().log()
        found = logs.var(correction=0).cpu().view(1)
        known = self.running.get(label, found)
        self.running[label] = known + (1 - self.decay) * (found - known)
        return (logs - logs.mean()) / self.running[label].sqrt().clamp_min(FLAT).to(logs.device)

    def _remember(self, label: int, rows: Tensor, held: int, values: Tensor) -> None:
        """Note a batch's values, standardised within the batch, since every step has another network."""
        if self.dropped(len(rows)):
            spread = values.std(correction=0).clamp_min(1e-12)
            self._memory(label, held)[rows] = ((values - values.mean()) / spread).float().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"remembered/{label}": values for label, values in self.memory.items()}
        return state | {f"effects/{label}": numbers for label, numbers in self.running.items()}

    def load_state_dict(self, state: dict[str, Tensor], labels: list[int]) -> None:
        self.memory = {c: state[f"remembered/{c}"].clone() for c in labels if f"remembered/{c}" in state}
        self.running = {c: state[f"effects/{c}"].clone() for c in labels if f"effects/{c}" in state}

    def _memory(self, label: int, held: int) -> Tensor:
        return self.memory.setdefault(label, torch.zeros(held))


def _quantile(share: float) -> float:
    """The value below which a share of a standard normal distribution lies."""
    return NormalDist().inv_cdf(share) if share > 0 else -math.inf

"""Level 2, runtime pruning: which samples of a class's real batch count in this step (METHOD.md section 3).

The matching core asks; a backend does not know the rule. Rule `loss` drops the floor(drop * n) samples with the
largest value: the cross-entropy that the matching forward pass computes (DC, DSA), or the distance to the synthetic
mean in feature space (DM). A look costs a forward pass, so values are remembered per sample: a full
look every `refresh` steps, and in between the samples to be dropped are not even loaded into the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill_at_scale.sections import RuntimeSection


class RuntimePruning:
    """The runtime rule of one worker."""

    def __init__(self, config: RuntimeSection):
        self.rule = config.rule
        self.drop = config.drop if config.rule != "none" else 0.0
        self.refresh, self.probes = config.refresh, config.probes
        self.memory: dict[int, Tensor] = {}  # label -> standardised value of each sample of the pool, 0 if not seen

    def dropped(self, n: int) -> int:
        """How many of n samples are dropped; at least one stays."""
        return min(math.floor(self.drop * n + 1e-9), n - 1)

    def mask(self, values: Tensor) -> Tensor:
        """Values [n] -> bool [n], False for the dropped(n) largest; ties drop the later sample."""
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
        """The mask for a batch that was looked at in full, whose values are remembered."""
        self._remember(label, rows, held, values)
        return self.mask(values)

    def _remember(self, label: int, rows: Tensor, held: int, values: Tensor) -> None:
        """Note a batch's values, standardised within the batch, since every step has another network."""
        if self.dropped(len(rows)):
            spread = values.std(correction=0).clamp_min(1e-12)
            self._memory(label, held)[rows] = ((values - values.mean()) / spread).float().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"remembered/{label}": values for label, values in self.memory.items()}

    def load_state_dict(self, state: dict[str, Tensor], labels: list[int]) -> None:
        self.memory = {c: state[f"remembered/{c}"].clone() for c in labels if f"remembered/{c}" in state}

    def _memory(self, label: int, held: int) -> Tensor:
        return self.memory.setdefault(label, torch.zeros(held))

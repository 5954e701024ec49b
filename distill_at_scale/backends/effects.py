"""The individual treatment effect of real samples on the synthetic images' gradient, to first order (METHOD.md section 3).

For a matching loss L that depends on the real batch through a mean statistic g (gradients, features) alone, leaving out
sample i moves g by (g - g_i) / (n - 1), so ITE_i = [d2L / dD_s dg] (g_i - g) / (n - 1) to first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]  # real and synthetic gradients -> a scalar


def gradient_effects(
    network: nn.Module,
    real: Tensor,
    images: Tensor,
    view: Callable[[Tensor], Tensor],
    label: int,
    distance: Distance,
    probes: int,
    generator: torch.Generator,
    at_once: int,
) -> Tensor:
    """The size of each real sample's effect under gradient matching [n].

    `real` [n, *shape] as the network sees it; `images` [m, *shape] the class's synthetic images as they are stored, which
    `view` turns into what the network sees; `distance` the matching loss of two lists of gradients.
    """
    raise NotImplementedError

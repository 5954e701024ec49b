"""Orders that keep more than an end of the ranking: they draw from a part of each class, so that the kept samples cover it.

Each is an order of the whole class, so that what a lower rate keeps, a higher rate keeps too. Samples outside the part come
last, by usefulness: they are kept only if the number asks for more than the part holds.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError

Array = np.ndarray[Any, Any]
CLUSTERS = "clusters"  # the order, and the criterion with the numbers of the clusters


def check(order: str, columns: Container[str]) -> None:
    """Raises UserError if the order needs cluster numbers that are not among the scored columns."""
    if order == CLUSTERS and CLUSTERS not in columns:
        raise UserError(
            "select.order = 'clusters' reads the criterion clusters, which is not scored; add it to score.criterion, for "
            "example score.criterion=[loss,clusters]"
        )


def reorder(config: SelectSection, seed: int, label: int, ranks: Array, values: Array, clusters: Array | None) -> Array:
    """The ranks of a class in the order of `select.order`, int32 [n].

    coverage (CCS, Zheng et al. 2023, arXiv 2210.15809): without the hardest share, as many samples from each of the strata,
    which have equal widths in the score, in random order within a stratum. A small stratum gives all, the others share the
    rest. clusters: numbers in proportion to the sizes of the clusters (rounded as by Webster), the most useful first.
    easy_random and window: random.

    Args:
        ranks: by usefulness, int [n], 0 = most useful.
        values: the numbers that were ranked [n]; finite.
        clusters: the number of each sample's cluster [n], for the order clusters.
    """
    count = len(ranks)
    ordered = np.empty(count, np.int32)  # positions in the class, the most useful first
    ordered[ranks] = np.arange(count, dtype=np.int32)
    shares = config.window if config.order == "window" else [0.0, config.easiest]
    start, end = (int(np.floor(share * count + 0.5)) for share in shares)
    start = min(start, count - 1)  # a small class gives one sample at least
    chosen = ordered[start : max(end, start + 1)]
    if config.order != CLUSTERS:
        chosen = chosen[rng.numpy_generator(seed, "selection order", label).permutation(len(chosen))]
    if config.order == "coverage":
        scores = values[chosen].astype(np.float64)
        width = np.ptp(scores) / config.strata
        strata = np.minimum((scores - scores.min()) / (width or 1.0), config.strata - 1).astype(np.int64)
        places, sizes = _places(strata)
        # a round takes one of each stratum; the last round, which may be incomplete, begins with the largest
        chosen = chosen[np.lexsort((-strata, -sizes, places))]
    elif clusters is not None:
        places, sizes = _places(clusters[chosen].astype(np.int64))
        chosen = chosen[np.argsort((2 * places + 1) / (2 * sizes), kind="stable")]
    outside = np.ones(count, bool)
    outside[chosen] = False
    result = np.empty(count, np.int32)
    result[np.concatenate([chosen, ordered[outside[ordered]]])] = np.arange(count, dtype=np.int32)
    return result


def _places(groups: Array) -> tuple[Array, Array]:
    """Of each sample: its place within its group, by position, and the size of the group; int64 [n]."""
    sizes, order = np.bincount(groups), np.argsort(groups, kind="stable")
    places = np.empty(len(groups), np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return places, sizes[groups]

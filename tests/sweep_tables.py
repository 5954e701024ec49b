"""Synthetic rows of `sweep.parquet`."""

from __future__ import annotations

import itertools

NUMBERS = itertools.count()


def row(mean, keep=1.0, criterion=None, control=None, seed=0, of=1000, distill=10.0, shared=6.0, std=0.01, n=5, **more):
    """A trial's row; keys with a dot are swept ones."""
    values = {
        "trial": f"t{next(NUMBERS)}",
        "seed": seed,
        "select.keep": keep,
        "select.criterion": criterion,
        "control": control,
        "set": "distilled",
        "network": "convnet",
        "mean": mean,
        "std": std,
        "n": n,
        "kept": round(keep * of),
        "of": of,
        "select_seconds": 0.0,
        "distill_seconds": distill,
        "evaluate_seconds": 1.0,
        "shared_seconds": shared,
        "seconds": distill + 1.0,
        "stopped": None,
        "error": None,
    }
    return values | more


def digits(seeds=3):
    """Two criteria at three rates, with both controls: loss at 10 % is as good as everything and takes 2 of 10 seconds."""
    rows = []
    for seed in range(seeds):
        up = 0.002 * (seed - 1)
        for keep, distill in ((0.01, 1.0), (0.1, 2.0), (0.5, 6.0)):
            for criterion, gain in (("loss", 0.05), ("el2n", 0.02)):
                loss = 0.2 if keep == 0.01 else 0.0
                rows.append(row(0.75 + gain - loss + up, keep, criterion, seed=seed, distill=distill))
            rows.append(row(0.70 + up, keep, "random", "random", seed, distill=distill))
        whole = row(0.80 + up, 1.0, None, "unpruned", seed)
        rows += [whole, {**whole, "set": "random_real", "mean": 0.5 + up}]
    return rows

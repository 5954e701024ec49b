"""The columns of the score table that come from beside the scorer: Monte Carlo subsets, and scores made elsewhere.

They need no proxies. Both are proved to be possible before any work is done. Left out: the table itself (`table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO
from distill_at_scale.pruning.scoring import imported, monte_carlo, monte_carlo_utility
from distill_at_scale.pruning.scoring.columns import ExtraColumn, training_ids
from distill_at_scale.storage.run_dir import RunDir

TABLE = "monte_carlo.parquet"  # in the run folder: standard errors and counts


RunSubsets = Callable[[Path, Callable[[int], None]], None]  # into a folder; advances by subsets


def check(config: Config, prepared: PreparedDataset) -> None:
    """Raises UserError for what no work could mend: see `monte_carlo.check` and `imported.check`."""
    imported.check(config)
    if MONTE_CARLO in config.score.criteria:
        monte_carlo.check(config, prepared)


def load(
    config: Config, run: RunDir, prepared: PreparedDataset, run_subsets: RunSubsets, display: Display
) -> dict[str, ExtraColumn]:
    """Every such column, by name; runs the subsets that are not there yet.

    Raises UserError as `check` does, and for imported scores that do not fit the samples.
    """
    if MONTE_CARLO in config.score.criteria:
        monte_carlo.check(config, prepared)
    elif not config.score.imported:
        return {}
    ids = training_ids(prepared)
    found = imported.columns(config, ids)
    for name, file in config.score.imported.items():
        display.say(f"  {name}: {len(ids)} scores from {file}")
    if MONTE_CARLO in config.score.criteria:
        found[MONTE_CARLO] = _of_subsets(config, run, prepared, run_subsets, display, ids)
    return found


def outputs(config: Config, run: RunDir) -> Iterable[Path]:
    """What the score stage leaves beside the table."""
    return [run / TABLE] if MONTE_CARLO in config.score.criteria else []


def _of_subsets(
    config: Config, run: RunDir, prepared: PreparedDataset, run_subsets: RunSubsets, display: Display, ids: pa.Array
) -> ExtraColumn:  # fmt: skip
    section, folder = config.score.monte_carlo, f"monte_carlo/{monte_carlo.work_key(config, prepared)}"
    run.take_over_files(folder)
    (run / folder).mkdir(parents=True, exist_ok=True)
    with display.meter("Monte Carlo", section.subsets, "subsets") as meter:
        run_subsets(run / folder, meter.advance)
    found = monte_carlo_utility.estimate(
        monte_carlo_utility.read_accuracies(run / folder, section), prepared.counts(), section, config.run.seed
    )
    for line in monte_carlo_utility.summary(found.facts):
        display.say(line)
    labels = np.repeat(np.arange(len(prepared.counts())), prepared.counts())
    monte_carlo_utility.write(run / TABLE, ids, labels, found)
    return ExtraColumn("high", ids, found.utility, found.facts)

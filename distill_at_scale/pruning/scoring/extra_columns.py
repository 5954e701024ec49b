"""The columns of scores.parquet that need no proxies: imported scores, and utilities measured on Monte Carlo subsets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO
from distill_at_scale.pruning.scoring import imported, monte_carlo, monte_carlo_utility
from distill_at_scale.pruning.scoring.columns import ExtraColumn, training_ids
from distill_at_scale.storage.run_dir import RunDir

TABLE = "monte_carlo.parquet"  # in the run folder: utilities, standard errors and counts

# (folder, advance): runs the missing subsets into the folder
RunSubsets = Callable[[Path, Callable[[int], None]], None]


def check(config: Config, prepared: PreparedDataset) -> None:
    """Raises UserError, before any work, as `imported.check` and `monte_carlo.check` do."""
    imported.check(config)
    if MONTE_CARLO in config.score.criteria:
        monte_carlo.check(config, prepared)


def load(
    config: Config, run: RunDir, prepared: PreparedDataset, run_subsets: RunSubsets, display: Display
) -> dict[str, ExtraColumn]:
    """All extra columns by name: reads the imported scores and runs the Monte Carlo subsets that are missing.

    Raises UserError as `check` does, and for imported scores that do not fit the samples.
    """
    section = config.score.monte_carlo
    if sampled := MONTE_CARLO in config.score.criteria:
        monte_carlo.check(config, prepared)
    elif not config.score.imported:
        return {}
    ids = training_ids(prepared)
    columns = imported.columns(config, ids)
    for name, file in config.score.imported.items():
        display.say(f"  {name}: {len(ids)} scores from {file}")
    if sampled:
        folder = f"monte_carlo/{monte_carlo.work_key(config, prepared)}"
        run.take_over_files(folder)
        (run / folder).mkdir(parents=True, exist_ok=True)
        with display.meter("Monte Carlo", section.subsets, "subsets") as meter:
            run_subsets(run / folder, meter.advance)
        accuracies, counts = monte_carlo_utility.read_accuracies(run / folder, section), prepared.counts()
        estimate = monte_carlo_utility.estimate(accuracies, counts, section, config.run.seed)
        for line in monte_carlo_utility.summary(estimate.facts):
            display.say(line)
        monte_carlo_utility.write(run / TABLE, ids, np.repeat(np.arange(len(counts)), counts), estimate)
        columns[MONTE_CARLO] = ExtraColumn("high", ids, estimate.utility, estimate.facts)
    return columns


def outputs(config: Config, run: RunDir) -> Iterable[Path]:
    """The files that the score stage writes in addition to the table."""
    return [run / TABLE] if MONTE_CARLO in config.score.criteria else []

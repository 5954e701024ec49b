"""The units of work that every executor runs, in this process or on a Ray worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import current_workers
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.dc_subset import distiller
from distill_at_scale.distillation.engine import Distillation, DistillPaths
from distill_at_scale.pipeline.executors.base import Advance, Report
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import monte_carlo


def waiting_units(config: Config, pieces: Path, advance: Advance) -> list[monte_carlo.SubsetRange]:
    """The units of random subsets that are still to be run; advances by the subsets of all others."""
    units = monte_carlo.subset_ranges(config.score.monte_carlo)
    waiting = [unit for unit in units if not monte_carlo.subset_part_path(pieces, unit).exists()]
    advance(sum(unit[1] for unit in units) - sum(unit[1] for unit in waiting))
    return waiting


def subset_trials(config: Config, prepared: Path, device: torch.device) -> monte_carlo.SubsetTrials:
    """What runs random subsets in a process; DC is handed in where they are distilled."""
    return monte_carlo.SubsetTrials(config, prepared, device, distiller(config, PreparedDataset(prepared), device))


def run_trial(
    config: Config, prepared: Path, checkpoints: Path, trial: int, device: torch.device, advance: Advance
) -> None:
    """Train one proxy, together with the other workers of a process group, if there is one."""
    workers = current_workers(device)
    proxy.ProxyTrial(PreparedDataset(prepared), config.score, trial, config.run.seed, checkpoints, device, workers).run(
        advance
    )


def run_distillation(config: Config, places: DistillPaths, device: torch.device, report: Report) -> None:
    """One worker's part of the distillation; rank 0 leaves the result."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        synthetic = Distillation(config, places, current_workers(device), device, report).run()
    if synthetic is not None:
        synthetic.save(places.work / "synthetic")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Checks of a sweep before anything is scored: its search, and trials for which the data have too few samples.

Counts are exact for scope class. With the other scopes the selection depends on the scores, so a trial is refused only where
no scores could fill it. Not covered: the space (`space.py`), and whether the cluster holds the trials (a runner's `check`).
"""

from __future__ import annotations

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import evaluate
from distill_at_scale.pipeline import validate
from distill_at_scale.pruning.selection.quotas import quota


def check_search(config: Config) -> None:
    """Raises UserError for parallel trials or asha without Ray, and for asha without evaluations during distillation."""
    if config.cluster.address == "none" and (config.sweep.concurrent or 1) > 1:
        count = config.sweep.concurrent
        raise UserError(f"sweep.concurrent = {count} needs Ray; cluster.address=none runs one trial after the other")
    if config.sweep.search != "asha":
        return
    if config.cluster.address == "none":
        raise UserError("sweep.search = asha needs Ray; leave cluster.address out, or set sweep.search=random")
    if not config.distill.evaluate_every:
        raise UserError(
            "sweep.search = asha compares trials by evaluations on the way; set distill.evaluate_every, for example to a "
            f"tenth of the steps ({max(1, distill.step_count(config) // 10)})"
        )


def check_asha(config: Config) -> None:
    """Raises UserError where a trial has fewer evaluations before its end than sweep.grace."""
    steps, interval = distill.step_count(config), config.distill.evaluate_every
    evaluations = (steps - 1) // interval
    if config.sweep.search == "asha" and evaluations < max(1, config.sweep.grace):
        raise UserError(
            f"sweep.grace = {config.sweep.grace}, but a distillation of {steps} steps is evaluated only "
            f"{evaluations} times before its end (distill.evaluate_every = {interval}); lower one of them"
        )


def check_trial(name: str, config: Config, data: PreparedDataset) -> None:
    """Raises UserError, naming the trial, where its networks do not fit or a class keeps too few samples."""
    try:
        evaluate.require_samples_to_test(config, data)
        validate.check_networks(config, data)
        select, counts = config.select, data.counts("train")
        if select.scope == "class":
            wanted = [select.per_class or quota(select.rate, count, 0) for count in counts]
        else:
            together = select.per_class * len(counts) if select.per_class else quota(select.rate, sum(counts), 1)
            wanted = [together] * len(counts)
        kept_at_most = [min(n, max(number, config.min_per_class)) for number, n in zip(wanted, counts, strict=True)]
        distill.check_inputs(config, data, kept_at_most)
    except UserError as error:
        raise UserError(f"the trial {name}: {error}") from None

"""The runs that are compared: finished, and of the same samples and classes as the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.evaluate import require_test_split
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.experiments import auto_select
from distill_at_scale.pruning.selection.ranking import RANDOM
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.run_dir import RunDir, address_of

NEEDED = ("ingest", "score", "select", "distill")  # stages of a run that can be compared


@dataclass(frozen=True)
class FinishedRun:
    """A run with its prepared data and its set; `name` is unique among those of a comparison."""

    name: str
    config: Config
    dir: RunDir
    data: PreparedDataset
    synthetic: SyntheticSet

    def seconds(self, *stages: str) -> float:
        """The time of some of its stages."""
        records: list[dict[str, Any]] = [self.dir.record(stage) or {} for stage in stages]
        return sum(float(record.get("seconds", 0.0)) for record in records)

    def selection_seconds(self) -> float:
        """The time of its selection, of the search for it (select: auto), and of scoring, if one of them needs scores."""
        facts, search = manifest.facts(self.dir / "manifest.parquet"), 0.0
        if searched := facts.get("asked", {}).get("keep") == "auto":
            search = float((auto_select.read(self.dir) or {}).get("seconds", 0.0))
        scored = searched or (facts.get("criterion") != RANDOM and facts.get("kept", 0) < facts.get("of", 1))
        return search + self.seconds("select", *(("score",) if scored else ()))


def open_runs(configs: Sequence[Config]) -> list[FinishedRun]:
    """The runs of configurations; nothing is computed.

    Raises UserError for a run that is not finished, is named twice, has no test split, or has other data than the first one.
    """
    folders, addresses = [RunDir.of(config.run) for config in configs], [address_of(config.run) for config in configs]
    names = [last_name(folder.named) for folder in folders]
    runs: list[FinishedRun] = []
    for config, folder, name, address in zip(configs, folders, names, addresses, strict=True):
        if folder.remote:
            raise UserError(
                f"{folder.named} is in an object store; copy the run folder to this machine and name the copy"
            )
        if addresses.count(address) > 1:
            raise UserError(f"{folder.named} is named twice; name each run once")
        for stage in NEEDED:
            if folder.record(stage) is None:
                raise UserError(
                    f"{folder.named} is not a finished run: it has no output of {stage}; finish it with "
                    f"`distill-at-scale run CONFIG run.dir={folder.named}`"
                )
            folder.content(stage)
        name = folder.named if names.count(name) > 1 else name
        data, synthetic = PreparedDataset(folder / "prepared"), synthetic_set.load(folder.path)
        runs.append(FinishedRun(name, config, folder, data, synthetic))
    require_test_split(runs[0].data)
    for run in runs[1:]:
        _check_same_data(runs[0], run)
    return runs


def _check_same_data(first: FinishedRun, run: FinishedRun) -> None:
    """Raises UserError if a run has other classes, other sizes or other test samples than the first one."""
    ours, theirs = first.data, run.data
    both = f"{first.dir.named} and {run.dir.named}"
    if ours.class_names != theirs.class_names:
        few = [f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (ours.class_names, theirs.class_names)]
        problem = f"{both} have different classes: {few[0]} and {few[1]}"
    elif (ours.shape, ours.kind) != (theirs.shape, theirs.kind):
        problem = f"{both} have samples of different shapes: {[*ours.shape]} and {[*theirs.shape]}"
    elif ours.counts("test") != theirs.counts("test") or ours.index("test")[0] != theirs.index("test")[0]:
        problem = f"{both} have different test samples"
    elif ours.counts("train") != theirs.counts("train") or ours.index("train")[0] != theirs.index("train")[0]:
        problem = f"{both} have different training samples"
    else:
        return
    raise UserError(
        f"{problem}, so their accuracies cannot be compared; name runs of the same data, data.size and data.holdout"
    )

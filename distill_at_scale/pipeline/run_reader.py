"""Reads what a run folder holds: stages, tables, results, plots. `open_run` and the command `show` build on it.

Only `synthetic` and the plots load torch; nothing loads Ray. A folder in an object store is read through its local copy, of
which only the files that are asked for are fetched.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config import load as configuration
from distill_at_scale.config.infrastructure import RunSection
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest, parquet
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.summary import TESTED, differences, tested
from distill_at_scale.storage.run_dir import STAGES, RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distill_at_scale.distillation.synthetic_set import SyntheticSet

SMALL = ("run.json", "evaluation.json", "prepared/dataset.json", "rejected.parquet")  # files that a summary reads
SWEEP, STUDY = ("sweep.parquet", "sweep.html"), ("studies.html", "studies")
RECORD_KEYS = (  # of every stage record; the others are facts of its stage
    "stage", "fingerprint", "config", "content", "outputs", "output", "seconds", "reused_from", "linked_to",
)  # fmt: skip
PICTURE_CLASSES, PICTURE_COLUMNS = 20, 10


@dataclass(frozen=True)
class StageState:
    """How far a stage is.

    Attributes:
        state: finished; reused (taken over from `reused_from`); unfinished (its work is kept and continues); damaged (its
            record or its output is not whole); missing.
        seconds: that it took, without interruptions; None if it did not finish.
        at: when its record was written, in local time.
        reused_from: the run folder that it was taken from.
        facts: what else the stage recorded, such as `kept` and `of` of select.
        problem: of a damaged stage: what is damaged, and what to do.
    """

    state: Literal["finished", "reused", "unfinished", "damaged", "missing"]
    seconds: float | None = None
    at: datetime | None = None
    reused_from: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def done(self) -> bool:
        return self.state in ("finished", "reused")


@dataclass(frozen=True)
class Result:
    """The top-1 accuracy of `n` networks of one kind on the samples of `Run.tested`, trained on one set; a fraction.

    Attributes:
        set: distilled, random_real, or another control or bound.
        std: sample standard deviation over the networks; None for a single one.
        difference: the mean of the distilled set minus this one; None for the distilled set.
        interval: the 95 % t-interval (Welch) of that difference, over networks; None where a set has a single network.
        values: one accuracy per network.
    """

    set: str
    network: str
    n: int
    mean: float
    std: float | None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        std = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{self.set}, {self.network}: {100 * self.mean:.1f}{std} % (n = {self.n})"


class Run:
    """What one run folder holds. The run may be partial, or still be at work: each attribute reads when it is used.

    A property whose stage has not run raises UserError, which names the command to run. Tables are read once.

        >>> run = das.open_run("runs/digits")
        >>> run.results[0]
        Result(set='distilled', network='convnet', n=5, mean=0.83, ...)
        >>> run.scores.to_pandas().groupby("label").score.mean()
        >>> run.plot_scores()
    """

    def __init__(self, folder: RunDir):
        self._folder = folder

    @property
    def path(self) -> Path:
        """The folder on this machine; for a run in an object store, its local copy."""
        return self._folder.path

    @property
    def address(self) -> str:
        """The folder's path or URI, without credentials."""
        return self._folder.named

    @cached_property
    def config(self) -> Config:
        """The configuration of the last command, without credentials of its paths; run.dir is this folder."""
        self._file("run.json", STAGES[0], "configuration")
        config, remote = configuration.load(self.path), self._folder.remote
        return configuration.with_overrides(config, {"run.dir": remote.sync.store.uri}) if remote else config

    @property
    def stages(self) -> dict[str, StageState]:
        """All six stages by name, in their order."""
        return {stage: self._state(stage) for stage in STAGES}

    @cached_property
    def scores(self) -> pa.Table:
        """One row per training sample, sorted by label and id: sample_id, label, score and a column for each criterion.

        The values of each checkpoint (`<criterion>_values`) are in scores.parquet only.
        """
        path = self._file("scores.parquet", "score", "scores")
        table = parquet.open_table(path, "score", ("sample_id", "label", "score"), "score table")
        with parquet.reading(path, "score"):
            return table.read([name for name in table.schema_arrow.names if not name.endswith("_values")])

    @cached_property
    def manifest(self) -> pa.Table:
        """One row per training sample, in the order of `scores`: sample_id, label, score, rank (0 = first to keep), kept."""
        return manifest.read(self._file("manifest.parquet", "select", "manifest"))[0]

    @property
    def rejected(self) -> pa.Table:
        """The samples that ingest did not use, or used with a remark, each with its reason."""
        path = self._file("rejected.parquet", "ingest", "list of rejected samples")
        with parquet.reading(path, "ingest"):
            return pq.read_table(path)

    @cached_property
    def synthetic(self) -> SyntheticSet:
        """The distilled set. Loads torch."""
        from distill_at_scale.distillation import synthetic_set

        return synthetic_set.load(self._file("synthetic", "distill", "synthetic set"))

    @property
    def results(self) -> list[Result]:
        """The accuracy of each set and network: the distilled set, its controls and bounds."""
        evaluation = self._json("evaluation.json", "evaluate", "results")
        gaps = evaluation.get("differences") or differences(evaluation["summary"])  # early versions do not store them
        gap_of = {(gap["against"], gap["network"]): gap for gap in gaps}
        values: dict[tuple[str, str], list[float]] = {}
        for row in evaluation["rows"]:
            values.setdefault((row["set"], row["network"]), []).append(row["top1"])
        results = []
        for row in evaluation["summary"]:
            key = row["set"], row["network"]
            gap = gap_of.get(key, {"mean": None, "low": None, "high": None})
            interval = None if gap["low"] is None else (gap["low"], gap["high"])
            results.append(Result(*key, row["n"], row["mean"], row["std"], gap["mean"], interval, tuple(values[key])))
        return results

    @property
    def tested(self) -> dict[str, Any]:
        """What the results were measured on: `split` (test or held_out, as evaluate.split) and `samples`, their number."""
        evaluation = self._json("evaluation.json", "evaluate", "results")
        return tested(evaluation, sum(self._prepared().counts("test")))

    @property
    def report_path(self) -> Path:
        """The page of the run."""
        return self._file("report.html", "report", "report")

    @property
    def warnings(self) -> list[str]:
        """What the stages warned of: the selection, images that equal real ones, and so on. Empty where nothing ran."""
        lines = [line for state in self.stages.values() for line in state.facts.get("warnings", ())]
        if self._fetched("manifest.parquet"):
            lines = [*manifest.facts(self.path / "manifest.parquet").get("warnings", ()), *lines]
        return list(dict.fromkeys(lines))

    @property
    def has_test_split(self) -> bool:
        """Whether the data set has a test split; True while that is unknown."""
        return not self._fetched("prepared/dataset.json") or PreparedDataset(self.path / "prepared").has_test()

    @property
    def open_stages(self) -> list[str]:
        """The stages that are left, in their order; without samples to test on there is nothing to evaluate."""
        tests = self.has_test_split or (self._configured and self.config.evaluate.split == "held_out")
        return [s for s, state in self.stages.items() if not state.done and (s != "evaluate" or tests)]

    def command(self, name: str) -> str:
        """The command line of a sub-command for this run, for example of "run"."""
        if self._folder.remote or not self._configured:
            return f"distill-at-scale {name} CONFIG run.dir={shlex.quote(self.address)}"
        return f"distill-at-scale {name} {shlex.quote(self.address)}"

    @cached_property
    def _configured(self) -> bool:
        """Whether run.json holds a configuration that this version can read."""
        try:
            return bool(configuration.load(self.path))
        except UserError:
            return False

    def plot_loss(self) -> Figure:
        """The distillation's loss over its steps, and the accuracy where it was measured."""
        from distill_at_scale.pipeline.report import run_plots, run_report

        loss, top1 = run_report.distillation_log(self._file("metrics.jsonl", "distill", "log of the distillation"))
        if not loss and not top1:
            raise UserError(f"the distillation of {self.address} logged no loss: its method optimises nothing")
        return run_plots.curve(loss, top1)

    def plot_scores(self) -> Figure:
        """The scores of each class, and which samples are kept."""
        from distill_at_scale.pipeline.report import run_plots, run_report

        self._file("manifest.parquet", "select", "manifest")
        self._fetched("scores.parquet")
        parts, label = run_report.score_distributions(self._folder, self._prepared())
        return run_plots.distributions(parts, f"{label}, one value per training sample")

    def plot_accuracy(self) -> Figure:
        """The accuracy of each set by network, with the single networks as dots."""
        from distill_at_scale.pipeline.report import run_plots, run_report

        bars = run_report.accuracy_bars(self._json("evaluation.json", "evaluate", "results"))
        return run_plots.accuracies(bars, 100 / len(self._prepared().class_names), TESTED[self.tested["split"]])

    def plot_images(self) -> Figure:
        """The distilled samples, a row per class: images, the middle frames of clips, or plots of arrays."""
        from distill_at_scale.core.images import to_image, to_pixels
        from distill_at_scale.pipeline.report import run_plots

        labels, pixels = self.synthetic.labels.tolist(), to_pixels(self.synthetic.values().numpy())
        rows: dict[str, list[Any]] = {}
        for label, sample in zip(labels, pixels, strict=True):
            rows.setdefault(self.synthetic.class_names[label], []).append(to_image(sample))
        shown = list(rows.items())[:PICTURE_CLASSES]
        return run_plots.pictures([(name, images[:PICTURE_COLUMNS]) for name, images in shown])

    def __repr__(self) -> str:
        return "\n".join([f"Run({self.address!r})", *(f"  {line}" for line in self._summary())])

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self._summary())
        return f"<b>Run</b> <code>{html.escape(self.address)}</code><ul>{lines}</ul>"

    def _summary(self) -> Iterator[str]:
        stages = self.stages
        yield "stages: " + ", ".join(f"{stage} {state.state}" for stage, state in stages.items())
        if stages["evaluate"].done:
            try:
                yield from map(str, self.results)
            except UserError as error:  # a summary never fails
                yield str(error)
        if count := len(self.warnings):
            yield f"{count} warning{'s' if count > 1 else ''}: .warnings"
        if stages["report"].done:
            yield f"report: {self.report_path}"

    def _state(self, stage: str) -> StageState:
        try:
            record = self._folder.record(stage)
            if record and not self._folder.remote:  # of a run in an object store only some files are here
                self._folder.content(stage)
        except UserError as error:
            return StageState("damaged", problem=str(error))
        if record is None:
            return StageState("unfinished" if any(self.path.glob(f".work/{stage}-*")) else "missing")
        facts = {key: value for key, value in record.items() if key not in RECORD_KEYS}
        at = datetime.fromtimestamp((self.path / "stages" / f"{stage}.json").stat().st_mtime).astimezone()
        state: Any = "reused" if "reused_from" in record else "finished"
        return StageState(state, record["seconds"], at, record.get("reused_from"), facts)

    def _fetched(self, name: str) -> bool:
        """Whether a file or folder exists; fetches it from the object store."""
        if self._folder.remote:
            self._folder.fetch(name)
        return (self.path / name).exists()

    def _file(self, name: str, stage: str, what: str) -> Path:
        if not self._fetched(name):
            raise UserError(f"{self.address} has no {what} yet; run `{self.command(stage)}`")
        return self.path / name

    def _json(self, name: str, stage: str, what: str) -> dict[str, Any]:
        path = self._file(name, stage, what)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.address}/{name} is damaged ({error}); run `{self.command(stage)}` again") from None
        return content

    def _prepared(self) -> PreparedDataset:
        self._file("prepared/dataset.json", "ingest", "prepared data")
        return PreparedDataset(self.path / "prepared")


def open_folder(address: str | Path) -> RunDir:
    """The folder at a path or a URI; of one in an object store only the small files are fetched.

    Raises UserError if nothing is there, or if it is neither the folder of a run nor that of a sweep or study.
    """
    folder = RunDir.of(RunSection(dir=str(address)))
    if folder.remote:
        folder.fetch(*SMALL, *SWEEP[:1], *STUDY[:1])
    elif not folder.path.is_dir():
        missing = f"{folder.path} is a file" if folder.path.exists() else f"the folder {folder.path} does not exist"
        raise UserError(f"{missing}; give the run.dir of a run")
    if not (is_run(folder) or kind_of(folder) != "run"):
        raise UserError(f"{folder.named} is not a run folder (no stages/, no run.json); give the run.dir of a run")
    return folder


def is_run(folder: RunDir) -> bool:
    """Whether a stage of a run began in the folder."""
    return (folder / "run.json").is_file() or any((folder / "stages").glob("*.json"))


def kind_of(folder: RunDir) -> Literal["sweep", "study", "sweep or study", "run"]:
    """What a folder belongs to; which of sweep and study is known when the first has written something."""
    if any((folder / name).exists() for name in SWEEP):
        return "sweep"
    if any((folder / name).exists() for name in STUDY):
        return "study"
    return "sweep or study" if (folder / "points").is_dir() and not is_run(folder) else "run"


def open_run(address: str | Path) -> Run:
    """A finished or partial run by its folder. Loads neither torch nor Ray.

        >>> run = das.open_run("runs/digits")
        >>> run.results, run.scores.to_pandas()

    Args:
        address: a path, or a URI such as s3://bucket/runs/x.

    Raises:
        UserError: there is no run folder at the address, or it is the folder of a sweep or study.
    """
    folder = open_folder(address)
    if not is_run(folder):
        raise UserError(
            f"{folder.named} is the folder of a {kind_of(folder)}, not of a run; `distill-at-scale show {folder.named}` "
            "says where its page is, and its runs are in points/"
        )
    return Run(folder)

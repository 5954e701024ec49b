"""The command `distill-at-scale STAGE CONFIG [section.key=value ...]`.

Functions import what they need, so that `--help` and errors of usage load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_at_scale.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from distill_at_scale.config.load import Config
    from distill_at_scale.core.progress import Display
    from distill_at_scale.experiments.points import PointSet
    from distill_at_scale.experiments.runners import PointRunner
    from distill_at_scale.pipeline.executors.base import Executor
    from distill_at_scale.pipeline.monitoring.observers import Observer
    from distill_at_scale.pipeline.pipeline import Pipeline
    from distill_at_scale.pipeline.planning.plan import RunPlan
    from distill_at_scale.storage.run_dir import RunDir

STAGES = ("ingest", "score", "select", "distill", "evaluate", "report")
EPILOG = f"""STAGE is one of:
  run       all stages in order; a stage with valid output is skipped
  {", ".join(STAGES)}
            one stage
  validate  read every sample before anything is computed, and list the broken ones
  plan      estimate time, memory, disk and cost of each stage, and refuse what cannot fit;
            after a run: compare the estimates with what it took
  sweep     try the configurations of sweep.space on shared ingest and scores, with random and unpruned controls
  study     answer the questions of studies.run by many short distillations on shared ingest and scores
  export    write scores and the list of kept samples as *.parquet or *.csv, or as *.json by position
An interrupted command resumes when it is given again."""

FULL, DENIED = "Free space or choose another place", "Check its permissions or choose another place"
ADVICE = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: DENIED, errno.EROFS: DENIED, errno.EPERM: DENIED}
OTHER_ADVICE = "Check the disk, and that all nodes see it at this path"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """stage, config, overrides, scores and kept; exits with 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        "distill-at-scale", description="Prune a data set and distill it.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    stages = ("run", "validate", "plan", "sweep", "study", "export", *STAGES)
    parser.add_argument("stage", metavar="STAGE", choices=stages, help="run, or one stage")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/digits.yaml")
    override_help = "override a key, for example select.keep=0.1"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=override_help)
    for name, content in (("scores", "the scores of all samples"), ("kept", "the kept samples")):
        parser.add_argument(
            f"--{name}", metavar="FILE", type=Path, action="append", default=[],
            help=f"export: where to write {content}; may be given several times",
        )  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 if validate found broken samples; 2 for an error that the user can fix; 130 after Ctrl-C.
    """
    parsed = parse(arguments)
    sys.path.append(os.getcwd())  # package.module:Object may name a module in the current folder

    def command() -> int:
        from distill_at_scale.config.load import load

        config = load(parsed.config, parsed.overrides)
        if parsed.stage == "export":
            return export(config, parsed.scores, parsed.kept)
        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        if address in (None, "none") or "ray" in sys.modules or not hasattr(os, "fork"):
            return _run(config, parsed.stage)
        from distill_at_scale.cluster import head_watchdog

        def connected() -> int:
            with head_watchdog.explained(address):
                return _run(config, parsed.stage)

        return head_watchdog.guarded(address, lambda: _report_errors(connected))

    return _report_errors(command)


def _report_errors(body: Callable[[], int]) -> int:
    """Print an error of `body` that the user can fix as one line, and return the exit status."""

    def say(text: str) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)

    from distill_at_scale.core.progress import printable

    try:
        return body()
    except UserError as error:
        say(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        say("interrupted; give the same command again to resume")
        return 130
    except OSError as error:
        if error.errno is None:
            raise
        where, advice = printable(str(error.filename or "the run folder")), ADVICE.get(error.errno, OTHER_ADVICE)
        say(f"error: {error.strerror}: {where}. {advice}, and give the same command again; finished work is kept.")
    return 2


def _run(config: Config, stage: str) -> int:
    """Everything but export."""
    from distill_at_scale.core.progress import Display
    from distill_at_scale.experiments import auto_keep_rate
    from distill_at_scale.experiments.sweep import run as sweep
    from distill_at_scale.pipeline.pipeline import Pipeline, with_keep_rate
    from distill_at_scale.storage.run_dir import RunDir

    display = Display()
    if stage == "sweep":
        make_trackers(config)  # a missing package is reported before anything starts
        sweep.run(config, display, lambda: make_trial_runner(config, display), make_trackers)
        return 0
    if stage == "study":
        run_studies(config, display)
        return 0
    if stage == "plan" and config.select.keep == "auto" and (rate := auto_keep_rate.known_rate(config)):
        config = with_keep_rate(config, rate)
    executor, rate_of = partial(make_executor, config, display), partial(find_rate, display=display)
    pipeline = Pipeline(config, executor, display, rate_of, observers=make_trackers)
    if stage == "validate":
        return 1 if pipeline.validate() else 0
    if stage == "plan":
        show_plan(config, pipeline.forecast(), display)
        return 0
    pipeline.run(STAGES if stage == "run" else (stage,))
    if stage in ("run", "evaluate", "report"):
        show_result(RunDir.of(config.run), display.console)
    return 0


def export(config: Config, scores: Sequence[Path], kept: Sequence[Path]) -> int:
    """Write the scores and the list of kept samples of this configuration's run to files.

    Raises:
        UserError: no file is named, or the run folder lacks the output of this configuration.
    """
    from distill_at_scale.core.progress import Display
    from distill_at_scale.pipeline.stages import score, select
    from distill_at_scale.pruning import export as exported
    from distill_at_scale.storage.run_dir import RunDir

    if not scores and not kept:
        raise UserError("nothing to export; add --scores FILE, --kept FILE or both (*.parquet, *.csv or *.json)")
    run, display = RunDir.of(config.run), Display()
    for path in (*scores, *kept):
        exported.check(path)
    run.fetch()
    for stage, paths, inputs in (("score", scores, score.inputs), ("select", kept, select.inputs)):
        if paths and not (run.record(stage) and run.valid(stage, inputs(config, run))):
            raise UserError(f"{run.named} has no output of {stage} yet; run `distill-at-scale {stage} CONFIG` first")
    for path in scores:
        display.say(f"{path}: {exported.scores(path, run / 'scores.parquet', config)} scores")
    for path in kept:
        display.say(f"{path}: {exported.kept(path, run / 'manifest.parquet', config)} kept samples")
    return 0


def make_executor(config: Config, display: Display) -> Executor:
    """The executor for cluster.address. Raises UserError if Ray is not installed or cannot be reached."""
    if config.cluster.address == "none":
        from distill_at_scale.pipeline.executors.local import LocalExecutor

        return LocalExecutor()
    _need_ray()
    from distill_at_scale.cluster.executor import RayExecutor

    return RayExecutor(config, display.say)


def make_trackers(config: Config) -> Sequence[Observer]:
    """The trackers of the section `track`. Raises UserError if one is not installed."""
    if config.track.mlflow is None and config.track.wandb is None:
        return ()
    _need_ray("the trackers of the section track use it; install it, or remove that section")
    from distill_at_scale.cluster.trackers import trackers

    return trackers(config)


def make_trial_runner(config: Config, display: Display) -> PointRunner:
    """The runner for the trials of a sweep: Ray Tune, or this process with cluster.address=none."""
    if config.cluster.address == "none":
        from distill_at_scale.experiments.runners import LocalRunner

        return LocalRunner()
    _need_ray()
    from distill_at_scale.cluster.tune_runner import TuneRunner

    return TuneRunner(config, display.say)


def _need_ray(advice: str = "install it, or set cluster.address=none to run in this process alone") -> None:
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"Ray is not installed; {advice}")


@contextmanager
def open_points(config: Config, display: Display) -> Iterator[PointSet]:
    """The points of studies and of select.keep: auto; they run in warm Ray actors, or here with cluster.address=none.

    Raises UserError if Ray is not installed. Ray starts when a point has to run.
    """
    from distill_at_scale.experiments.points import PointSet
    from distill_at_scale.experiments.runners import LocalRunner

    if config.cluster.address == "none":
        yield PointSet(config, LocalRunner(), display)
        return
    _need_ray()
    from distill_at_scale.cluster.actor_runner import ActorRunner
    from distill_at_scale.cluster.executor import absolute

    with closing(ActorRunner(config, display.say)) as runner:
        yield PointSet(absolute(config), runner, display)


def run_studies(config: Config, display: Display) -> None:
    """Run all studies of studies.run, and print their answers at the end."""
    from distill_at_scale.experiments.studies import suite
    from distill_at_scale.pipeline import validate
    from distill_at_scale.storage.run_dir import RunDir

    validate.check_names(config)
    run = RunDir.of(config.run, display.say)
    run.create()
    with run.lock(), open_points(config, display) as points:
        findings = suite.run(config, points, display.say)
    for finding in findings:
        display.say(f"\n{finding.title}: {finding.answer}" + (f"\n  {finding.paper}" if finding.paper else ""))
    for label, name in (("page", "studies.html"), ("figures", "studies/studies.parquet")):
        if (run / name).exists():
            display.say(f"{label}: {run.place(name) if run.remote else (run / name).resolve()}")


def find_rate(pipeline: Pipeline, display: Display) -> float:
    """The keep rate for select.keep: auto."""
    from distill_at_scale.experiments import auto_keep_rate

    def points(config: Config) -> AbstractContextManager[PointSet]:
        _ = pipeline.executor  # starts Ray once, for the search and for the stages after it
        return open_points(config, display)

    return auto_keep_rate.rate(pipeline.config, points, display.say)


def show_plan(config: Config, plan: RunPlan, display: Display) -> None:
    """Print the plan's table and remarks. Raises UserError for what cannot fit."""
    from distill_at_scale.pipeline.planning.plan import remarks, table

    display.console.print(table(config, plan))
    for line in remarks(plan):
        display.say(line)
    plan.refuse()


def show_result(run: RunDir, console: Console) -> None:
    """Print the accuracy per set and network, and the path of the report."""
    from rich.table import Table

    path = run / "evaluation.json"
    if not path.exists():
        return
    table = Table(title="top-1 accuracy on the test split, %")
    for column in ("set", "network", "mean ± std", "n"):
        table.add_column(column, justify="left" if column in ("set", "network") else "right")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["summary"]
    for row in rows:
        std = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
        table.add_row(row["set"], row["network"], f"{100 * row['mean']:.1f}{std}", str(row["n"]))
    console.print(table)
    if (run / "report.html").exists():
        place = run.place("report.html") if run.remote else (run / "report.html").resolve()
        console.print(f"report: {place}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

"""The command `distill-at-scale STAGE CONFIG [section.key=value ...]`."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display, printable
from distill_at_scale.experiments import auto_keep_rate
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner, PointRunner
from distill_at_scale.experiments.studies import suite
from distill_at_scale.experiments.sweep import run as sweep
from distill_at_scale.pipeline import fingerprints, validate
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.pipeline.pipeline import Pipeline, decided
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.plan import RunPlan
from distill_at_scale.pruning import export as exported
from distill_at_scale.storage.run_dir import STAGES, RunDir

EPILOG = """STAGE is run (all stages in order, each skipped when its valid output is there) or one of: {stages};
or validate (looks at every sample before anything is computed, and lists what is broken),
or plan (says before a run what each stage will take, and refuses what cannot fit; after a run, how far off it was),
or sweep (tries the configurations of sweep.space on shared ingest and scores, with random and unpruned controls),
or study (answers the questions of studies.run by many short distillations that share ingest and scores),
or export (writes scores and the list of kept samples as *.parquet, *.csv, or by position as *.json).
An interrupted command resumes when it is given again."""

SEARCHES = ("sweep", "study")
FULL, CLOSED = "Free space or choose another place", "Check its permissions or choose another place"
ADVICE = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: CLOSED, errno.EROFS: CLOSED, errno.EPERM: CLOSED}
OTHER_ADVICE = "Check the disk, and that every node sees it at this path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where validate found broken samples; 2 for what the user can mend; 130 after Ctrl-C."""
    parsed = _parser().parse_intermixed_args(arguments)
    sys.path.append(os.getcwd())  # so that package.module:Object is found in the current folder
    return _reported(lambda: _command(parsed))


def _reported(body: Callable[[], int]) -> int:
    """The exit status of a command whose errors are said in one line each."""
    errors = Console(stderr=True, highlight=False)
    try:
        return body()
    except UserError as error:
        errors.print(f"error: {printable(str(error))}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        errors.print("interrupted; give the same command again to go on from here")
        return 130
    except OSError as error:
        if error.errno is None:
            raise
        where, advice = printable(str(error.filename or "the run folder")), ADVICE.get(error.errno, OTHER_ADVICE)
        errors.print(f"error: {error.strerror}: {where}. {advice}, and give the same command again; what is finished is "
                     "kept.", markup=False, soft_wrap=True)  # fmt: skip
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "distill-at-scale", description="Prune a data set and distill it.", epilog=EPILOG.format(stages=", ".join(STAGES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "stage",
        metavar="STAGE",
        choices=("run", "validate", "plan", *SEARCHES, "export", *STAGES),
        help="run, or one stage",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/digits.yaml")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="override a key, for example select.keep=0.1"
    )
    for name, what in (("scores", "every sample's scores"), ("kept", "the samples that are kept")):
        parser.add_argument(
            f"--{name}", metavar="FILE", type=Path, action="append", default=[],
            help=f"of export: where to write {what}; may be given several times",
        )  # fmt: skip
    return parser


def export(config: Config, scores: Sequence[Path], kept: Sequence[Path]) -> int:
    """Write the scores and the list of kept samples of this configuration's run to files.

    Raises UserError where there is nothing to write, or the run folder holds the output of another configuration.
    """
    if not scores and not kept:
        raise UserError(
            "export writes nothing yet; add --scores FILE, --kept FILE or both (*.parquet, *.csv or *.json)"
        )
    run, display = RunDir.of(config.run), Display()
    for path in (*scores, *kept):
        exported.check(path)
    run.fetch()
    for stage, paths in (("score", scores), ("select", kept)):
        if paths and not (run.record(stage) and run.valid(stage, fingerprints.inputs(stage, config, run))):
            raise UserError(f"{run.named} has no output of {stage} yet; run `distill-at-scale {stage} CONFIG` first")
    for path in scores:
        display.say(f"{path}: {exported.scores(path, run / 'scores.parquet', config)} scores")
    for path in kept:
        display.say(f"{path}: {exported.kept(path, run / 'manifest.parquet', config)} kept samples")
    return 0


def _command(parsed: argparse.Namespace) -> int:
    config = configuration.load(parsed.config, parsed.overrides)
    if parsed.stage == "export":
        return export(config, parsed.scores, parsed.kept)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address in (None, "none") or "ray" in sys.modules or not hasattr(os, "fork"):
        return _run(config, parsed.stage)
    from distill_at_scale.cluster.head_watchdog import explained, guarded

    def connected() -> int:
        with explained(address):
            return _run(config, parsed.stage)

    return guarded(address, lambda: _reported(connected))


def _run(config: Config, stage: str) -> int:
    display = Display()
    if stage == "sweep":
        make_trackers(config)  # what is missing for them is said before anything starts
        sweep.run(config, display, lambda: make_trial_runner(config, display), make_trackers)
        return 0
    if stage == "study":
        run_studies(config, display)
        return 0
    if stage == "plan" and config.select.keep == "auto" and (rate := auto_keep_rate.known_rate(config)):
        config = decided(config, rate)
    pipeline = Pipeline(
        config,
        lambda: make_executor(config, display),
        display,
        lambda run: find_rate(run, display),
        observers=make_trackers,
    )
    if stage == "validate":
        return 1 if pipeline.validate() else 0
    if stage == "plan":
        show_plan(config, pipeline.forecast(), display)
        return 0
    pipeline.run(STAGES if stage == "run" else (stage,))
    if stage in ("run", "evaluate", "report"):
        show_result(RunDir.of(config.run), display.console)
    return 0


def make_executor(config: Config, display: Display) -> Executor:
    """The executor that cluster.address asks for.

    Raises UserError where Ray is wanted and not installed, or cannot be reached.
    """
    if config.cluster.address == "none":
        return LocalExecutor()
    _need_ray()
    from distill_at_scale.cluster.executor import RayExecutor

    return RayExecutor(config, display.say)


def make_trackers(config: Config) -> Sequence[Observer]:
    """What the section `track` asks for.

    Raises UserError where it asks for something that is not installed.
    """
    if config.track.mlflow is None and config.track.wandb is None:
        return ()
    _need_ray("the trackers of the section track go through it; install it, or leave that section out")
    from distill_at_scale.cluster.trackers import trackers

    return trackers(config)


def make_trial_runner(config: Config, display: Display) -> PointRunner:
    """The runner for the trials of a sweep: Ray Tune, or this process with cluster.address=none.

    Raises UserError as make_executor does.
    """
    if config.cluster.address == "none":
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

    Raises UserError where Ray is not installed. Ray starts when a point has to run.
    """
    if config.cluster.address == "none":
        yield PointSet(config, LocalRunner(), display)
        return
    _need_ray()
    from distill_at_scale.cluster.actor_runner import ActorRunner
    from distill_at_scale.cluster.executor import absolute

    with closing(ActorRunner(config, display.say)) as runner:
        yield PointSet(absolute(config), runner, display)


def run_studies(config: Config, display: Display) -> None:
    """All studies of studies.run, and at the end their answers."""
    validate.check_names(config)
    run = RunDir.of(config.run, display.say)
    run.create()
    with run.lock(), open_points(config, display) as points:
        findings = suite.run(config, points, display.say)
    for finding in findings:
        display.say(f"\n{finding.title}: {finding.answer}" + (f"\n  {finding.paper}" if finding.paper else ""))
    for what, name in (("page", "studies.html"), ("figures", "studies/studies.parquet")):
        if (run / name).exists():
            display.say(f"{what}: {run.place(name) if run.remote else (run / name).resolve()}")


def find_rate(pipeline: Pipeline, display: Display) -> float:
    """For select.keep: auto."""

    def points(config: Config) -> AbstractContextManager[PointSet]:
        _ = pipeline.executor  # starts Ray once, for the search and for the stages after it
        return open_points(config, display)

    return auto_keep_rate.rate(pipeline.config, points, display.say)


def show_plan(config: Config, found: RunPlan, display: Display) -> None:
    """The plan's table, what its figures consist of, and then what cannot fit, as a UserError."""
    display.console.print(plans.table(config, found))
    for line in plans.remarks(found):
        display.say(line)
    found.refuse()


def show_result(run: RunDir, console: Console) -> None:
    """The small table at the end: accuracy per set and network, and where the report lies."""
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

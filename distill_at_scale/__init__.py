"""Dataset distillation with bi-level pruning, on Ray. This is the public Python API.

import distill_at_scale as das

run = das.run("digits")  # or das.open_run("runs/digits")
run.results, run.scores.to_pandas(), run.synthetic.images

It is also the one place that puts the parts of a run together: executors, trackers, runners of points. Functions import what
they need, and other names are imported on first use, so that `import distill_at_scale` loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_at_scale.core.errors import UserError

if TYPE_CHECKING:
    from distill_at_scale.config.load import Config
    from distill_at_scale.core.progress import Display
    from distill_at_scale.distillation import synthetic_set as synthetic
    from distill_at_scale.distillation.synthetic_set import SyntheticSet, load
    from distill_at_scale.experiments.points import PointSet
    from distill_at_scale.experiments.runners import PointRunner
    from distill_at_scale.pipeline.executors.base import Executor
    from distill_at_scale.pipeline.monitoring.observers import Observer
    from distill_at_scale.pipeline.pipeline import Pipeline
    from distill_at_scale.pipeline.run_reader import Run, open_run

__version__ = "0.1.0"
__all__ = [
    "Config", "Run", "SyntheticSet", "UserError", "__version__", "load", "load_config", "open_run", "run", "synthetic",
]  # fmt: skip

_SOURCES = {  # module and its attribute; None: the module itself
    "Config": ("config.load", "Config"),
    "Run": ("pipeline.run_reader", "Run"),
    "open_run": ("pipeline.run_reader", "open_run"),
    "synthetic": ("distillation.synthetic_set", None),
    "SyntheticSet": ("distillation.synthetic_set", "SyntheticSet"),
    "load": ("distillation.synthetic_set", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    imported = importlib.import_module(f"{__name__}.{module}")
    globals()[name] = value = getattr(imported, attribute) if attribute else imported
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_config(path: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), **values: Any) -> Config:
    """A configuration, checked: an unknown key or a value that is not allowed is an error.

        >>> das.load_config("digits", select={"keep": 0.1}, run={"dir": "runs/tenth"})
        >>> das.load_config("mine.yaml", ["distill.ipc=10"], **{"cluster.address": "none"})
        >>> das.load_config({"data": {"source": "imagefolder", "path": "photos"}, "distill": {"method": "dm"}})

    Args:
        path: a YAML file, the name of a shipped configuration, a run folder, a configuration, or the values by section.
        overrides: keys as the command line takes them, `section.key=value`.
        values: more values, by section or by dotted key; they win over `overrides`.

    Raises:
        UserError: names the key, where it was set, and what is allowed.
    """
    from distill_at_scale.config.load import load

    return load(path, overrides, values)


def run(
    config: Config | str | Path | Mapping[str, Any], stages: str | Sequence[str] | None = None, progress: bool = True
) -> Run:
    """Run the stages of a configuration in this process, or from it on Ray, as the command `run` does.

    Finished stages are skipped, and an interrupted run continues. In a notebook the progress appears below the cell.

        >>> run = das.run("digits")
        >>> run = das.run(das.load_config("digits", **{"cluster.address": "none"}), stages=["ingest", "score"])
        >>> run.results

    Args:
        config: a configuration, or anything that `load_config` takes.
        stages: names of stages; None: all. They run in the order of the pipeline.
        progress: print what the run does.

    Raises:
        UserError: an error that the user can fix; the message says how. What is finished is kept.
    """
    from distill_at_scale.config.explain import suggest
    from distill_at_scale.config.load import Config
    from distill_at_scale.core.progress import Display
    from distill_at_scale.storage.run_dir import STAGES, RunDir

    config = config if isinstance(config, Config) else load_config(config)
    if stages is not None and (not stages or not isinstance(stages, str | Iterable)):
        raise UserError(f"stages = {stages!r} names no stage; give None for all, or some of {', '.join(STAGES)}")
    wanted = STAGES if stages is None else (stages,) if isinstance(stages, str) else tuple(stages)
    if not wanted:
        raise UserError(f"stages is empty; name one or more of {', '.join(STAGES)}")
    for name in wanted:
        if name not in STAGES:
            raise UserError(f"the stage {name!r} is unknown; {suggest(str(name), STAGES)}")
    display = Display() if progress else Display.silent()
    display.say(opening(config, "all stages" if stages is None else ", ".join(wanted)))
    with explained(config), started_early(config, display, wanted):
        from distill_at_scale.pipeline import warnings
        from distill_at_scale.pipeline.run_reader import Run

        warnings.warn(config, display)
        make_pipeline(config, display).run([stage for stage in STAGES if stage in wanted])
    return Run(RunDir.of(config.run))


@contextmanager
def started_early(config: Config, display: Display, stages: Sequence[str]) -> Iterator[None]:
    """Start Ray before torch is imported, so that both take their seconds at the same time.

    Only where a stage has work for a Ray of this machine, as far as that can be seen at once.
    """
    from distill_at_scale.storage.filesystem import is_uri

    data, folder = config.data.path, config.run.dir
    here = ray_address(config) is None and not is_uri(folder) and importlib.util.find_spec("ray") is not None
    readable = data is None or is_uri(data) or Path(data).expanduser().exists()
    done = all(Path(folder).expanduser().joinpath("stages", f"{stage}.json").exists() for stage in stages)
    if not here or done or not readable or not set(stages) - {"select", "report"}:
        yield
        return
    from distill_at_scale.cluster import session

    try:
        session.start_early(config.cluster, display.say)
        yield
    finally:
        session.close_early()


def ray_address(config: Config) -> str | None:
    """The Ray cluster that a configuration runs on; None: a Ray of its own on this machine; "none": no Ray."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def explained(config: Config) -> AbstractContextManager[None]:
    """An error inside the block becomes a UserError about the lost cluster if the head of a named cluster is gone."""
    address = ray_address(config)
    if address in (None, "none"):
        return nullcontext()
    from distill_at_scale.cluster import head_watchdog

    return head_watchdog.explained(address)


def opening(config: Config, work: str) -> str:
    """The first line of a command: version, what it does, in which folder, and where the work runs."""
    address, folder = ray_address(config), config.run.dir
    if "://" in folder:
        from distill_at_scale.storage.filesystem import redact_uri

        folder = redact_uri(folder)
    names = {None: "on Ray, on this machine", "none": "in this process"}
    where = names.get(address, f"on the Ray cluster at {address}")
    return f"distill-at-scale {__version__}: {work}, in the run folder {folder}, {where}"


def make_pipeline(config: Config, display: Display) -> Pipeline:
    """The stages of a configuration, with the executor for cluster.address and the trackers of the section `track`.

    Raises UserError if the package of a tracker is not installed. The executor starts when a stage first needs it.
    """
    from distill_at_scale.pipeline.pipeline import Pipeline

    executor, find = partial(make_executor, config, display), partial(find_selection, display=display)
    return Pipeline(config, executor, display, find, observers=make_trackers)


def make_executor(config: Config, display: Display) -> Executor:
    """The executor for cluster.address. Raises UserError if Ray is not installed or cannot be reached."""
    if config.cluster.address == "none":
        from distill_at_scale.pipeline.executors.local import LocalExecutor

        return LocalExecutor(say=display.say)
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
    """The points of studies and of select: auto; they run in warm Ray actors, or here with cluster.address=none.

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


def find_selection(pipeline: Pipeline, display: Display) -> Mapping[str, Any]:
    """The keys of `select` for select: auto."""
    from distill_at_scale.experiments import auto_select

    def points(config: Config) -> AbstractContextManager[PointSet]:
        pipeline.executor.release()  # Ray starts once, for the search and for the stages after it
        return open_points(config, display)

    return auto_select.selection(pipeline.config, points, display.say)


def run_sweep(config: Config, display: Display) -> None:
    """Run the trials of a sweep, and write its table and its page."""
    from distill_at_scale.experiments.sweep import run as sweep

    make_trackers(config)  # a missing package is reported before anything starts
    sweep.run(config, display, partial(make_trial_runner, config, display), make_trackers)


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


def compare_runs(config: Config, others: Sequence[str], display: Display) -> None:
    """Compare the finished run of a configuration with those of others, and write its page and its report again."""
    from distill_at_scale.experiments.compare import run as compare

    configs = [config, *(load_config(name) for name in others)]
    compare.run(configs, display, partial(make_executor, config, display))
    make_pipeline(config, display).run(("report",))


def plan_run(config: Config, display: Display) -> None:
    """Print what each stage will take on this machine. Raises UserError for what cannot fit."""
    from distill_at_scale.experiments import auto_select
    from distill_at_scale.pipeline.pipeline import with_selection
    from distill_at_scale.pipeline.planning.plan import remarks, table

    if config.select.keep == "auto" and (keys := auto_select.known_selection(config)):
        config = with_selection(config, keys)
    cluster = config.cluster.model_copy(update={"address": ray_address(config)})
    plan = make_pipeline(config.model_copy(update={"cluster": cluster}), display).forecast()
    display.console.print(table(config, plan))
    for line in remarks(plan):
        display.say(line)
    plan.refuse()

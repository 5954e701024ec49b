"""MLflow and Weights & Biases through Ray's integrations: parameters, curves, results, and the report as an artefact.

A tracked run starts with the first stage that has work and ends with the command; a resumed command is a run of its own. In a
sweep every trial is one tracked run. Ray has to be installed, but does not run. Credentials come from the environment.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from distill_at_scale.config.fields import flatten
from distill_at_scale.config.infrastructure import MlflowSection, WandbSection
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.redact import public
from distill_at_scale.storage.run_dir import RunDir

NOT_LOGGED = ("step", "of", "at")  # keys of a log line that are not metrics
ARTEFACTS = ("report.html", "evaluation.json", "run.json")
NO_PARAMETERS = ("track.", "sweep.", "studies.")
MAX_LENGTH = 500  # characters of a parameter


def trackers(config: Config) -> list[Observer]:
    """The trackers of the section `track`. Raises UserError if a tracker's package is not installed."""
    observers: list[Observer] = []
    for package, name, client in (("mlflow", "MLflow", Mlflow), ("wandb", "Weights & Biases", Wandb)):
        if (section := getattr(config.track, package)) is None:
            continue
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"track.{package} needs the package {package}, which is not installed; install distill_at_scale[{package}], "
                f"or remove track.{package} from the configuration"
            )
        observers.append(Tracker(name, config, partial(client, section, config)))
    return observers


class Tracker:
    """Logs events as metrics; starts the tracked run with the first stage that has work."""

    def __init__(self, name: str, config: Config, begin: Callable[[], TrackerClient]):
        self.name, self.begin, self.folder = name, begin, RunDir.of(config.run).path
        self.run: TrackerClient | None = None
        self.failed = False
        self.results: dict[str, list[float]] = {}

    def __call__(self, event: Event) -> None:
        if event.what == "stage" and event.name == "started" and self.run is None:
            self.run = self.begin()
        if self.run is None:
            return
        if event.what == "log":
            numbers = {key: value for key, value in event.values.items() if isinstance(value, int | float)}
            metrics = {key: value for key, value in numbers.items() if key not in NOT_LOGGED and math.isfinite(value)}
            self.run.log(metrics, event.values["step"])
        elif event.what == "result":  # the mean over the seeds so far, of each accuracy
            row = event.values
            for key in ("top1", "top5"):
                self.results.setdefault(f"{row['set']}/{row['network']}/{key}", []).append(row[key])
            self.run.log({name: fmean(values) for name, values in self.results.items()}, None)
        elif event.what == "stage" and event.name in ("finished", "failed"):
            self.failed = event.name == "failed"
            self.run.log({f"seconds/{event.stage}": event.seconds}, None)

    def close(self) -> None:
        if self.run is not None:
            for path in (self.folder / name for name in ARTEFACTS):
                if path.exists():
                    self.run.save(path)
            self.run.end(self.failed)
            self.run = None


class Mlflow:
    """Uses `ray.air.integrations.mlflow`. Log calls name the run, so they work from any thread."""

    def __init__(self, section: MlflowSection, config: Config):
        from ray.air.integrations.mlflow import setup_mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.mlflow = setup_mlflow(
            parameters(config), tracking_uri=section.tracking_uri, experiment_name=section.experiment,
            run_name=last_name(config.run.dir), create_experiment_if_not_exists=True,
        )  # fmt: skip
        self.id = self.mlflow.active_run().info.run_id

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        metrics = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()}  # MLflow allows no others
        self.mlflow.log_metrics(metrics, step=step, run_id=self.id)

    def save(self, path: Path) -> None:
        self.mlflow.log_artifact(str(path), run_id=self.id)

    def end(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class Wandb:
    """Uses `ray.air.integrations.wandb`. Evaluation results go to the summary, because they have no step."""

    def __init__(self, section: WandbSection, config: Config):
        from ray.air.integrations.wandb import setup_wandb

        if section.mode == "offline":
            os.environ["WANDB_MODE"] = "offline"  # otherwise Ray's integration requires a key
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = {"console": "off", "x_disable_meta": True}  # no terminal output and no command line
        self.run = setup_wandb(
            parameters(config), project=section.project, entity=section.entity, mode=section.mode,
            name=last_name(config.run.dir), dir=str(RunDir.of(config.run).path), settings=settings,
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        if step is None:
            self.run.summary.update(dict(values))
        else:
            self.run.log(dict(values), step=step)

    def save(self, path: Path) -> None:
        self.run.save(str(path), base_path=str(path.parent), policy="now")

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


TrackerClient = Mlflow | Wandb  # a started run of a tracker


def parameters(config: Config) -> dict[str, Any]:
    """The flat configuration of a run, without credentials."""
    values = {key: value for key, value in flatten(config).items() if value is not None}
    return {key: _short(value) for key, value in values.items() if not key.startswith(NO_PARAMETERS)}


def _short(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(public(value))[:MAX_LENGTH]

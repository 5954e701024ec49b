"""The executor that spreads each stage's work over a Ray cluster; it calls the same functions as the one without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from distill_at_scale.cluster import (
    aux_networks,
    ingest,
    monte_carlo,
)
from distill_at_scale.cluster import (
    distill as distillation,
)
from distill_at_scale.cluster import (
    evaluate as evaluation,
)
from distill_at_scale.cluster import (
    score as scoring,
)
from distill_at_scale.cluster.actor_pool import Tell, check_gpus, with_fewer_actors
from distill_at_scale.cluster.pending_resources import watched
from distill_at_scale.cluster.prometheus import PrometheusMetrics
from distill_at_scale.cluster.session import Session
from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.core.atomic_files import resolve_parent
from distill_at_scale.core.events import Emit, discard
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.pipeline.executors.base import Advance, Chunks, Report
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.storage.filesystem import is_uri, last_name


class RayExecutor:
    def __init__(self, config: Config, say: Callable[[str], None], sharing: int = 1):
        """Connects to the cluster that the configuration names; `sharing` executors are at work on it at the same time.

        Raises UserError where there is none, or where it lacks the GPUs that a worker is to have.
        """
        self.session, self.say = Session(config.cluster, say), say
        check_gpus(config.cluster)
        self.sharing = sharing
        self.emit: Emit = discard

    @property
    def tell(self) -> Tell:
        return Tell(self.emit, self.say)

    def observers(self, config: Config) -> list[Observer]:
        return [PrometheusMetrics(last_name(config.run.dir))]

    def ingest(self, config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool = False) -> int:
        with watched("ingest", self.say, advance) as advance:
            return ingest.run(absolute(config), chunks, resolve_parent(pieces), advance, check, self.tell)

    def train_proxies(self, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
        with watched("training of proxies", self.say, advance) as advance:
            scoring.train(absolute(config), resolve_parent(prepared), resolve_parent(checkpoints), advance, self.tell)

    def score(
        self, config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
    ) -> None:
        folders = resolve_parent(prepared), resolve_parent(checkpoints), resolve_parent(pieces)
        with watched("score", self.say, advance) as advance:
            scoring.score(absolute(config), chunks, folders, advance, self.tell)

    def monte_carlo(self, config: Config, prepared: Path, pieces: Path, advance: Advance) -> None:
        with watched("monte_carlo", self.say, advance) as advance:
            monte_carlo.run(absolute(config), resolve_parent(prepared), resolve_parent(pieces), advance, self.emit)

    def make_networks(self, config: Config, places: DistillPaths, names: Sequence[str], advance: Advance) -> None:
        with watched("training of networks", self.say, advance) as advance:
            aux_networks.run(absolute(config), places.located(), names, advance, self.sharing, self.emit)

    def rank_patches(self, config: Config, places: DistillPaths, chunks: Sequence[Chunk], advance: Advance) -> None:
        shared = with_fewer_actors(absolute(config), self.sharing)
        with watched("ranking of patches", self.say, advance) as advance:
            scoring.rank_patches(shared, places.located(), chunks, advance, self.tell)

    def distill(self, config: Config, places: DistillPaths, report: Report) -> None:
        with watched("distill", self.say, report) as report:
            distillation.run(absolute(config), places.located(), report, self.sharing, self.say)

    def evaluate(
        self, config: Config, jobs: Sequence[EvaluationJob], folders: tuple[Path, Path, Path], done: Report
    ) -> None:
        prepared, synthetic, manifest = map(resolve_parent, folders)
        with watched("evaluate", self.say, done) as done:
            evaluation.run(absolute(config), jobs, (prepared, synthetic, manifest), done, self.sharing, self.emit)

    def close(self) -> None:
        self.session.close()


def absolute(config: Config) -> Config:
    """Workers may start in another folder: relative paths of data and weights become absolute."""
    data, score = config.data, config.score
    found = {key: _absolute(value) for key in ("path", "class_names") if (value := getattr(data, key)) is not None}
    files = (_absolute(name) if Path(name).expanduser().is_file() else name for name in score.weight_names)
    weights = list(files) or None
    return config.model_copy(
        update={
            "data": data.model_copy(update=found),
            "score": score.model_copy(update={"weights": weights}),
            "distill": _with_absolute_teachers(config.distill),
        }
    )


def _with_absolute_teachers(section: DistillSection) -> DistillSection:
    found = {}
    for name in ("sre2l", "rded"):
        weights = getattr(section, name).teacher_weights
        if weights is not None and Path(weights).expanduser().is_file():
            found[name] = getattr(section, name).model_copy(update={"teacher_weights": _absolute(weights)})
    return section.model_copy(update=found)


def _absolute(path: str) -> str:
    """Links stay as they are: what a file is called tells what it is."""
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))

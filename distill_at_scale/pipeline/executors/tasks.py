"""The work of a run: what a worker does, in this process or on a Ray cluster, and how the driver hands it out.

Each kind is a `Worker` followed by the function that runs its unfinished units on an executor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import current_workers
from distill_at_scale.core.environment import keep_freed_memory
from distill_at_scale.core.events import measured
from distill_at_scale.core.progress import ProgressNote, noted
from distill_at_scale.data.ingest import chunks as ingest_chunks
from distill_at_scale.data.ingest.plan import IngestPlan, listing_path, map_arrow, open_source
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation import evaluate as evaluation
from distill_at_scale.distillation.checkpoint import checkpoint_step
from distill_at_scale.distillation.dc_subset import dc_distiller
from distill_at_scale.distillation.engine import Distillation, DistillPaths, make_network, method_class
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.executors.base import Advance, Executor, Group, Report, Result, Task, Unit, Worker
from distill_at_scale.pipeline.monitoring.distillation_log import LogTail
from distill_at_scale.pruning.proxies import train as proxies
from distill_at_scale.pruning.scoring import monte_carlo as subsets
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path


class Ingest(Worker):
    """Decodes chunks of a listing; `work` is (first row, number of rows, whether only to list rejected samples)."""

    name, event, stages, uses_torch = "ingest", "decode", (), False

    def load(self) -> None:
        self.source, self.recipe = open_source(self.config.data), ingest_chunks.recipe_of(self.config)

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            start, count, check = unit.work
            rows = map_arrow(unit.inputs[0]).slice(start, count)
            part = unit.outputs[-1]
            used, rejected = ingest_chunks.ingest_chunk(self.source, self.recipe, rows, part, self.spent, check)
            yield {"samples": used, "rejected": rejected}


def ingest(
    executor: Executor, config: Config, plan: IngestPlan, parts: Path, advance: Advance, check: bool = False
) -> None:
    """Decode a plan's chunks into `parts`, next to its listings (`check`: only list rejected samples). Advances by samples.

    Raises UserError if a source of the user's own gives no usable sample.
    """
    if ":" in config.data.source and plan.samples:
        source, recipe = open_source(config.data), ingest_chunks.recipe_of(config)
        ingest_chunks.check_read(source, recipe, plan.listings["train"])
    units = []
    for split, index, rows in plan.chunks(config.data.chunk):
        path = ingest_chunks.part_path(parts, split, index)
        if ingest_chunks.is_finished(path, check):
            advance(sum(ingest_chunks.part_counts(path, rows, check)))
        else:
            work = (index * config.data.chunk, rows.num_rows, check)
            units.append(Unit(work, (ingest_chunks.rejected_path(path), path), (listing_path(parts, split),)))
    executor.run(Task(Ingest, config, {}, units, parts), lambda result: advance(result["samples"] + result["rejected"]))


class TrainProxy(Worker):
    """Trains proxies; `work` is the number of a trial."""

    name, event = "training of proxies", "train a proxy"
    long = resumes = True

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        def report(line: Result) -> None:
            self.poll()

        for unit in units:
            _train_trials(self.config, self.paths, self.device, report, trials=[unit.work])
            yield {"trial": unit.work}


def _train_trials(
    config: Config, paths: Mapping[str, Path], device: torch.device, report: Report, trials: Sequence[int]
) -> None:
    prepared, workers = PreparedDataset(paths["prepared"]), current_workers(device)
    for trial in trials:
        one = proxies.ProxyTrial(prepared, config.score, trial, config.run.seed, paths["checkpoints"], device, workers)
        note = ProgressNote(proxies.note_path(paths["checkpoints"], trial), lambda: report({}))
        one.run(note if workers.rank == 0 else (lambda samples: None), lambda: report({}))
        if workers.rank == 0:
            note.remove()


def train_proxies(executor: Executor, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
    """Train all trials side by side, or on a cluster one by one with `score.workers` workers. Advances by samples of all
    epochs."""
    done, samples = 0, proxies.loader(PreparedDataset(prepared), config.score, config.run.seed).samples

    def poll() -> bool:
        nonlocal done
        before, done = done, max(done, proxies.finished_samples(config.score, checkpoints, samples))
        if done > before:
            advance(done - before)
        return done > before

    poll()
    trials, count = config.score.checkpoint_counts
    missing = [t for t in range(trials) if not proxies.checkpoint_path(checkpoints, t, count - 1).exists()]
    paths = {"prepared": prepared, "checkpoints": checkpoints}
    if not missing:
        return
    if config.score.workers == 1 or config.cluster.address == "none":
        units = [Unit(trial, (proxies.checkpoint_path(checkpoints, trial, 0).parent,)) for trial in missing]
        executor.run(Task(TrainProxy, config, paths, units, checkpoints, trials), lambda result: None, poll)
    else:
        group = Group(
            stage="score",
            body=partial(_train_trials, trials=missing),
            config=config,
            paths=paths,
            workers=config.score.workers,
            work=checkpoints.parent / "train",
            stages=("ingest",),
            fetches=("checkpoints",),
            publishes=("checkpoints",),
            results=(checkpoints,),
            poll=poll,
            saved=lambda: proxies.finished_checkpoints(config.score, checkpoints),
        )
        with measured("train proxies together", executor.emit) as counts:
            counts["workers"] = config.score.workers
            executor.train(group)
    poll()


class Score(Worker):
    """Scores chunks of the prepared data with all checkpoints; `work` is a chunk."""

    name, event, counted, fetches = "score", "score", "samples", ("checkpoints",)

    def load(self) -> None:
        prepared, checkpoints = self.paths["prepared"], self.paths["checkpoints"]
        self.run_chunks = Scorer(self.config, prepared, checkpoints, self.device, self.spent).score

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for samples in self.run_chunks([(unit.work, unit.outputs[0]) for unit in units]):
            yield {"samples": samples}


class RankPatches(Score):
    """Ranks crops of the kept samples of chunks by the teacher's loss; `work` is a chunk."""

    name, event, fetches = "ranking of patches", "rank", ("networks",)

    def load(self) -> None:
        prepared, networks = self.paths["prepared"], self.paths["networks"]
        self.run_chunks = patch_ranking.PatchRanker(self.config, prepared, networks, self.device).rank


def score(
    executor: Executor,
    config: Config,
    prepared: Path,
    checkpoints: Path,
    chunks: Sequence[Chunk],
    parts: Path,
    advance: Advance,
) -> None:
    """Score chunks of the prepared data into `parts`. Advances by samples."""
    paths = {"prepared": prepared, "checkpoints": checkpoints}
    _run_missing(executor, Task(Score, config, paths, _units_of(chunks, parts), parts), advance)


def _units_of(chunks: Sequence[Chunk], parts: Path) -> list[Unit]:
    return [Unit(chunk, (score_part_path(parts, chunk),), size=chunk.rows) for chunk in chunks]


def _run_missing(executor: Executor, task: Task, advance: Advance) -> None:
    """Run the units whose outputs are missing. Advances for the others too."""
    missing = [unit for unit in task.units if not unit.outputs[0].exists()]
    advance(sum(unit.size for unit in task.units) - sum(unit.size for unit in missing))
    executor.run(replace(task, units=missing), lambda result: advance(result[task.worker.counted]))


def rank_patches(
    executor: Executor, config: Config, files: DistillPaths, chunks: Sequence[Chunk], advance: Advance
) -> None:
    """Rank the patches of chunks into part files of `patch_ranking`. Advances by samples."""
    paths = {"prepared": files.prepared, "networks": files.networks}
    units = _units_of(chunks, patch_ranking.parts_folder(files.networks, config))
    _run_missing(executor, Task(RankPatches, config, paths, units, files.networks), advance)


class RunSubsets(Worker):
    """Runs the random subsets of the criterion monte_carlo; `work` is (first subset, number of subsets)."""

    name, event, counted = "monte_carlo", "subsets", "subsets"

    def load(self) -> None:
        prepared = PreparedDataset(self.paths["prepared"])
        distil = dc_distiller(self.config, prepared, self.device)  # DC, where score.monte_carlo.learn asks for it
        self.trials = subsets.SubsetTrials(self.config, prepared.folder, self.device, distil)

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            self.trials.publish(unit.work, unit.outputs[0].parent)
            yield {"subsets": unit.work[1]}


def run_subsets(executor: Executor, config: Config, prepared: Path, parts: Path, advance: Advance) -> None:
    """Run the random subsets of score.monte_carlo into `parts`. Advances by subsets."""
    ranges = subsets.subset_ranges(config.score.monte_carlo)
    units = [Unit(each, (subsets.subset_part_path(parts, each),), size=each[1]) for each in ranges]
    _run_missing(executor, Task(RunSubsets, config, {"prepared": prepared}, units, parts), advance)


class MakeNetwork(Worker):
    """Trains the experts or the teacher of a method; `work` is the name of a network."""

    name, event, stages, fetches = "training of networks", "train a network", ("ingest", "select"), ("manifest",)
    long = resumes = True

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            note = ProgressNote(_note_path(self.paths["networks"], unit.work), self.poll)
            make_network(self.config, DistillPaths(**self.paths), unit.work, self.device, progressed=note)
            note.remove()
            yield {"network": unit.work}


def _note_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.progress"  # hidden files are not stored


def make_networks(
    executor: Executor, config: Config, files: DistillPaths, names: Sequence[str], samples: int, advance: Advance
) -> None:
    """Train the networks that a method needs, side by side. Advances by the samples that they see, `samples` for each one,
    or by networks, where that is 0.
    """
    seen = dict.fromkeys(names, 0)

    def move(name: str, done: int) -> int:
        moved, seen[name] = max(0, done - seen[name]), max(done, seen[name])
        if moved:
            advance(moved)
        return moved

    def poll() -> bool:
        return samples > 0 and sum(move(name, noted(_note_path(files.networks, name))) for name in names) > 0

    def unit(name: str) -> Unit:  # the network, and the files that an interrupted training resumes from
        path = files.networks / name
        return Unit(name, (path, path.with_suffix(".partial"), path.with_name(f"{name}.partial")))

    total = len(method_class(config).networks(config))
    task = Task(MakeNetwork, config, vars(files), [unit(name) for name in names], files.networks, total)
    poll()  # what an interrupted training had seen

    def done(result: Result) -> None:
        move(result["network"], samples or 1)

    executor.run(task, done, poll)


def distill(executor: Executor, config: Config, files: DistillPaths, report: Report) -> None:
    """Run the distillation and leave the set in `files.work / "synthetic"`. Reports the lines of the log."""
    tail = LogTail(files.log, report)

    def resumed() -> str:
        step = checkpoint_step(files.state)
        return f"resuming from step {step}; {max(0, tail.step - step)} steps are repeated"

    executor.train(
        Group(
            stage="distill",
            body=_distill,
            config=config,
            paths=vars(files),
            workers=config.distill.workers,
            work=files.work,
            stages=("ingest", "select"),
            fetches=("manifest", "networks"),
            publishes=("log", "work"),
            results=(files.log, files.state, files.work / "synthetic"),
            poll=tail.read,
            saved=lambda: checkpoint_step(files.state),
            renews=("log", "work"),
            report=report,
            resumed=resumed,
        )
    )


def _distill(config: Config, paths: Mapping[str, Path], device: torch.device, report: Report) -> None:
    """One worker's part of a distillation; rank 0 saves the result."""
    keep_freed_memory()
    files = DistillPaths(**paths)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        synthetic = Distillation(config, files, current_workers(device), device, report).run()
    if synthetic is not None:
        synthetic.save(files.work / "synthetic")


class Evaluate(Worker):
    """Trains fresh networks on a set and tests them; `work` is an evaluation job. A control's set is the unit's input."""

    name, event, stages = "evaluate", "evaluate", ("ingest", "select", "distill")
    long = True

    def load(self) -> None:
        prepared, synthetic, manifest = (self.paths[name] for name in ("prepared", "synthetic", "manifest"))
        self.evaluator = evaluation.Evaluator(self.config, prepared, synthetic, manifest, self.device)

    def run(self, units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            note = ProgressNote(_note_path(self.paths["notes"], str(unit.work)), self.poll)
            row = self.evaluator.run(unit.work, next(iter(unit.inputs), None), note)
            note.remove()
            yield row

    def counts(self, result: Result) -> Result:
        return {"set": result["set"], "network": result["network"], "networks": 1}


def evaluate(
    executor: Executor,
    config: Config,
    jobs: Sequence[EvaluationJob],
    folders: tuple[Path, Path, Path, Path],
    report: Report,
    controls: Mapping[str, Path] | None = None,
    working: Callable[[str], None] = lambda text: None,
) -> None:
    """Run evaluation jobs on (prepared, synthetic, manifest, notes) and report each row; `controls`: name -> folder of its
    set. `working` is told how far the unfinished jobs are.
    """
    paths, controls = dict(zip(("prepared", "synthetic", "manifest", "notes"), folders, strict=True)), controls or {}
    for note in paths["notes"].glob("*.progress"):  # of an interrupted command
        note.unlink()
    told = ""

    def poll() -> bool:
        nonlocal told
        shares = {job: noted(_note_path(paths["notes"], str(job))) for job in jobs}
        text = ", ".join(f"{job} at {share} %" for job, share in shares.items() if share)
        before, told = told, text or told
        if told != before:
            working(told)
        return told != before

    units = [Unit(job, inputs=(controls[job.set],) if job.set in controls else ()) for job in jobs]
    task = Task(Evaluate, config, paths, units, total=len(evaluation.jobs(config, list(controls))))
    executor.run(task, report, poll)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

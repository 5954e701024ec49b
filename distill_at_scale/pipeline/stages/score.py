"""Stage score: train proxies, and score each training sample with all of their checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.models import pretrained
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO, build_criteria
from distill_at_scale.pruning.proxies import train as proxies
from distill_at_scale.pruning.scoring import extra_columns, imported, score_table, scorer
from distill_at_scale.pruning.scoring.scorer import score_part_path
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs


def inputs(config: Config, run: RunDir) -> StageInputs:
    """Leaves out the keys of proxies and of Monte Carlo subsets where there are none."""
    trained = config.score.weights is None and bool(build_criteria(config.score))
    sampled = MONTE_CARLO in config.score.criteria
    unused = {"monte_carlo", *(() if trained else proxies.KEYS)}
    values = {k: v for k, v in result_values(config.score, "score.").items() if k.split(".")[1] not in unused}
    if sampled:
        values |= result_values(config.score.monte_carlo, "score.monte_carlo.")
        values |= result_values(config.distill.dc, "distill.dc.") if config.score.monte_carlo.learn == "dc" else {}
    if trained or sampled:
        values["run.seed"] = config.run.seed
    content = {"ingest": run.content("ingest")}
    try:  # hashes of ready-made checkpoints; where the files are gone, those of the finished stage
        digests = pretrained.digests(config.score.weight_names)
        content |= {f"weights {number}": value for number, value in enumerate(digests.values())}
    except UserError:
        if (record := run.record("score")) is None:
            raise
        content |= {name: value for name, value in record["content"].items() if name.startswith("weights ")}
    return StageInputs(values, content | imported_content(config, run))


def imported_content(config: Config, run: RunDir) -> dict[str, str]:
    """Hashes of imported scores; where the files are gone, those of the finished stage."""
    recorded, content = (run.record("score") or {"content": {}})["content"], {}
    for name, file in config.score.imported.items():
        key = f"imported {name}"
        try:
            content[key] = imported.digest_of(name, file)
        except UserError:
            if key not in recorded:
                raise
            content[key] = recorded[key]
    return content


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    config, run_dir, display = context.config, context.dir, context.display
    data, table = PreparedDataset(run_dir / "prepared"), run_dir / "scores.parquet"
    validate.check_networks(config, data)
    validate.check_weights(config, data)
    for line in validate.check_weights_on_data(config, data):
        display.say(line)
    validate.check_scoring(config, data)
    distill.check_inputs(config, data, data.counts("train"))  # what no selection can repair
    extra_columns.check(config, data)
    outputs = [table, *extra_columns.outputs(config, run_dir)]

    def run_subsets(folder: Path, advance: Callable[[int], None]) -> None:
        tasks.run_subsets(context.executor, config, data.folder, folder, advance)

    if not build_criteria(config.score):
        columns = extra_columns.load(config, run_dir, data, run_subsets, display)
        rows = (data.read(chunk, columns=["sample_id", "label"]) for chunk in data.chunks("train"))
        written = score_table.write_unscored(table, rows, config, columns)
        display.say(f"  {written['rows']} samples; no criterion needs proxies, so none was trained")
        return outputs, {"mean_score": written["mean_score"]}

    work, chunks, began = run_dir.work("score", inputs), data.chunks("train"), time.perf_counter()
    checkpoints, parts = work / "proxies", work / "pieces"
    parts.mkdir(exist_ok=True)
    paths = [score_part_path(parts, chunk) for chunk in chunks]
    if config.score.weights is None and not all(path.exists() for path in paths):
        _train_proxies(context, data, checkpoints)
    trained = time.perf_counter()
    finished = sum(chunk.rows for chunk, path in zip(chunks, paths, strict=True) if path.exists())
    display.say(f"  {scorer.describe(data, config)}")
    executor = context.executor
    with display.meter("score", sum(chunk.rows for chunk in chunks), "samples", finished) as meter:
        tasks.score(executor, config, data.folder, checkpoints, chunks, parts, meter.advance)
    scored = time.perf_counter()
    columns = extra_columns.load(config, run_dir, data, run_subsets, display)
    sample_ids = (data.read(chunk, columns=["sample_id"])["sample_id"].combine_chunks() for chunk in chunks)
    written = score_table.write_scores(table, paths, sample_ids, config, columns)
    for line in imported.remarks(config, table):
        display.say(line)
    if checkpoints.exists():
        if (run_dir / "proxies").exists():
            shutil.rmtree(run_dir / "proxies")  # left by a score stage whose record the user removed
        for trial in range(config.score.trials):
            proxies.note_path(checkpoints, trial).unlink(missing_ok=True)  # of a process that ended early
        os.replace(checkpoints, run_dir / "proxies")
    display.say(f"  mean score {written['mean_score']:.4f} over {written['rows']} samples")
    seconds = {"train_seconds": round(trained - began, 3), "score_seconds": round(scored - trained, 3)}
    return outputs, {**seconds, "mean_score": written["mean_score"]}


def _train_proxies(context: RunContext, data: PreparedDataset, checkpoints: Path) -> None:
    config, score = context.config, context.config.score
    proxies.check_training(data, score, config.run.seed)
    context.display.say(f"  {proxies.describe(data, config)}")
    samples, executor = proxies.loader(data, score, config.run.seed).samples, context.executor
    finished = proxies.finished_samples(score, checkpoints, samples)
    total = score.trials * proxies.trained_samples(score, samples, score.checkpoint_counts[1])
    with context.display.meter("proxies", total, "samples", finished) as meter:
        tasks.train_proxies(executor, config, data.folder, checkpoints, meter.advance)

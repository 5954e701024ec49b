"""The stages together: skipped when done, refused when different, resumed when interrupted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill_at_scale.core import command_line
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.ingest import plan as ingest_plan
from distill_at_scale.data.prepared import manifest
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import evaluate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import no_poll
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.storage.run_dir import RunDir

CORE = ("ingest", "score", "select", "distill", "evaluate")


@pytest.fixture
def copied(digits_run, tmp_path) -> Path:
    """A copy of the finished run, free to be changed."""
    shutil.copytree(digits_run.dir, tmp_path / "run")
    return tmp_path / "run"


def outputs(folder: Path) -> dict[str, bytes]:
    """What the stages published."""
    names = ("prepared", "scores.parquet", "manifest.parquet", "synthetic")
    paths = [
        p
        for name in names
        for p in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
        if p.is_file()
    ]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_a_killed_commands_leftovers_are_swept(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / ".prepared.0a1b.tmp").mkdir(parents=True)
    (tmp_path / "run" / ".prepared.0a1b.tmp" / "half").write_bytes(b"x")
    (tmp_path / "run" / ".scores.parquet.0a1b.tmp").write_bytes(b"x")
    run.stages("ingest")
    assert [p.name for p in (tmp_path / "run").glob(".*.tmp")] == []


def interrupted(*arguments, **keys):
    """Ctrl-C; some shells have their background commands ignore the signal itself."""
    raise KeyboardInterrupt


def test_a_kill_after_the_last_chunk_does_not_train_again(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run").stages("ingest")
    monkeypatch.setattr(RunDir, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.stages("score")
    before = (tmp_path / "run" / "scores.parquet").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "train_proxies", lambda *a, **k: pytest.fail("trained again"))
    make_run(tmp_path / "run").stages("score", "select")
    assert (tmp_path / "run" / "scores.parquet").read_bytes() == before
    assert (tmp_path / "run" / "proxies" / "trial-00" / "epoch-000.safetensors").exists()


def with_weights(make_run, digits_run, folder, place):
    """A run that scores with the checkpoints of another one."""
    place.mkdir(exist_ok=True)
    files = []
    for epoch in range(2):
        files.append(str(place / f"{epoch}.safetensors"))
        shutil.copy(digits_run.dir / "proxies" / "trial-00" / f"epoch-{epoch:03d}.safetensors", files[-1])
    return make_run(folder, score__weights=files)


def test_pretrained_weights_score_like_the_proxies_they_came_from(make_run, digits_run, tmp_path):
    run = with_weights(make_run, digits_run, tmp_path / "run", tmp_path / "weights").stages("ingest", "score", "select")
    assert "proxies" not in run.text
    ours, theirs = (pq.read_table(folder / "scores.parquet") for folder in (run.dir, digits_run.dir))
    scored = np.stack(ours["loss_values"].to_numpy())
    trained = np.stack(theirs["loss_values"].to_numpy())
    assert scored.shape[1] == 2
    assert np.array_equal(scored, trained[:, :2])


def test_a_scored_run_no_longer_needs_its_weights(make_run, digits_run, tmp_path):
    with_weights(make_run, digits_run, tmp_path / "run", tmp_path / "weights").stages("ingest", "score", "select")
    os.rename(tmp_path / "weights", tmp_path / "moved")
    files = [str(tmp_path / "moved" / f"{epoch}.safetensors") for epoch in range(2)]
    moved = make_run(tmp_path / "run", score__weights=files).stages("score", "select")
    assert moved.text.count("already done") == 2
    shutil.rmtree(tmp_path / "moved")
    gone = make_run(tmp_path / "run", score__weights=files).stages("score", "select", "distill")
    assert "distill: finished" in gone.text


def test_a_second_run_does_nothing_and_says_so(make_run, copied):
    before = outputs(copied)
    run = make_run(copied)
    run.pipeline.context.make_executor = lambda: pytest.fail("an executor was started")
    run.stages(*CORE)
    assert outputs(copied) == before
    for stage in CORE:
        assert f"{stage}: already done for this configuration, skipped" in run.text


def test_the_same_configuration_gives_the_same_bytes_elsewhere(make_run, digits_run, tmp_path):
    assert outputs(make_run(tmp_path / "other").stages(*CORE[:4]).dir) == outputs(digits_run.dir)


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ({"data__size": 10}, "ingest"),
        ({"score__lr": 0.02}, "score"),
        ({"select__keep": 0.3}, "select"),
        ({"distill__dc__image_lr": 0.2}, "distill"),
        ({"runtime__rule": "loss"}, "distill"),
        ({"evaluate__epochs": 4}, "evaluate"),
        ({"run__seed": 1}, "ingest"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(make_run, copied, override, stage):
    before, (key, value) = outputs(copied), next(iter(override.items()))
    with pytest.raises(UserError, match=f"holds the output of {stage} for another configuration") as error:
        make_run(copied, **override).stages(*CORE)
    assert key.replace("__", ".") in str(error.value)
    assert str(value) in str(error.value)
    assert outputs(copied) == before


@pytest.mark.parametrize(
    "override",
    [
        {"distill__workers": 2},
        {"distill__checkpoint_every": 7},
        {"distill__evaluate_every": 2},
        {"distill__dm__image_lr": 5.0},
        {"runtime__drop": 0.9},
        {"cluster__max_failures": 9},
    ],
)
def test_what_does_not_change_the_result_does_not_change_the_fingerprint(make_run, copied, override):
    run = make_run(copied, **override).stages(*CORE)
    assert run.text.count("skipped") == len(CORE)


def test_a_moved_run_is_still_valid(make_run, copied, tmp_path):
    copied.rename(tmp_path / "moved")
    assert make_run(tmp_path / "moved").stages(*CORE).text.count("skipped") == len(CORE)


def test_default_and_explicit_steps_are_the_same(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(distill.METHODS["dc"], "default_steps", 3)
    run = make_run(tmp_path / "run", distill__steps=None).stages(*CORE[:4])
    assert make_run(run.dir, distill__steps=3).stages(*CORE[:4]).text.count("skipped") == 4


def test_a_damaged_output_is_an_error(make_run, copied):
    (copied / "scores.parquet").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"scores\.parquet is not what was written"):
        make_run(copied).stages("score")


def test_a_damaged_input_is_an_error(make_run, copied):
    """A manifest other than the recorded one is refused, also where only `distill` runs."""
    (copied / "stages" / "distill.json").unlink()
    table, facts = manifest.read(copied / "manifest.parquet")
    manifest.write(copied / "manifest.parquet", table.slice(0, table.num_rows - 1), facts)
    with pytest.raises(UserError, match=r"manifest\.parquet"):
        make_run(copied).stages("distill")


@pytest.mark.parametrize("content", [None, "{}"])
def test_damaged_prepared_data_names_the_command_that_mends_it(make_run, copied, content):
    (copied / "prepared" / "dataset.json").unlink()
    if content is not None:
        (copied / "prepared" / "dataset.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset\.json is (missing|not what was written)[^\n]*\n.*run\.redo=ingest"):
        make_run(copied).stages("score")


def test_a_stage_before_its_input_says_what_to_run(make_run, tmp_path):
    with pytest.raises(UserError, match="distill-at-scale ingest CONFIG"):
        make_run(tmp_path / "run").stages("score")


def test_a_changed_input_is_a_different_input(make_run, copied):
    """A new selection in the same folder: the old synthetic set does not pass for its result."""
    (copied / "stages" / "select.json").unlink()
    with pytest.raises(UserError, match="holds the output of distill for another configuration") as error:
        make_run(copied, select__keep=0.5).stages("select", "distill")
    assert "select:" in str(error.value)


def test_scores_are_shared_by_runs(make_run, digits_run, tmp_path):
    run = make_run(tmp_path / "second", run__reuse=str(digits_run.dir), select__keep=0.5)
    started = []
    run.pipeline.context.make_executor = lambda: started.append(1) or LocalExecutor()
    run.stages("ingest", "score", "select")
    assert not started
    assert (run.dir / "scores.parquet").read_bytes() == (digits_run.dir / "scores.parquet").read_bytes()
    assert run.pipeline.dir.record("select")["kept"] == sum(
        int(0.5 * n + 0.5) for n in np.bincount(pq.read_table(run.dir / "manifest.parquet")["label"])
    )
    assert run.stages("distill").dir.joinpath("synthetic/card.json").exists()


def test_a_stage_command_takes_earlier_stages_over(make_run, digits_run, tmp_path):
    run = make_run(tmp_path / "second", run__reuse=str(digits_run.dir), evaluate__epochs=2).stages("evaluate")
    lines = [f"{stage}: taken over from {digits_run.dir}" for stage in ("ingest", "score", "select", "distill")]
    assert [line for line in run.text.splitlines() if "taken over" in line][:4] == lines
    assert f"evaluate: not taken over from {digits_run.dir}: another configuration: evaluate.epochs: 3 -> 2" in run.text
    assert (run.dir / "evaluation.json").exists()


def test_a_stage_that_cannot_be_taken_over_is_explained(make_run, digits_run, tmp_path):
    run = make_run(tmp_path / "second", run__reuse=str(digits_run.dir), score__lr=0.5)
    with pytest.raises(UserError, match="no output of select yet; run this first:\n  distill-at-scale score CONFIG"):
        run.stages("distill")
    assert f"ingest: taken over from {digits_run.dir}" in run.text
    assert f"score: not taken over from {digits_run.dir}: another configuration: score.lr: 0.01 -> 0.5" in run.text


def test_a_source_that_is_gone_does_not_prevent_taking_over(make_run, tmp_path, monkeypatch):
    first = make_run(tmp_path / "first").stages("ingest")

    def unreachable(config):
        raise Unreachable("the bucket is gone")

    monkeypatch.setattr(ingest_plan, "plan", unreachable)
    run = make_run(tmp_path / "second", run__reuse=str(first.dir)).stages("ingest")
    assert f"ingest: taken over from {first.dir}" in run.text


def test_the_command_for_another_configuration_keeps_what_can_be_kept(make_run, copied):
    with command_line.remembered("run"):
        command_line.configured_by("digits.yaml", ["select.keep=0.5", f"run.dir={copied}"])
        with pytest.raises(UserError) as error:
            make_run(copied, select__keep=0.5).stages(*CORE)
    text, new = str(error.value), f"{copied}-2"
    assert "reuses ingest, score and computes select, distill, evaluate:" in text
    assert f"\n  distill-at-scale run digits.yaml select.keep=0.5 run.dir={new} run.reuse={copied}\n" in text
    run = make_run(new, select__keep=0.5, run__reuse=str(copied)).stages(*CORE)
    assert run.text.count("taken over from") - run.text.count("not taken over from") == 2


def test_redo_moves_another_configuration_aside_and_nothing_else(make_run, copied):
    before = (copied / "manifest.parquet").read_bytes()
    run = make_run(copied, select__keep=0.5, run__redo="select").stages(*CORE)
    assert run.text.count("skipped") == 2
    (old,) = copied.glob("replaced/select-*")
    assert (old / "manifest.parquet").read_bytes() == before != (copied / "manifest.parquet").read_bytes()
    assert sorted(path.name.partition("-")[0] for path in copied.glob("replaced/*")) == [
        "distill",
        "evaluate",
        "select",
    ]
    again = make_run(copied, select__keep=0.5, run__redo="select").stages(*CORE)
    assert again.text.count("skipped") == len(CORE)


@pytest.mark.parametrize("damage", ["record", "output", "missing"])
def test_redo_computes_a_damaged_stage_again(make_run, copied, damage):
    before, path = outputs(copied), copied / ("stages/score.json" if damage == "record" else "scores.parquet")
    path.unlink() if damage == "missing" else path.write_bytes(b"{")
    with pytest.raises(UserError, match=r"run\.redo=score"):
        make_run(copied).stages(*CORE)
    run = make_run(copied, run__redo="score").stages(*CORE)
    assert outputs(copied) == before
    assert run.text.count("skipped") == len(CORE) - 1


def test_a_run_to_reuse_that_does_not_exist_is_an_error(make_run, tmp_path):
    with pytest.raises(UserError, match=r"run\.reuse"):
        make_run(tmp_path / "run", run__reuse=str(tmp_path / "typo")).stages("ingest")


def test_a_folder_in_use_is_refused(make_run, copied):
    run = make_run(copied)
    with run.pipeline.dir.lock(), pytest.raises(UserError, match="another command"):
        make_run(copied).stages("ingest")


class Stopping(LocalExecutor):
    """An executor that ends the process in the middle of a stage."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage, self.left = stage, 2

    def _advance(self, stage, advance):
        def counted(*arguments):
            result = advance(*arguments)
            self.left -= stage == self.stage
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        return counted

    def run(self, task, done, poll=no_poll):
        name = task.worker.name
        super().run(task, self._advance(name, done), self._advance("proxies", poll) if task.worker.resumes else poll)

    def train(self, group):
        super().train(replace(group, report=self._advance(group.stage, group.report)))


@pytest.mark.parametrize("stage", ["ingest", "proxies", "score", "distill", "evaluate"])
def test_an_interrupted_stage_ends_with_the_same_bytes(make_run, digits_run, tmp_path, stage):
    first = make_run(tmp_path / "run")
    first.pipeline.context.make_executor = lambda: Stopping(stage)
    with pytest.raises(KeyboardInterrupt):
        first.stages(*CORE)
    second = make_run(tmp_path / "run").stages(*CORE)
    assert outputs(second.dir) == outputs(digits_run.dir)
    rows = [
        [
            {k: r[k] for k in r if k != "seconds"}
            for r in json.loads((d / "evaluation.json").read_text(encoding="utf-8"))["rows"]
        ]
        for d in (second.dir, digits_run.dir)
    ]
    assert rows[0] == rows[1]


def test_finished_rows_of_an_evaluation_are_not_recomputed(make_run, digits_run, tmp_path, monkeypatch):
    shutil.copytree(digits_run.dir, tmp_path / "run")
    (tmp_path / "run" / "stages" / "evaluate.json").unlink()
    first = make_run(tmp_path / "run")
    first.pipeline.context.make_executor = lambda: Stopping("evaluate")
    with pytest.raises(KeyboardInterrupt):
        first.stages("evaluate")
    rows = next((tmp_path / "run" / ".work").rglob("rows.jsonl"))
    rows.write_text(rows.read_text(encoding="utf-8") + '{"set": "distil', encoding="utf-8")  # a line that was cut short
    trained, run_job = [], evaluate.Evaluator.run
    monkeypatch.setattr(
        evaluate.Evaluator, "run", lambda self, job, *rest: trained.append(job) or run_job(self, job, *rest)
    )
    again = make_run(tmp_path / "run").stages("evaluate")
    assert trained == evaluate.jobs(first.config)[2:]
    assert again.text.count(f"a damaged line was removed from {rows}; what is lost is computed again") == 1


def test_a_set_too_small_for_the_images_is_refused_at_the_selection(make_run, digits_run, tmp_path):
    run = make_run(tmp_path / "run", run__reuse=str(digits_run.dir), distill__ipc=500, distill__method="dm")
    with pytest.raises(UserError, match=r"fewer than distill\.ipc = 500"):
        run.stages("ingest", "score", "select")
    assert not (tmp_path / "run" / "manifest.parquet").exists()


def test_what_was_ingested_serves_after_the_source_is_gone(make_run, tmp_path):
    for name in [f"train/{c}/{k}.png" for c in "ab" for k in range(4)]:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    keys = {"data__source": "imagefolder", "data__path": str(tmp_path / "data"), "data__classes": None}
    run = make_run(tmp_path / "run", **keys).stages("ingest")
    shutil.rmtree(tmp_path / "data")
    again = make_run(tmp_path / "run", **keys).stages("ingest", "score")
    assert "using what was ingested before" in again.text
    with pytest.raises(UserError, match="no such folder"):
        make_run(tmp_path / "new", **keys).stages("ingest")
    assert run.dir.exists()

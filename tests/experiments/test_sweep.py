"""Sweeps without Ray: trials, errors before the start, shared outputs, and the table."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sweep_cases import RATES, config

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.distillation.methods.dc import DC
from distill_at_scale.experiments import points
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.points import Failure
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import run, space, table
from distill_at_scale.experiments.sweep import validate as checks
from distill_at_scale.experiments.sweep.space import SweepTrial
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.storage.run_dir import RunDir


def sweep(settings: Config):
    log = io.StringIO()
    swept_table = run.run(settings, Display(Console(file=log, width=200)), LocalRunner)
    return swept_table, log.getvalue()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"space": {}}, "sweep.space is empty"),
        ({"space": {"select.kep": [0.1]}}, "unknown key select.kep .*did you mean select.keep"),
        ({"space": {"select.keep": [0.1, 2.0]}}, "select.keep.* = 2.0 .*not allowed"),
        ({"space": {"select.keep": []}}, "select.keep .*has no values"),
        ({"space": {"select.keep": 0.1}}, r"select.keep = 0.1 .*write \[0.1\]"),
        ({"space": {"select.keep": {"uniform": [0.1, 0.2]}}}, "sweep.search = grid needs lists"),
        ({"space": {"select.keep": {"uniform": [0.2, 0.1]}}, "search": "random"}, "is no range"),
        ({"space": {"distill.ipc": {"randint": [0.5, 3]}}, "search": "random"}, "is no range"),
        ({"space": {"select.keep": {"loguniform": [0, 0.1]}}, "search": "random"}, "must begin above 0"),
        ({"space": {"select.keep": {"uniform": [0.5, 1.5]}}, "search": "random"}, "select.keep.* = 1.5 .*not allowed"),
        ({"space": {"run.dir": ["a"]}}, "run.dir .*cannot be swept"),
        ({"space": {"cluster.actors": [1, 2]}}, "cluster.actors .*cannot be swept"),
        ({"space": {"distill.hold": ["host", "device"]}}, "distill.hold .*results do not depend on it"),
        ({"space": {"score.workers": [1, 2]}}, "score.workers .*results do not depend on it"),
        ({"space": {"sweep.seeds": [1, 2]}}, "sweep.seeds .*cannot be swept"),
        ({"space": {"studies.seeds": [2, 3]}}, "studies.seeds .*cannot be swept"),
        ({"space": {"distill.workers": [1, 2]}}, "distill.workers .*results do not depend"),
        ({"space": {"distill.method": ["dc", "dq"]}}, "distill.method = 'dq' is unknown"),
        ({"search": "asha"}, "asha needs Ray"),
        ({"concurrent": 2}, "sweep.concurrent = 2 needs Ray"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(tmp_path, wanted, message):
    with pytest.raises(UserError, match=message):
        sweep(config(tmp_path / "run", **wanted))
    assert not (tmp_path / "run").exists()


def test_a_combination_that_is_not_allowed_is_named():
    wanted = {"select.order": ["stratum"], "select.stratum_start": [0.2, 0.8], "select.keep": [0.5]}
    with pytest.raises(UserError, match=r"select.stratum_start=0.8.*must end at or before 1"):
        space.trials(config(space=wanted))


@pytest.mark.parametrize("wanted", [{"space": {"select.keep": ["auto", 0.1]}},
                                    {"space": {"distill.ipc": [1]}, "select__keep": "auto"}])  # fmt: skip
def test_a_rate_that_is_looked_for_cannot_be_swept(tmp_path, wanted):
    with pytest.raises(UserError, match=r"select.keep = auto cannot be swept.*list them"):
        sweep(config(tmp_path / "run", **wanted))
    assert not (tmp_path / "run").exists()


def test_data_elsewhere_are_other_data():
    where = points.PointSet(config(data__path="here"), LocalRunner(), Display.silent())
    base, same, other = (
        where.configured(Point({"data.path": path} if path else {})).run.dir for path in (None, "here", "there")
    )
    assert base == same != other


def test_asha_needs_evaluations_before_the_end():
    on_ray = {"cluster__address": None, "search": "asha"}
    with pytest.raises(UserError, match=r"set distill.evaluate_every"):
        checks.check_search(config(**on_ray))
    with pytest.raises(UserError, match=r"sweep.grace = 2.*only 1 times"):
        checks.check_asha(config(**on_ray, grace=2, distill__evaluate_every=2))


def test_a_trial_that_keeps_too_little_is_refused_after_ingest_and_before_scoring(tmp_path):
    real = {"distill__ipc": 2, "distill__dc": {"init": "real"}, "select__min_per_class": 0}
    with pytest.raises(UserError, match=r"the trial select.per_class=1: .*"):
        sweep(config(tmp_path / "run", space={"select.per_class": [3, 1]}, controls=[], **real))  # fmt: skip
    assert not list((tmp_path / "run").rglob("scores.parquet"))
    assert not (tmp_path / "run" / "points").exists()


def test_a_trial_that_empties_a_class_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the trial select.keep=0.001: .*keeps no sample of the class"):
        sweep(config(tmp_path / "run", space={"select.keep": [0.001]}, controls=[], select__min_per_class=0))


def test_without_a_test_split_nothing_starts(tmp_path):
    with pytest.raises(UserError, match=r"test split"):
        sweep(config(tmp_path / "run", data__holdout=None))
    assert not list((tmp_path / "run").rglob("scores.parquet"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of two keep rates and two numbers of score epochs, and how many proxies it trained."""
    folder, trained = tmp_path_factory.mktemp("sweep") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        original = proxy.ProxyTrial.run
        patch.setattr(proxy.ProxyTrial, "run", lambda self, *told: (trained.append(self), original(self, *told))[1])
        settings = config(folder, space={**RATES, "distill.ipc": [1, 2]}, seeds=1)
        swept_table, log = sweep(settings)
    return settings, swept_table, log, len(trained)


def test_ingest_and_scores_are_computed_once_and_shared_by_all_trials(swept):
    settings, swept_table, _, trained = swept
    root = Path(settings.run.dir)
    assert trained == settings.score.trials
    assert len(list((root / "shared").glob("data-*"))) == len(list((root / "shared").glob("scores-*"))) == 1
    folders = list((root / "points").iterdir())
    assert len(folders) == len(set(swept_table["trial"].to_pylist())) == 2 + 4 + 4
    for folder in folders:
        assert (folder / "prepared").is_symlink()
        assert (folder / "scores.parquet").is_symlink()
        for stage in ("ingest", "score"):
            assert (
                "shared" in json.loads((folder / "stages" / f"{stage}.json").read_text(encoding="utf-8"))["reused_from"]
            )


def test_the_table_has_every_trial_its_controls_and_what_they_took(swept):
    settings, swept_table, _, _ = swept
    assert pq.read_table(Path(settings.run.dir) / "sweep.parquet").equals(swept_table)
    rows = swept_table.to_pylist()
    kinds = {(row["control"], row["set"]) for row in rows}
    assert kinds == {
        (None, "distilled"),
        ("random", "distilled"),
        ("unpruned", "distilled"),
        ("unpruned", "random_real"),
    }
    for row in rows:
        assert 0 <= row["mean"] <= 1
        assert row["n"] == settings.evaluate.seeds
        assert row["seconds"] == pytest.approx(row["select_seconds"] + row["distill_seconds"] + row["evaluate_seconds"])
        assert row["shared_seconds"] > 0
        assert 0 < row["start_seconds"] < row["distill_seconds"]
        assert row["error"] is row["stopped"] is None
    assert {row["kept"] for row in rows if row["control"] == "unpruned"} == {rows[0]["of"]}
    assert {row["distill.ipc"] for row in rows} == {1, 2}


def test_given_again_nothing_is_tried_again(swept, monkeypatch):
    settings, swept_table, _, _ = swept
    monkeypatch.setattr(points, "run_point", lambda *arguments: pytest.fail("a finished trial was started again"))
    again, log = sweep(settings)
    assert again.equals(swept_table)
    assert "10 of them finished before" in log


def test_a_longer_space_tries_only_what_is_new(swept, monkeypatch):
    settings, _, _, _ = swept
    tried_now, original = [], points.run_point
    monkeypatch.setattr(points, "run_point", lambda c, *more: (tried_now.append(c.select.keep), original(c, *more)))
    wider = config(settings.run.dir, space={"select.keep": [0.1, 0.3, 0.5], "distill.ipc": [1]}, controls=["unpruned"])
    sweep(wider)
    assert tried_now == [0.5]


def test_trials_of_outdated_scores_run_again(tmp_path):
    path, random = tmp_path / "scores.npy", np.random.default_rng(0)
    np.save(path, random.random(1797))
    wanted = {"score__imported": {"ours": str(path)}, "select__criterion": "ours"}
    settings = config(tmp_path / "run", space={"select.keep": [0.1]}, controls=[], **wanted)
    sweep(settings)
    (manifest,) = (tmp_path / "run").rglob("points/*/manifest.parquet")
    before = pq.read_table(manifest)
    np.save(path, random.random(1797))
    with pytest.raises(UserError, match=r"output of score for another configuration"):
        sweep(settings)
    (record,) = (tmp_path / "run").glob("shared/scores-*/stages/score.json")
    record.unlink()  # as the message says
    sweep(settings)
    assert not pq.read_table(manifest).equals(before)


def test_two_commands_in_one_folder_are_refused(swept):
    settings, _, _, _ = swept
    with run.RunDir(settings.run.dir).lock(), pytest.raises(UserError, match="another command is working"):
        sweep(settings)


def test_a_diverged_trial_is_listed_and_the_others_continue(tmp_path, monkeypatch):
    original = DC.step

    def step(self, i):
        if self.context.config.distill.ipc == 2:
            raise DistillationDiverged("the loss of step 0 is not finite")
        return original(self, i)

    monkeypatch.setattr(DC, "step", step)
    settings = config(tmp_path / "run", space={"distill.ipc": [2, 1]}, controls=[])
    swept_table, log = sweep(settings)
    rows = {row["distill.ipc"]: row for row in swept_table.to_pylist()}
    assert rows[2]["mean"] is None
    assert "not finite" in rows[2]["error"]
    assert rows[1]["mean"] is not None
    assert "1 of 2 trials failed" in log
    monkeypatch.setattr(DC, "step", original)
    swept_table, _ = sweep(settings)
    assert swept_table["error"].null_count == 2, "the failed trial was not tried again"
    assert not list(tmp_path.rglob(points.FAILED))


def test_a_trial_that_the_disk_ended_ends_the_command_and_is_tried_again_by_the_same_one(tmp_path, monkeypatch):
    original = DC.step
    full = OSError(errno.ENOSPC, "No space left on device", "/data/run/metrics.jsonl")

    def step(self, i):
        if self.context.config.distill.ipc == 2:
            raise full
        return original(self, i)

    monkeypatch.setattr(DC, "step", step)
    settings = config(tmp_path / "run", space={"distill.ipc": [2, 1]}, controls=[])
    with pytest.raises(
        UserError, match=r"1 of 2 trials could not .* No space left on device: .*metrics.jsonl.* same command"
    ):
        sweep(settings)
    assert (tmp_path / "run" / "sweep.html").exists()
    rows = {row["distill.ipc"]: row for row in pq.read_table(tmp_path / "run" / "sweep.parquet").to_pylist()}
    assert rows[1]["mean"] is not None, "the other trial was not tried"
    monkeypatch.setattr(DC, "step", original)
    swept_table, log = sweep(settings)
    assert "2 trials, 1 of them finished before" in log
    assert swept_table["error"].null_count == 2


def test_a_trial_whose_result_could_not_be_stored_is_remembered(tmp_path, monkeypatch):
    """As where a trial's process is lost while the disk is full: nothing of its end is in its folder."""

    class Losing(LocalRunner):
        def run(self, tasks, body, done):
            done(0, None, UserError("its process was lost"))
            super().run(tasks[1:], body, lambda index, last, error: done(index + 1, last, error))

    monkeypatch.setattr(points, "write_failure", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    settings, log = config(tmp_path / "run", space={"distill.ipc": [2, 1]}, controls=[]), io.StringIO()
    with pytest.raises(UserError, match="1 of 2 trials could not be carried out here"):
        run.run(settings, Display(Console(file=log, width=200)), Losing)
    assert "distill.ipc=2" in log.getvalue(), "the table is not shown where a trial was lost"
    rows = {row["distill.ipc"]: row for row in pq.read_table(tmp_path / "run" / "sweep.parquet").to_pylist()}
    assert rows[2]["error"] == "its process was lost"
    assert rows[1]["mean"] is not None


def test_where_every_trial_fails_the_command_fails(tmp_path, monkeypatch):
    def step(self, i):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(DC, "step", step)
    with pytest.raises(UserError, match=r"none of the 1 trials succeeded.*RuntimeError: out of luck"):
        sweep(config(tmp_path / "run", space={"distill.ipc": [1]}, controls=[]))


def outcome(keep: float, seed: int, top1: float, stopped: int | None = None) -> tuple[SweepTrial, Outcome]:
    trial = SweepTrial(Point({"select.keep": keep}, seed), {"select.keep": keep, "distill.method": "dc"})
    rows = [{"set": "distilled", "network": "convnet", "seed": 0, "top1": top1}]
    return trial, Outcome(trial.point, rows, 3, 30, [3], {"select": 1.0, "distill": 2.0}, Path("x"), stopped)


def test_stopped_and_failed_trials_are_rows_of_the_table():
    failed = SweepTrial(Point({}, 0), {"select.keep": 0.9, "distill.method": "dc"})
    made_table = table.make(
        [outcome(0.1, 0, 0.5, stopped=4), (failed, Failure("it broke", False))], ["a", "b"], ["select.keep"]
    )
    first, second = made_table.to_pylist()
    assert (first["stopped"], first["mean"], first["std"], first["n"]) == (4, 0.5, None, 1)
    assert (second["error"], second["mean"], second["trial"]) == ("it broke", None, "b")


def test_columns_of_swept_keys_are_numbers_or_text():
    values = [{"a": 1, "b": 0.5, "c": {"loss": 0.7}, "d": 2}, {"a": 2, "b": 1, "c": "random", "d": None}]
    trials = [(SweepTrial(Point(), keys), Failure("failed", False)) for keys in values]
    made_table = table.make(trials, ["a", "b"], list("abcd"))
    assert made_table["a"].to_pylist() == [1, 2]
    assert made_table["b"].to_pylist() == [0.5, 1.0]
    assert made_table["c"].to_pylist() == ['{"loss": 0.7}', "random"]
    assert made_table["d"].to_pylist() == [2, None]


def test_repetitions_are_one_line_at_the_end():
    trials = [outcome(0.1, 0, 0.4), outcome(0.1, 1, 0.6), outcome(0.3, 0, 0.7)]
    made_table = table.make(trials, ["0", "1", "2"], ["select.keep"])
    lines = table.pooled_rows(made_table)
    assert [(line["configuration"], line["accuracy"], line["n"]) for line in lines] == [
        ("select.keep=0.1", "50.0 ± 14.1", "2"),
        ("select.keep=0.3", "70.0", "1"),
    ]
    assert lines[0]["seconds"] == "6.0"


def test_a_point_that_was_stopped_is_known_only_where_a_scheduler_asks(digits_run, tmp_path):
    folder = tmp_path / "point"
    for name in ("stages/select.json", "stages/score.json", "stages/ingest.json", "manifest.parquet"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((digits_run.dir / name).read_bytes())
    assert points.read_stopped(Point(), RunDir(folder), "convnet") is None
    points.write_stop(RunDir(folder), {"step": 4, "top1": 0.25})
    stopped = points.read_stopped(Point(), RunDir(folder), "convnet")
    assert (stopped.stopped, stopped.accuracy()) == (4, 0.25)
    assert points.read_outcome(Point(), RunDir(folder)) is None

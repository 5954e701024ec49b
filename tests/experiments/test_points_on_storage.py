"""Sweeps, studies and select: auto on object storage: shared outputs are stored once."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Run, tiny_config
from rich.console import Console
from storage_cases import stored_objects

import distill_at_scale as das
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments import auto_select, points
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import run
from distill_at_scale.storage.filesystem import child_address
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import FolderSync, scratch_of

pytestmark = pytest.mark.usefixtures("no_pauses")

RATES = {"select.keep": [0.1, 0.3]}


@pytest.fixture
def remote(s3, bucket, tmp_path):
    """remote("a"): a configuration with a run folder on object storage, from machine "a"."""

    def make(machine="a", **overrides):
        own = {"run__scratch": str(tmp_path / machine), "run__retry_seconds": 0.0, "runtime__rule": "none"}
        return tiny_config(s3(f"{bucket}/run"), **own, **overrides)

    return make


def sweep(config):
    log = io.StringIO()
    table = run.run(config, Display(Console(file=log, width=300)), LocalRunner)
    return table, log.getvalue()


def prepared(config):
    points = PointSet(config, LocalRunner(), Display.silent())
    return points.prepare(points.configured(Point()))


def results(table):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("address", "name", "expected"),
    [
        ("s3://bucket/run", "points/1", "s3://bucket/run/points/1"),
        ("s3://bucket/run/?region=x&scheme=http", "points/1", "s3://bucket/run/points/1?region=x&scheme=http"),
        ("s3://bucket/run/points/1?region=x", "../../shared/data-2", "s3://bucket/run/shared/data-2?region=x"),
        ("s3://key:secret@bucket/run", "..", "s3://key:secret@bucket"),
        ("/data/what?/run", "points/1", "/data/what?/run/points/1"),
    ],
)
def test_an_address_inside_a_folder_keeps_its_options(address, name, expected):
    assert child_address(address, name) == expected


@pytest.mark.slow
def test_a_sweep_on_object_storage_has_the_table_of_one_on_a_disk(remote, s3, bucket, tmp_path):
    config = remote(sweep={"space": RATES})
    table, log = sweep(config)
    on_disk, _ = sweep(tiny_config(tmp_path / "disk", sweep={"space": RATES}, runtime__rule="none"))
    assert results(table) == results(on_disk)
    assert f"page: s3://{bucket}/run/sweep.html" in log
    there = stored_objects(s3, bucket)
    assert {"sweep.parquet", "sweep.html"} <= set(there)
    assert len([name for name in there if name.endswith("scores.parquet")]) == 1, "scores lie there more than once"
    assert {name.split("/")[1].split("-")[0] for name in there if "/prepared/" in name} == {"data"}
    assert not [name for name in there if ".work" in name]


def test_another_machine_continues_unfinished_work(remote, s3, bucket, monkeypatch):
    real, tried = points.run_point, []

    def killed(config, *rest):
        tried.append(config.run.dir)
        if len(tried) == 2:
            raise KeyboardInterrupt
        real(config, *rest)

    monkeypatch.setattr(points, "run_point", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(remote("a", sweep={"space": RATES, "controls": []}))
    table, log = sweep(remote("b", sweep={"space": RATES, "controls": []}))
    assert "2 trials, 1 of them finished before" in log
    assert tried[2:] == tried[1:2]
    assert table["error"].null_count == 2
    tried.clear()
    again, _ = sweep(remote("c", sweep={"space": RATES, "controls": []}))
    assert not tried
    assert results(again) == results(table)


def test_a_trial_that_failed_is_noted_there_and_no_more_after_it_succeeded(remote, s3, bucket, monkeypatch):
    real, settings = points.run_point, {"sweep": {"space": RATES, "controls": []}}

    def failing(config, *rest):
        if config.select.keep == 0.1:
            raise OSError(28, "No space left on device", "/scratch/x")
        real(config, *rest)

    monkeypatch.setattr(points, "run_point", failing)
    with pytest.raises(UserError, match=r"1 of 2 trials could not .*No space left on device"):
        sweep(remote("a", **settings))
    noted = [
        json.loads(content) for name, content in stored_objects(s3, bucket).items() if name.endswith(points.FAILED)
    ]
    assert [note["passing"] for note in noted] == [True]
    monkeypatch.setattr(points, "run_point", real)
    table, _ = sweep(remote("b", **settings))
    assert table["error"].null_count == 2
    assert not [name for name in stored_objects(s3, bucket) if name.endswith(points.FAILED)]


def test_points_on_one_machine_share_one_copy(remote):
    point_set = PointSet(remote(), LocalRunner(), Display.silent())
    first, second = point_set.run([Point({"select.keep": keep}) for keep in (0.2, 0.5)])
    assert (first.folder / "prepared").resolve() == (second.folder / "prepared").resolve()
    assert first.folder.parent == second.folder.parent
    again = PointSet(remote("b"), LocalRunner(), Display.silent()).run([Point({"select.keep": 0.2})])[0]
    assert (again.kept, again.rows) == (first.kept, first.rows)


def test_points_use_recomputed_inputs(remote, s3, bucket, tmp_path):
    """On machine a with old points and new scores, and on b and c with old or empty copies."""
    path, random = tmp_path / "scores.npy", np.random.default_rng(0)
    wanted = {"score__imported": {"ours": str(path)}, "select__criterion": "ours"}

    def run_on(machine):
        return PointSet(remote(machine, **wanted), LocalRunner(), Display.silent()).run([Point({"select.keep": 0.1})])[
            0
        ]

    np.save(path, random.random(1797))
    before = pq.read_table(run_on("a").folder / "manifest.parquet")
    run_on("b")
    np.save(path, random.random(1797))
    with pytest.raises(UserError, match=r"output of score for another configuration"):
        PointSet(remote("a", **wanted), LocalRunner(), Display.silent()).shared({})
    record = next(
        name
        for name in stored_objects(s3, bucket)
        if name.startswith("shared/scores-") and name.endswith("/score.json")
    )
    s3.client.delete_object(Bucket=bucket, Key=f"run/{record}")  # as the message says
    PointSet(remote("a", **wanted), LocalRunner(), Display.silent()).shared({})
    for machine in "abc":
        PointSet(remote(machine, **wanted), LocalRunner(), Display.silent()).shared({})
        after = pq.read_table(run_on(machine).folder / "manifest.parquet")
        assert not after.equals(before), machine


def test_a_note_that_was_removed_elsewhere_does_not_come_back(remote, s3, bucket):
    stood = prepared(remote())
    points.write_stop(stood, {"step": 4, "top1": 0.5})
    other = prepared(remote("b"))
    assert (other / points.STOPPED).exists()
    other.drop(points.STOPPED)
    stood.fetch()
    with stood.lock():
        pass
    assert not (stood / points.STOPPED).exists()
    assert not [name for name in stored_objects(s3, bucket) if name.endswith(points.STOPPED)]


def test_a_sweep_copied_to_a_disk_resumes_there(remote, s3, bucket, tmp_path):
    settings = {"sweep": {"space": {"select.keep": [0.1]}, "controls": []}}
    table, _ = sweep(remote(**settings))
    for name, content in stored_objects(s3, bucket).items():
        (tmp_path / "disk" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / name).write_bytes(content)
    wider = {"sweep": {"space": RATES, "controls": []}, "runtime__rule": "none"}
    again, log = sweep(tiny_config(tmp_path / "disk", **wider))
    assert "2 trials, 1 of them finished before" in log
    assert results(again)[0] == results(table)[0]
    assert again["error"].null_count == 2


def test_a_trial_changes_nothing_in_a_folder_that_another_command_locks(remote, s3, bucket, monkeypatch):
    monkeypatch.setattr(points, "PATIENCE", 0)
    settings = remote(sweep={"space": RATES, "controls": []})
    held = RunDir.of(next(iter(run.plan(settings))).config.run)
    held.create()
    with held.lock():
        with pytest.raises(UserError, match=r"1 of 2 trials could not .*is working in"):
            sweep(settings)
        inside_it = [name for name in stored_objects(s3, bucket) if name.startswith(f"points/{held.named[-16:]}/")]
        assert {name.split("/")[2] for name in inside_it} <= {"stages", ".run", ".lease.json", points.FAILED}
    table, _ = sweep(settings)
    assert table["error"].null_count == 2


def test_a_storage_that_refuses_one_trial_leaves_the_others(remote, s3, bucket, monkeypatch):
    settings, real = remote(sweep={"space": RATES, "controls": []}), RunDir.drop
    first = run.plan(settings)[0].config.run.dir

    def drop(self, name):
        if self.remote.sync.store.uri == first and name == points.FAILED:
            raise Unreachable("503 SlowDown")
        real(self, name)

    monkeypatch.setattr(RunDir, "drop", drop)
    with pytest.raises(UserError, match=r"1 of 2 trials could not .*503 SlowDown"):
        sweep(settings)
    monkeypatch.undo()
    table, log = sweep(settings)
    assert "1 of them finished before" in log
    assert table["error"].null_count == 2


def test_records_that_lead_elsewhere_are_damaged_and_a_circle_ends(remote):
    """Somebody else may write to the bucket."""
    stood = prepared(remote())
    path = stood / "stages" / "score.json"
    expected = path.read_text(encoding="utf-8")
    for link in ("../../other-bucket", "shared/data-../../x", "/etc", 3, "points/0123456789abcdef"):
        path.write_text(json.dumps(json.loads(expected) | {"linked_to": link}), encoding="utf-8")
        with pytest.raises(UserError, match=r"score\.json is damaged \(linked_to = .* leads elsewhere\)"):
            stood.record("score")
    path.write_text(expected, encoding="utf-8")
    link = stood.record("score")["linked_to"]
    shared = stood.remote.linked_copy(link)
    record = json.loads((shared.path / "stages" / "score.json").read_text(encoding="utf-8"))
    shared.sync.store.write("stages/score.json", json.dumps(record | {"linked_to": link}).encode())
    elsewhere = RunDir.of(remote("b").run.model_copy(update={"dir": stood.remote.sync.store.uri}))
    for action in (elsewhere.fetch, lambda: elsewhere.remote.complete("score"), lambda: shared.complete("score")):
        action()
    assert not (elsewhere / "scores.parquet").is_file()


def test_a_selection_is_found_on_object_storage_and_read_again_by_another_machine(remote, s3, bucket, monkeypatch):
    auto = {"portfolio": [{"keep": 0.5}, {"criterion": "random", "keep": 0.2}], "seeds": 2, "steps": 1}
    keys = {"select__keep": "auto", "select__auto": auto}
    config = remote(**keys)
    result = Run(config)
    result.pipeline._find_selection = lambda pipeline: das.find_selection(pipeline, result.pipeline.display)
    result.stages("ingest", "score", "select")
    there = stored_objects(s3, bucket)
    assert "auto.json" in there
    assert {name.split("/")[0] for name in there if name.endswith("scores.parquet")} == {"scores.parquet"}, "copied"
    monkeypatch.setattr(PointSet, "run", lambda self, points: pytest.fail("it was looked for again"))
    found = json.loads(there["auto.json"])
    assert auto_select.known_selection(remote("b", **keys)) == found["chosen"]
    other = Run(remote("b", **keys))
    other.pipeline._find_selection = lambda pipeline: das.find_selection(pipeline, other.pipeline.display)
    other.stages("select")
    assert f"{found['name']} was found before" in other.text


@pytest.mark.slow
def test_a_study_on_object_storage_leaves_its_page_and_finding_there(remote, s3, bucket):
    settings = {"run": ["drop"], "seeds": 2, "evaluations": 1, "steps": 1}
    das.run_studies(remote(studies=settings), Display.silent())
    assert {"studies.html", "studies/drop.json", "studies/studies.parquet"} <= set(stored_objects(s3, bucket))
    log = io.StringIO()
    das.run_studies(remote("b", studies=settings), Display(Console(file=log, width=300)))
    assert "study drop: already done" in log.getvalue()
    s3.client.put_object(Bucket=bucket, Key="run/studies/drop.json", Body=b"{}")
    with pytest.raises(UserError, match=rf"^s3://{bucket}/run/studies/drop\.json is no finding"):
        das.run_studies(remote("c", studies=settings), Display.silent())


def test_the_folders_own_run_does_not_touch_the_runs_inside(remote, s3, bucket, tmp_path):
    config = remote()
    PointSet(config, LocalRunner(), Display.silent()).run([Point()])
    copy = scratch_of(config.run.dir, str(tmp_path / "c"))
    FolderSync(config.run.dir, copy, 0.0).pull()
    assert not copy.exists() or not [path for path in copy.rglob("*") if path.is_file()]

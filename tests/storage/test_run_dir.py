"""A run folder: skip valid outputs, refuse different ones, publish in one step, never read a half-written output."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distill_at_scale.core import command_line
from distill_at_scale.core.atomic_files import publish, resolve_parent, set_aside
from distill_at_scale.core.errors import Damaged, UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.storage import run_dir as rundir
from distill_at_scale.storage.run_dir import STAGES, RunDir, next_folder
from distill_at_scale.storage.stage_record import StageInputs

INPUTS = StageInputs({"score.lr": 0.1, "run.seed": 0}, {"ingest": "abc"})


@pytest.fixture
def run(tmp_path):
    """A run folder with one completed stage."""
    run = RunDir(tmp_path / "run")
    run.create()
    (run / "scores.parquet").write_bytes(b"scores")
    run.complete("score", INPUTS, [run / "scores.parquet"], 1.5, mean_score=2.0)
    return run


def test_a_stage_that_never_ran_is_not_valid(run):
    assert not run.valid("select", INPUTS)


def test_the_same_inputs_are_valid(run):
    assert run.valid("score", INPUTS)
    assert run.record("score")["mean_score"] == 2.0


def test_another_configuration_is_refused_with_the_difference(run):
    other = StageInputs({"score.lr": 0.2, "run.seed": 0, "score.new": 1}, {"ingest": "xyz"})
    with pytest.raises(UserError) as error:
        run.valid("score", other)
    for line in ("score.lr: 0.1 -> 0.2", 'score.new: "absent" -> 1', "ingest: other content (abc -> xyz)"):
        assert line in str(error.value)
    assert "run.seed" not in str(error.value)
    assert (run / "scores.parquet").read_bytes() == b"scores"


def test_other_data_are_refused_in_words(run):
    (run / "x").write_text("x", encoding="utf-8")
    run.complete("ingest", StageInputs({}, {"source": "abc"}), [run / "x"], 0)
    with pytest.raises(UserError, match="source: other files, sizes, labels or order of classes than when"):
        run.valid("ingest", StageInputs({}, {"source": "xyz"}))


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert StageInputs({"a": 1, "b": 2}, {}).fingerprint == StageInputs({"b": 2, "a": 1}, {}).fingerprint
    assert StageInputs({"a": 1}, {}).fingerprint != StageInputs({"a": 2}, {}).fingerprint
    assert StageInputs({"a": 1}, {}).fingerprint != StageInputs({}, {"a": 1}).fingerprint


def test_tuples_and_lists_are_equal(run):
    (run / "x").write_text("x", encoding="utf-8")
    run.complete("select", StageInputs({"list": (1, 2)}, {}), [run / "x"], 0)
    assert run.valid("select", StageInputs({"list": [1, 2]}, {}))


def test_a_missing_output_is_an_error(run):
    (run / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"scores\.parquet is missing"):
        run.valid("score", INPUTS)


def test_a_truncated_output_is_an_error(run):
    (run / "scores.parquet").write_bytes(b"sco")
    with pytest.raises(UserError, match=r"scores\.parquet is not what was written"):
        run.valid("score", INPUTS)


def test_a_damaged_record_is_an_error(run):
    (run / "stages" / "score.json").write_text('{"stage": "sc', encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        run.valid("score", INPUTS)


def test_the_content_of_a_stage_follows_its_output(run):
    before = run.content("score")
    run.complete("score", INPUTS, [run / "scores.parquet"], 9.0)
    assert run.content("score") == before
    (run / "scores.parquet").write_bytes(b"other!")
    run.complete("score", INPUTS, [run / "scores.parquet"], 9.0)
    assert run.content("score") != before


def test_the_content_of_a_stage_that_never_ran_says_what_to_do(run):
    with pytest.raises(UserError, match="no output of select yet; run this first:\n  distill-at-scale ingest CONFIG"):
        run.content("select")


def test_folders_are_recorded_file_by_file(run):
    (run / "prepared" / "train").mkdir(parents=True)
    (run / "prepared" / "train" / "a").write_text("a", encoding="utf-8")
    (run / "prepared" / "b").write_text("b", encoding="utf-8")
    run.complete("ingest", INPUTS, [run / "prepared"], 0)
    assert sorted(run.record("ingest")["outputs"]) == ["prepared/b", "prepared/train/a"]


def test_an_output_is_taken_over_from_another_run(run, tmp_path):
    second = RunDir(tmp_path / "second", reuse=run.path)
    second.create()
    assert second.take_over("score", INPUTS)
    assert second.valid("score", INPUTS)
    assert (second / "scores.parquet").read_bytes() == b"scores"
    assert second.content("score") == run.content("score")
    assert second.record("score")["reused_from"] == str(run.path)


def test_an_output_of_another_configuration_is_not_taken_over(run, tmp_path):
    second = RunDir(tmp_path / "second", reuse=run.path)
    second.create()
    with pytest.raises(UserError, match=r"^another configuration: .*score\.lr: 0\.1 -> 0\.2"):
        second.take_over("score", StageInputs({"score.lr": 0.2}, {}))
    assert not second.take_over("select", INPUTS)
    assert not (second / "scores.parquet").exists()


@pytest.mark.parametrize("content", [None, b"sco"], ids=["missing", "truncated"])
def test_a_damaged_output_is_not_taken_over(run, tmp_path, content):
    (run / "scores.parquet").unlink()
    if content is not None:
        (run / "scores.parquet").write_bytes(content)
    second = RunDir(tmp_path / "second", reuse=run.path)
    second.create()
    with pytest.raises(UserError, match=r"scores\.parquet is (missing|not what was written)$"):
        second.take_over("score", INPUTS)
    assert second.record("score") is None


def test_a_damaged_output_names_the_command_that_computes_it_again(run):
    (run / "scores.parquet").unlink()
    with command_line.remembered("run"):
        command_line.configured_by("my config.yaml", ["run.redo=ingest", "score.lr=0.2"])
        with pytest.raises(Damaged) as error:
            run.valid("score", INPUTS)
    assert str(error.value).endswith("\n  distill-at-scale run 'my config.yaml' score.lr=0.2 run.redo=score")
    with (
        command_line.remembered("select"),
        pytest.raises(Damaged, match=r"distill-at-scale score CONFIG run\.redo=score$"),
    ):
        run.valid("score", INPUTS)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_set_aside_is_moved_as_a_whole(run, damaged):
    (run / "proxies").mkdir()
    (run / "proxies" / "0").write_text("proxy", encoding="utf-8")
    if damaged:
        (run / "stages" / "score.json").write_text("{", encoding="utf-8")
    folder = Path(run.set_aside("score"))
    assert folder.parent == run / "replaced"
    assert sorted(path.name for path in folder.iterdir()) == ["proxies", "score.json", "scores.parquet"]
    assert (folder / "scores.parquet").read_bytes() == b"scores"
    assert run.record("score") is None
    assert not (run / "scores.parquet").exists()


def test_setting_a_linked_output_aside_leaves_the_other_run_as_it_is(run, tmp_path):
    second = RunDir(tmp_path / "second")
    second.create()
    second.adopt(run, "score")
    second.set_aside("score")
    assert not (second / "scores.parquet").is_symlink()
    assert (run / "scores.parquet").read_bytes() == b"scores"


def test_redo_covers_a_stage_and_those_after_it(tmp_path):
    run = RunDir(tmp_path, redo="select")
    assert [stage for stage in STAGES if run.redoes(stage)] == ["select", "distill", "evaluate", "report"]
    assert not any(RunDir(tmp_path).redoes(stage) for stage in STAGES)


def test_the_next_folder_is_one_that_does_not_exist(tmp_path):
    assert next_folder(f"{tmp_path}/x") == f"{tmp_path}/x-2"
    (tmp_path / "x-2").mkdir()
    (tmp_path / "x-3").mkdir()
    assert next_folder(f"{tmp_path}/x/") == next_folder(f"{tmp_path}/x-2") == f"{tmp_path}/x-4"
    assert next_folder("s3://bucket/runs/x?scheme=http") == "s3://bucket/runs/x-2?scheme=http"


def test_a_second_holder_of_the_lock_is_refused(run):
    with run.lock(), pytest.raises(UserError, match="another command"), RunDir(run.path).lock():
        pass
    with run.lock():
        pass  # free again


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match="cannot write"):
        RunDir(closed / "run").create()


def test_a_run_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write.*run\.dir"):
        RunDir(tmp_path / "file" / "run").create()


def test_publish_replaces_a_file_in_one_step(tmp_path):
    target = tmp_path / "a" / "x"
    with publish(target) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path / "a") == ["x"]


def test_publish_replaces_a_whole_folder(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("", encoding="utf-8")
    with publish(tmp_path / "x") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("", encoding="utf-8")
    assert os.listdir(tmp_path / "x") == ["new"]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_inside_publish_leaves_nothing(tmp_path, folder):
    def half_written():
        with publish(tmp_path / "x") as temporary:
            if folder:
                temporary.mkdir()
                temporary = temporary / "part"
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half_written()
    assert os.listdir(tmp_path) == []


def test_an_error_inside_publish_keeps_what_was_there(tmp_path):
    (tmp_path / "x").write_text("old", encoding="utf-8")

    def half_written():
        with publish(tmp_path / "x") as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half_written()
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"


def test_unfinished_work_belongs_to_one_fingerprint(run):
    assert run.work("score", INPUTS) == run.work("score", INPUTS)
    assert run.work("score", INPUTS) != run.work("score", StageInputs({}, {}))


def test_a_digest_is_the_same_in_every_process():
    assert digest({"b": [1, 2], "a": None}) == digest(json.loads('{"a": null, "b": [1, 2]}'))
    assert len(digest({})) == 32


def test_files_of_another_run_are_linked_where_they_are_missing(tmp_path):
    other = tmp_path / "other"
    (other / "stages").mkdir(parents=True)
    (other / "networks" / "abc").mkdir(parents=True)
    (other / "networks" / "abc" / "expert").write_text("theirs", encoding="utf-8")
    (other / "networks" / "abc" / ".expert.partial").write_text("half", encoding="utf-8")
    run = RunDir(tmp_path / "run", other)
    run.create()
    run.take_over_files("networks/abc")
    run.take_over_files("networks/unknown")
    assert [p.name for p in (run / "networks" / "abc").iterdir()] == ["expert"]
    (run / "networks" / "abc" / "expert").unlink()
    (run / "networks" / "abc" / "expert").write_text("mine", encoding="utf-8")
    run.take_over_files("networks/abc")
    assert (run / "networks" / "abc" / "expert").read_text(encoding="utf-8") == "mine"


def test_a_file_that_was_set_aside_is_not_taken_over_again(tmp_path):
    for folder in (tmp_path / "other" / "stages", tmp_path / "other" / "networks" / "abc"):
        folder.mkdir(parents=True)
    (tmp_path / "other" / "networks" / "abc" / "expert").write_text("damaged", encoding="utf-8")
    run = RunDir(tmp_path / "run", tmp_path / "other")
    run.create()
    run.take_over_files("networks/abc")
    assert "renamed to expert.damaged" in set_aside(run / "networks" / "abc" / "expert")
    run.take_over_files("networks/abc")
    assert [path.name for path in (run / "networks" / "abc").iterdir()] == ["expert.damaged"]


def test_half_written_networks_of_a_killed_command_are_swept(run):
    folder = run / "networks" / "abc" / "expert.partial"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent):
        (place / ".epoch.1234.tmp").write_text("half", encoding="utf-8")
        (place / "whole").write_text("whole", encoding="utf-8")
    run.sweep()
    assert sorted(p.name for p in (run / "networks").rglob("*") if p.is_file()) == ["whole", "whole"]


def test_files_that_another_run_removes_meanwhile_are_skipped(tmp_path, monkeypatch):
    other = tmp_path / "other" / "networks" / "abc"
    other.mkdir(parents=True)
    (tmp_path / "other" / "stages").mkdir()
    gone, kept = other / "gone", other / "kept"
    kept.write_text("kept", encoding="utf-8")
    monkeypatch.setattr(rundir, "files_in", lambda path: [gone, kept])
    run = RunDir(tmp_path / "run", tmp_path / "other")
    run.create()
    run.take_over_files("networks/abc")
    assert [p.name for p in (run / "networks" / "abc").iterdir()] == ["kept"]


def test_workers_get_a_folder_without_symlinks_in_its_path(tmp_path):
    """A path that is itself a link between run folders stays a link."""
    (tmp_path / "efs" / "run").mkdir(parents=True)
    (tmp_path / "efs" / "shared").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "efs")
    (tmp_path / "efs" / "run" / "prepared").symlink_to("../shared")
    assert resolve_parent(tmp_path / "runs" / "run" / "prepared") == tmp_path / "efs" / "run" / "prepared"

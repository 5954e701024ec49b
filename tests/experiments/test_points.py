"""Points of sweeps and studies: shared outputs and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run, tiny_config

from distill_at_scale.config.load import validate, with_overrides
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.experiments import points
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.storage.run_dir import RunDir


class Refusing(LocalRunner):
    def executor(self):
        pytest.fail("nothing is run")

    def run(self, tasks, body, done):
        pytest.fail("nothing is run")


def test_folders_of_earlier_versions_are_found():
    """If this fails, a key was added since: add it to NOT_IN_IDS if its default changes nothing."""
    fp32 = {section: {"precision": "fp32"} for section in ("score", "distill", "evaluate")}
    config = validate({"data": {"source": "digits"}, "run": {"dir": "/nowhere"}, **fp32})
    point_set = PointSet(config, LocalRunner(), Display.silent())
    shared = point_set._shared_names(config)
    assert shared == ("shared/data-1fd1d87aaa0ffd70", "shared/scores-9114ffd36ffdb45b")
    assert point_set.configured(Point({"select.keep": 0.5}, 1)).run.dir == "/nowhere/points/9946d7a85577a718"


def test_points_share_ingest_and_scores_by_links(tmp_path):
    point_set = PointSet(tiny_config(tmp_path / "sweep"), LocalRunner(), Display.silent())
    outcomes = point_set.run([Point({"select.keep": keep}) for keep in (0.2, 0.5)])
    assert len(list((tmp_path / "sweep" / "shared").glob("scores-*/proxies/trial-*"))) == 2  # once for both
    for outcome in outcomes:
        assert (outcome.folder / "prepared").is_symlink()
        assert (outcome.folder / "scores.parquet").is_symlink()
        assert "reused_from" in json.loads((outcome.folder / "stages" / "score.json").read_text(encoding="utf-8"))
    assert outcomes[0].kept < outcomes[1].kept


def test_a_finished_point_is_read_and_not_tried_again(tmp_path):
    point_set = PointSet(tiny_config(tmp_path / "sweep"), LocalRunner(), Display.silent())
    first = point_set.run([Point()])[0]
    written = (first.folder / "evaluation.json").stat().st_mtime_ns
    assert point_set.run([Point(), Point()])[1] == first
    assert (first.folder / "evaluation.json").stat().st_mtime_ns == written


def test_repetitions_distil_again_from_the_same_selection_and_random_ones_draw_other_samples(tmp_path):
    points = PointSet(tiny_config(tmp_path), Refusing(), Display.silent())
    first, second = (points.configured(Point({}, seed)) for seed in (0, 1))
    assert (second.distill_seed - first.distill_seed, second.select_seed - first.select_seed) == (1, 1)
    assert first.run.dir != second.run.dir


def test_a_points_folder_ignores_workers_and_clusters_and_knows_every_other_key(tmp_path):
    config = tiny_config(tmp_path)

    def folder(**overrides: object) -> str:
        changed = with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})
        return PointSet(changed, Refusing(), Display.silent()).configured(Point()).run.dir

    assert folder() == folder(distill__workers=2, cluster__actors=1)
    others = [folder(), folder(runtime__drop=0.1), folder(score__epochs=3), folder(data__chunk=64), folder(run__seed=1)]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"error": 3, "passing": "no"}'])
def test_a_damaged_note_is_a_failure_of_the_disk(tmp_path, text):
    (tmp_path / points.FAILED).write_text(text, encoding="utf-8")
    result = points.read_failure(RunDir(tmp_path))
    assert isinstance(result.message, str)
    assert result.transient is ("error" not in text)
    (tmp_path / points.STOPPED).write_text(text, encoding="utf-8")
    assert points.read_stopped(Point(), RunDir(tmp_path), "convnet") is None


def test_what_points_share_is_taken_over_from_another_run(tmp_path):
    Run(tiny_config(tmp_path / "earlier")).stages("ingest", "score")
    config = tiny_config(tmp_path / "sweep", run={"dir": str(tmp_path / "sweep"), "reuse": str(tmp_path / "earlier")})
    shared = PointSet(config, LocalRunner(), Display.silent()).run([Point()])[0].folder / "scores.parquet"
    record = json.loads((shared.resolve().parent / "stages" / "score.json").read_text(encoding="utf-8"))
    assert record["reused_from"] == str(tmp_path / "earlier")
    assert not list(Path(tmp_path / "sweep").rglob("proxies"))


def test_a_forbidden_override_is_refused_before_anything_runs(tmp_path):
    point_set = PointSet(tiny_config(tmp_path / "sweep"), LocalRunner(), Display.silent())
    with pytest.raises(UserError, match=r"select\.kep"):
        point_set.run([Point(), Point({"select.kep": 0.1})])
    assert not (tmp_path / "sweep").exists()

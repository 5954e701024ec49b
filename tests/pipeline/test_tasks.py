"""What the driver hears about long units of work before they are finished."""

from __future__ import annotations

from pathlib import Path

from distill_at_scale.config import load as configuration
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.pipeline.executors import tasks

CONFIG = configuration.validate({"distill": {"method": "mtt", "mtt": {"experts": 2}}})


class Noting:
    """An executor whose workers write these notes, one after the other, for each unit."""

    def __init__(self, *notes: int):
        self.notes = notes

    def run(self, task, done, poll):
        folder = task.paths.get("notes") or task.paths["networks"]
        for unit in task.units:
            note = folder / f".{unit.work}.progress"
            for content in self.notes:
                note.write_text(str(content), encoding="utf-8")
                poll()
            note.unlink()
            done({"network": unit.work})


def test_networks_advance_by_the_samples_they_have_seen(tmp_path):
    names, advanced = ["expert-000.safetensors", "expert-001.safetensors"], list[int]()
    paths = DistillPaths(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    (tmp_path / f".{names[0]}.progress").write_text("3", encoding="utf-8")  # of an interrupted command
    tasks.make_networks(Noting(2, 5, 9), CONFIG, paths, names, 10, advanced.append)
    assert advanced == [3, 2, 4, 1, 2, 3, 4, 1]


def test_networks_that_report_nothing_advance_one_by_one(tmp_path):
    advanced, paths = list[int](), DistillPaths(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    tasks.make_networks(Noting(5), CONFIG, paths, ["one", "other"], 0, advanced.append)
    assert advanced == [1, 1]


def test_an_evaluation_tells_how_far_its_networks_are(tmp_path):
    jobs, told, rows = [EvaluationJob("full", "convnet", seed) for seed in (0, 1)], list[str](), list[object]()
    folders = Path("prepared"), Path("synthetic"), Path("manifest.parquet"), tmp_path
    (tmp_path / ".full convnet 1.progress").write_text("70", encoding="utf-8")  # of an interrupted command
    tasks.evaluate(Noting(10, 10, 40), CONFIG, jobs, folders, rows.append, working=told.append)
    assert told == [f"full convnet {seed} at {percent} %" for seed in (0, 1) for percent in (10, 40)]
    assert len(rows) == 2

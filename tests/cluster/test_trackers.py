"""Calls to MLflow and Weights & Biases: on fake modules that record each call, and for real where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import Event, instant

pytest.importorskip("ray")

from distill_at_scale.cluster import trackers


@pytest.fixture
def events(tmp_path):
    """A folder with a report, and everything that happens to a run, as events."""
    (tmp_path / "report.html").write_text("a report", encoding="utf-8")
    row = {"set": "distilled", "network": "convnet", "seed": 0, "top1": 0.5, "top5": 0.75}
    lines = [{"held": "here", "step": 0, "of": 2, "at": 1.0, "workers": []}, {"step": 1, "of": 2, "loss": 0.5}]
    return [
        instant("stage", "skipped", stage="ingest"),
        instant("stage", "started", stage="distill"),
        *(instant("log", "line", line, "distill") for line in [*lines, {"step": 2, "of": 2, "loss": 0.25}]),
        instant("result", "network", row | {"top1": 0.25}, "evaluate"),
        instant("result", "network", row | {"seed": 1, "top1": 0.75}, "evaluate"),
        Event("stage", "finished", 0.0, 2.5, stage="evaluate"),
    ]


class Notes:
    """A tracker that records its events."""

    def __init__(self) -> None:
        self.logged, self.saved, self.ended = [], [], []

    def log(self, values, step):
        self.logged.append((dict(values), step))

    def save(self, path):
        self.saved.append(path.name)

    def end(self, failed):
        self.ended.append(failed)


def test_a_run_is_told_once_with_its_curves_results_and_report(tmp_path, events):
    begun: list[Notes] = []
    tracker = trackers.Tracker("fake", tiny_config(tmp_path), lambda: begun.append(Notes()) or begun[-1])
    for event in events:
        tracker(event)
    tracker.close()
    (notes,) = begun
    assert ({"loss": 0.5}, 1) in notes.logged
    assert ({"loss": 0.25}, 2) in notes.logged
    assert ({"distilled/convnet/top1": 0.5, "distilled/convnet/top5": 0.75}, None) in notes.logged
    assert ({"seconds/evaluate": 2.5}, None) in notes.logged
    assert (notes.saved, notes.ended) == (["report.html"], [False])


def test_a_failed_stage_is_a_failed_run_and_a_command_without_work_is_not_tracked(tmp_path, events):
    begun: list[Notes] = []
    tracker = trackers.Tracker("fake", tiny_config(tmp_path), lambda: begun.append(Notes()) or begun[-1])
    tracker(events[0])
    assert begun == []
    tracker(events[1])
    tracker(Event("stage", "failed", 0.0, 1.0, stage="distill"))
    tracker.close()
    assert begun[0].ended == [True]


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf"install distill_at_scale\[{package}\]"):
        trackers.trackers(tiny_config(tmp_path, **{f"track__{package}": {}}))


def test_nothing_is_tracked_unless_configured(tmp_path):
    assert trackers.trackers(tiny_config(tmp_path)) == []


def test_parameters_are_flat_and_addresses_lose_their_credentials(tmp_path):
    address = "s3://someone:secret@bucket/set"
    parameters = trackers.parameters(tiny_config(tmp_path, data__path=address, track__mlflow={"tracking_uri": address}))
    assert parameters["distill.steps"] == 3
    assert parameters["data.path"] == "s3://bucket/set"
    assert trackers._short([address, 1]) == "['s3://bucket/set', 1]"
    assert "secret" not in str(parameters)


def test_rays_integration_with_wandb_gets_settings_but_no_key(tmp_path, monkeypatch):
    from ray.air.integrations import wandb as integration

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    calls, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    for name in ("Image", "Video", "WBValue"):  # which Ray's integration imports with the package
        monkeypatch.setattr(integration, name, type(name, (), {}), raising=False)
    monkeypatch.setattr(integration, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    config = tiny_config(tmp_path / "mine", track__wandb={"project": "p", "entity": "e", "mode": "offline"})
    trackers.Wandb(config.track.wandb, config).log({"loss": 0.5}, 3)
    (options,) = calls
    assert (options["project"], options["entity"], options["mode"], options["name"]) == ("p", "e", "offline", "mine")
    assert options["config"]["distill.method"] == "dc"
    assert logged == [({"loss": 0.5}, 3)]


def test_mlflow_gets_parameters_curves_and_the_report(tmp_path, events, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)  # MLflow's own default puts artefacts of a local store here
    store = f"sqlite:///{tmp_path}/store.db"
    track = {"tracking_uri": store, "experiment": "tested"}
    (tracker,) = trackers.trackers(tiny_config(tmp_path, track__mlflow=track))
    for event in events:
        tracker(event)
    tracker.close()
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("tested").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert run.data.params["select.keep"] == "0.2"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert run.data.metrics["distilled/convnet/top1"] == 0.5
    assert [artefact.path for artefact in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_wandb_takes_it_offline(tmp_path, events, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["distill-at-scale", "run", "c.yaml", "data.path=s3://someone:do-not-tell@bucket"])
    (tracker,) = trackers.trackers(tiny_config(tmp_path, track__wandb={"mode": "offline"}))
    for event in events:
        tracker(event)
    tracker.close()
    wandb.teardown()  # the process that writes its file has ended
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"do-not-tell" not in content
    for word in (b"distilled/convnet/top1", b"report.html", b"distill.steps"):
        assert word in content
    assert Path(next(tmp_path.glob("wandb/offline-run-*/files/report.html"))).read_text(encoding="utf-8") == "a report"

"""The same functions on Ray: equal results for any number of actors and workers, and after lost processes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import fault_plugins
import pytest
import torch

from distill_at_scale.config.load import Config, validate
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError, WorkersLost
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import is_finished, part_path
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring.scorer import score_part_path

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_session")


def settings(tmp_path: Path, **sections) -> Config:
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"source": "digits", "size": 8, "channels": 1, "holdout": 0.25, "chunk": 200},
        "score": {"trials": 2, "epochs": 2, "width": 8, "batch": 128},
        "select": {"keep": 0.2},
        "distill": {
            "method": "dm",
            "steps": 8,
            "width": 8,
            "workers": 2,
            "checkpoint_every": 2,
            "dm": {"augment": "color_crop"},
        },
        "runtime": {"rule": "loss", "drop": 0.3, "refresh": 3},
        "evaluate": {"seeds": 2, "epochs": 5},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return validate(values)


WARM: list[bool] = [False]  # whether executors behave as on a Ray of their own
STARTED: list = []


def executor(config: Config, say=lambda text: None):
    from distill_at_scale.cluster.executor import RayExecutor

    STARTED.append(RayExecutor(config, say))
    STARTED[-1].session.local = WARM[0]
    return STARTED[-1]


@pytest.fixture(autouse=True)
def released():
    """Actors that stay must not hold the cores of the next test."""
    yield
    while STARTED:
        STARTED.pop().release()


@pytest.fixture(params=["cluster", "own Ray"])
def both_kinds(request, monkeypatch):
    """On a cluster, where each stage starts its processes, and on a Ray of the command's own, where actors stay."""
    monkeypatch.setattr(sys.modules[__name__], "WARM", [request.param == "own Ray"])


def quiet() -> Display:
    from rich.console import Console

    return Display(Console(quiet=True))


def run_local(config: Config, stages=("ingest", "score", "select")) -> Path:
    Pipeline(config, LocalExecutor, quiet()).run(stages)
    return Path(config.run.dir)


def distilled(config: Config, run: Path, work: Path, say=lambda text: None) -> synthetic_set.SyntheticSet:
    work.mkdir(parents=True, exist_ok=True)
    places = distill.DistillPaths(run / "prepared", run / "manifest.parquet", work, work / "metrics.jsonl")
    tasks.distill(by := executor(config, say), config, places, lambda line: None)
    by.release()
    return synthetic_set.load(work / "synthetic")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose first three stages were done without Ray."""
    return run_local(settings(tmp_path_factory.mktemp("local")))


@pytest.mark.slow
def test_every_stage_runs_on_a_ray_of_the_commands_own_and_ingest_equals_the_one_without(
    tmp_path, finished, monkeypatch
):
    """On a running cluster: test_worker_run_dir.py, and test_faults.py on several nodes."""
    monkeypatch.setattr(sys.modules[__name__], "WARM", [True])
    config = settings(tmp_path)
    lines: list[str] = []
    display = quiet()
    display.say = lines.append  # type: ignore[method-assign]
    Pipeline(config, lambda: executor(config), display).run()
    run = Path(config.run.dir)
    for name in (
        "scores.parquet",
        "manifest.parquet",
        "synthetic/card.json",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
    ):
        assert (run / name).exists(), name
    assert PreparedDataset(run / "prepared").fingerprint == PreparedDataset(finished / "prepared").fingerprint
    assert any(line.startswith("  distill: 8 of 8 steps") for line in lines)
    events = map(json.loads, (run / "timeline.jsonl").read_text(encoding="utf-8").splitlines())
    assert len({event["pid"] for event in events if event["what"] == "work"}) == 2, "actors stay from stage to stage"


@pytest.mark.slow
@pytest.mark.parametrize("actors", [1, 2])
def test_scores_are_the_same_bytes_for_any_number_of_actors_and_without_ray(tmp_path, finished, actors):
    config = settings(tmp_path, cluster={"actors": actors})
    prepared, proxies = finished / "prepared", finished / "proxies"
    chunks = PreparedDataset(prepared).chunks("train")
    for name, by in (("ray", executor(config)), ("local", LocalExecutor())):
        (tmp_path / name).mkdir()
        tasks.score(by, config, prepared, proxies, chunks, tmp_path / name, lambda count: None)
    for chunk in chunks:
        here, there = score_part_path(tmp_path / "ray", chunk), score_part_path(tmp_path / "local", chunk)
        assert here.read_bytes() == there.read_bytes(), chunk


def killing(folder: Path, marker: Path) -> Config:
    """A distillation whose second worker dies in step 6, if `marker` is not there."""
    return settings(folder, distill={"method": "fault_plugins:KillingBackend", "options": {"marker": str(marker)}})


@pytest.fixture(scope="module")
def undisturbed(ray_session, tmp_path_factory, finished) -> synthetic_set.SyntheticSet:
    """The set of two workers of which none dies, on a Ray of the command's own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (spared := folder / "spared").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "WARM", [True])
        return distilled(killing(folder, spared), finished, folder / "work")


@pytest.mark.slow
def test_two_workers_give_the_set_of_one_process(tmp_path, finished, undisturbed):
    """That a cluster gives the same bytes is part of the next test."""
    places = distill.DistillPaths(finished / "prepared", finished / "manifest.parquet", tmp_path, tmp_path / "log")
    tasks.distill(LocalExecutor(), settings(tmp_path), places, lambda line: None)
    alone = synthetic_set.load(tmp_path / "synthetic")
    assert torch.equal(alone.labels, undisturbed.labels)
    torch.testing.assert_close(undisturbed.images, alone.images, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_training_worker_resumes_and_ends_with_the_same_bytes(tmp_path, finished, undisturbed, both_kinds):
    lines: list[str] = []
    resumed = distilled(killing(tmp_path, tmp_path / "killed"), finished, tmp_path / "broken", lines.append)
    assert (tmp_path / "killed").exists(), "nothing was killed, so nothing was tested"
    assert torch.equal(resumed.images, undisturbed.images)
    assert "  workers were lost; resuming from step 6; 0 steps are repeated" in lines


@pytest.mark.slow
def test_a_killed_ingest_actor_loses_and_doubles_nothing(tmp_path, finished, both_kinds):
    marker = tmp_path / "killed"
    config = settings(
        tmp_path, data={"source": "fault_plugins:KillingSource", "path": str(marker)}, cluster={"actors": 1}
    )
    lines: list[str] = []
    Pipeline(config, lambda: executor(config, lines.append), quiet()).run(("ingest",))
    assert any(line.endswith("repeated after losses, and counted once") for line in lines)
    assert marker.exists(), "nothing was killed, so nothing was tested"
    assert (
        PreparedDataset(Path(config.run.dir) / "prepared").fingerprint
        == PreparedDataset(finished / "prepared").fingerprint
    )


@pytest.mark.slow
def test_a_sample_that_kills_each_process_costs_only_its_own_chunk_and_is_named(tmp_path):
    config = settings(tmp_path, data={"source": "fault_plugins:DeadlySource"}, cluster={"actors": 2, "max_failures": 1})
    (parts := tmp_path / "parts").mkdir()
    plan = ingest.plan(config).on_disk(parts)
    with pytest.raises(WorkersLost, match=r"1 units of work are left, the first one makes") as error:
        tasks.ingest(executor(config), config, plan, parts, lambda count: None)
    paths = [part_path(parts, split, index) for split, index, _ in plan.chunks(200)]
    (missing,) = (path for path in paths if not is_finished(path, False))
    assert f"makes {missing.resolve()}. Finished" in str(error.value)


@pytest.mark.slow
def test_a_killed_scoring_actor_loses_and_doubles_nothing(tmp_path, finished):
    config = settings(tmp_path, score={"criterion": "fault_plugins:KillingLoss"}, cluster={"actors": 2})
    chunks = PreparedDataset(finished / "prepared").chunks("train")
    tables = []
    for name, by in (("ray", executor(config)), ("local", LocalExecutor())):
        (tmp_path / name).mkdir()
        if name == "ray":
            fault_plugins.ARMED.touch()
        tasks.score(
            by, config, finished / "prepared", finished / "proxies", chunks, tmp_path / name, lambda count: None
        )
        assert not fault_plugins.ARMED.exists(), "nothing was killed, so nothing was tested"
        tables.append([score_part_path(tmp_path / name, chunk).read_bytes() for chunk in chunks])
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_two_workers_of_a_proxy_end_with_the_weights_of_one(tmp_path, finished, monkeypatch):
    """Up to rounding; test_scoring has the bytes."""
    monkeypatch.setattr(sys.modules[__name__], "WARM", [True])  # Ray Train runs the same body, more slowly
    for workers in (1, 2):
        config = settings(tmp_path, score={"workers": workers, "trials": 1})
        by = executor(config) if workers == 2 else LocalExecutor()
        tasks.train_proxies(by, config, finished / "prepared", tmp_path / f"{workers}" / "p", lambda count: None)
    for epoch in range(2):
        one, two = (proxy.checkpoint_path(tmp_path / f"{workers}" / "p", 0, epoch) for workers in (1, 2))
        torch.testing.assert_close(safetensors_io.load(one), safetensors_io.load(two), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_divergence_names_class_and_step_and_keeps_the_last_good_state(tmp_path, finished, both_kinds):
    config = settings(tmp_path, distill={"dm": {"image_lr": 1e30, "augment": "none"}, "checkpoint_every": 1000})
    work = tmp_path / "work"
    with pytest.raises(DistillationDiverged, match=r"class '\d' .* at step \d+, image learning rate 1e\+30"):
        distilled(config, finished, work)
    from safetensors.torch import load_file

    state = load_file(work / "state.safetensors")
    images = [value for key, value in state.items() if key.startswith("images/")]
    assert len(images) == 10
    assert all(torch.isfinite(image).all() for image in images)


def test_more_workers_than_cores_are_refused_before_anything_starts(tmp_path, finished):
    config = settings(tmp_path, distill={"workers": 9})
    with pytest.raises(UserError, match=r"distill\.workers = 9 needs as many cores"):
        distilled(config, finished, tmp_path / "work")


def test_links_to_weights_and_data_keep_their_names_for_the_workers(tmp_path):
    from distill_at_scale.cluster.executor import absolute

    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    config = settings(tmp_path, score={"weights": str(tmp_path / "model.safetensors")}, data={"path": "s3://bucket/x"})
    assert absolute(config).score.weight_names == [str(tmp_path / "model.safetensors")]
    assert absolute(config).data.path == "s3://bucket/x"


def test_a_users_error_inside_an_actor_arrives_as_it_is(tmp_path):
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(b"")
    config = settings(tmp_path, data={"source": "imagefolder", "path": str(tmp_path / "images"), "holdout": None})
    (tmp_path / "pieces").mkdir()
    plan = ingest.plan(config).on_disk(tmp_path / "pieces")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match="there is no such folder"):
        tasks.ingest(executor(config), config, plan, tmp_path / "pieces", lambda count: None)


EXPERTS = {"experts": 4, "expert_epochs": 2, "expert_batch": 64, "max_start": 1, "target_epochs": 1, "student_steps": 2}
TEACHER = {"teacher_network": "convnet_bn", "teacher_epochs": 1, "label_epochs": 2, "factor": 1, "crops": 2}


def test_experts_are_the_same_bytes_after_a_killed_task_and_where_only_one_is_missing(tmp_path, finished, both_kinds):
    marker = tmp_path / "killed"
    own = {"method": "fault_plugins:KillingExperts", "mtt": EXPERTS, "width": 32, "options": {"marker": str(marker)}}
    config = settings(tmp_path, distill=own)
    weights = []
    for name, by in (("ray", executor(config)), ("local", LocalExecutor())):
        folder = tmp_path / name
        folder.mkdir()
        places = distill.DistillPaths(
            finished / "prepared", finished / "manifest.parquet", folder, folder / "log", folder
        )
        names = distill.missing_networks(config, places)
        tasks.make_networks(by, config, places, names, 0, lambda count: None)
        assert marker.exists(), "nothing was killed, so nothing was tested"
        if name == "ray":
            (folder / names[2]).unlink()
            tasks.make_networks(by, config, places, names[2:3], 0, lambda count: None)
        weights.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(weights[0]) == 4
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_patches_are_ranked_to_the_same_bytes_on_ray_and_become_a_set(tmp_path, finished):
    config = settings(tmp_path, distill={"method": "rded", "rded": TEACHER, "steps": 1}, run={"reuse": str(finished)})
    by = executor(config)
    by.train = LocalExecutor().train  # only teacher and patches are of interest here
    Pipeline(config, lambda: by, quiet()).run(("ingest", "score", "select", "distill"))
    (table,) = Path(config.run.dir).glob("networks/*/patches-*.parquet")
    (tmp_path / "local").mkdir()
    shutil.copy(table.parent / "teacher.safetensors", tmp_path / "local")
    places = distill.DistillPaths(
        finished / "prepared", finished / "manifest.parquet", tmp_path, tmp_path, tmp_path / "local"
    )
    pieces, chunks = (
        patch_ranking.parts_folder(places.networks, config),
        PreparedDataset(finished / "prepared").chunks("train"),
    )
    pieces.mkdir()
    candidates = patch_ranking.draw_candidates(places.manifest, config, pieces)
    tasks.rank_patches(LocalExecutor(), config, places, chunks, lambda count: None)
    again = patch_ranking.table_path(places.networks, config)
    patch_ranking.merge([score_part_path(pieces, chunk) for chunk in chunks], candidates, TEACHER["crops"], again)
    assert again.read_bytes() == table.read_bytes()
    assert synthetic_set.load(config.run.dir).training_set().views.epochs == 2

"""The whole pipeline on clips: from mp4 files to the distilled set, in this process and on Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run, tiny_config
from PIL import Image
from videos import numbered, write_video

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sources.video import moving_digits
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.pipeline.executors import tasks

DATA = {
    "source": "moving_digits",
    "frames": 4,
    "size": 8,
    "channels": 1,
    "chunk": 8,
    "classes": ["left", "right", "up"],
}
NETWORKS = {
    "score": {"trials": 2, "epochs": 1, "width": 4, "batch": 8, "network": "convnet3d"},
    "select": {"keep": 0.7},
    "distill": {"steps": 3, "width": 4, "network": "convnet3d", "ipc": 2, "checkpoint_every": 1, "method": "dm",
                "dm": {"augment": "color_crop_cutout_scale_rotate"}},
    "runtime": {"rule": "loss", "drop": 0.3},
    "evaluate": {"networks": ["convnet3d", "frame:convnet"], "seeds": 2, "epochs": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Iterator[Path]:
    """Eighteen clips for training and nine for testing of each of eight directions."""
    images, splits = moving_digits.digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits, "digits", lambda: (images[:216], splits[:216]))
        folder = tmp_path_factory.mktemp("files") / "clips"
        moving_digits.MovingDigits(tiny_config(folder, data={**DATA, "path": str(folder)}).data)
        yield folder


def settings(folder: Path, files: Path, **overrides) -> Config:
    return tiny_config(folder, data={**DATA, "path": str(files)}, **NETWORKS, **overrides)


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory, files) -> Run:
    run = Run(settings(tmp_path_factory.mktemp("clips") / "run", files))
    return run.stages("ingest", "score", "select", "distill", "evaluate", "report")


def test_every_stage_works_on_clips(clip_run):
    meta = PreparedDataset(clip_run.dir / "prepared").meta
    assert meta["shape"] == [4, 1, 8, 8]
    assert meta["counts"] == {"train": [18] * 3, "test": [9] * 3}
    assert sum(meta["decoders"].values()) == 81
    assert pq.read_table(clip_run.dir / "manifest.parquet")["kept"].to_numpy().sum() == 13 * 3
    synthetic = synthetic_set.load(clip_run.dir)
    assert synthetic.images.shape == (6, 4, 1, 8, 8)
    rows = json.loads((clip_run.dir / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    assert {(row["set"], row["network"], row["n"]) for row in rows} == {
        (name, network, 2) for name in ("distilled", "random_real") for network in ("convnet3d", "frame:convnet")
    }
    with Image.open(clip_run.dir / "synthetic" / "preview.png") as picture:
        assert picture.n_frames == 4
    assert "clips of 4 frames" in (clip_run.dir / "report.html").read_text(encoding="utf-8")
    assert "decoded" in clip_run.text


def test_prepared_clips_are_the_frames_of_the_files_and_their_statistics(clip_run, files):
    from distill_at_scale.data.codecs.clip import clip_decoder

    prepared = PreparedDataset(clip_run.dir / "prepared")
    pixels, labels = prepared.load("train")
    decoder = clip_decoder(clip_run.config.data, 0)
    name = sorted((files / "train" / "right").iterdir())[3]
    clip, remark = decoder("x", name.read_bytes())
    np.testing.assert_array_equal(pixels[labels == prepared.class_names.index("right")][3], clip)
    assert remark is None
    assert prepared.mean[0] == pytest.approx(pixels.mean() / 255, abs=1e-6)
    assert prepared.std[0] == pytest.approx(pixels.std() / 255, abs=1e-6)


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_every_method_moves_the_frames_of_clips(tmp_path, files, clip_run, method):
    config = settings(tmp_path / "run", files, distill__method=method, distill__dsa={"augment": "crop_scale"})
    run = Run(config.model_copy(update={"run": config.run.model_copy(update={"reuse": str(clip_run.dir)})}))
    run.stages("ingest", "score", "select", "distill")
    synthetic = synthetic_set.load(run.dir)
    assert torch.isfinite(synthetic.images).all()
    first, last = synthetic.snapshots[0], synthetic.snapshots[3]
    assert first.shape == last.shape == (6, 4, 1, 8, 8)
    assert all((first[:, frame] != last[:, frame]).any() for frame in range(4))


def test_real_initial_clips_are_whole_clips_of_their_class(clip_run):
    """Each starts as the frames of one real, kept clip, in their order."""
    prepared, synthetic = PreparedDataset(clip_run.dir / "prepared"), synthetic_set.load(clip_run.dir)
    table = pq.read_table(clip_run.dir / "manifest.parquet")
    kept = table.filter(table["kept"])["sample_id"].to_pylist()
    pixels, labels = prepared.load("train", only=kept)
    for clip, label in zip(synthetic.snapshots[0].numpy(), synthetic.labels.tolist(), strict=True):
        assert any(np.array_equal(clip, real) for real in pixels[labels == label])


def test_nothing_dropped_is_the_same_as_no_rule_on_clips(tmp_path, files, clip_run):
    results = []
    for name, rule in (("a", {"rule": "none"}), ("b", {"rule": "loss", "drop": 0.0})):
        config = tiny_config(tmp_path / name, data={**DATA, "path": str(files)}, **{**NETWORKS, "runtime": rule})
        run = Run(config.model_copy(update={"run": config.run.model_copy(update={"reuse": str(clip_run.dir)})}))
        results.append(synthetic_set.load(run.stages("ingest", "score", "select", "distill").dir).images)
    assert torch.equal(*results)


def test_clips_are_kept_as_jpeg_where_they_are_large(tmp_path, files, clip_run):
    run = Run(tiny_config(tmp_path / "run", data={**DATA, "path": str(files), "size": 16, "store": "jpeg", "quality": 95},
                          **NETWORKS)).stages("ingest")  # fmt: skip
    raw = Run(tiny_config(tmp_path / "raw", data={**DATA, "path": str(files), "size": 16}, **NETWORKS)).stages("ingest")
    stored, exact = (PreparedDataset(r.dir / "prepared").load("train")[0].astype(int) for r in (run, raw))
    assert stored.shape == exact.shape == (54, 4, 1, 16, 16)
    assert 0 < np.abs(stored - exact).mean() < 3


def two_classes(root: Path) -> Path:
    """Three sound clips in each of the classes a and b; the folder of the training split."""
    folder = root / "data" / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            write_video(folder / name / f"{i}.mp4", numbered(12))
    return folder


def test_short_clips_are_used_and_listed_and_broken_ones_are_not_used(tmp_path):
    folder = two_classes(tmp_path)
    write_video(folder / "a" / "short.mp4", numbered(3))
    (folder / "b" / "empty.mp4").write_bytes(b"")
    (folder / "b" / "text.mp4").write_text("no video", encoding="utf-8")
    (folder / "b" / "notes.txt").write_text("no sample", encoding="utf-8")
    data = {"source": "videofolder", "path": str(folder.parent), "frames": 8, "size": 16, "max_bytes": 10_000}
    (folder / "a" / "large.mp4").write_bytes(bytes(20_000))
    run = Run(tiny_config(tmp_path / "run", data=data, **NETWORKS))
    assert run.pipeline.validate() == 3
    run.stages("ingest")
    listed = {row["sample_id"]: row for row in pq.read_table(run.dir / "rejected.parquet").to_pylist()}
    assert pq.read_table(run.dir / "validation.parquet").to_pylist() == list(listed.values())
    assert {name for name, row in listed.items() if row["used"]} == {"train/a/short.mp4"}
    reasons = {
        "train/a/short.mp4": "3 frames, fewer than data.frames = 8: the last one repeats 5 times",
        "train/a/large.mp4": "20,000 bytes, more than data.max_bytes = 10,000; raise it or replace the file",
        "train/b/empty.mp4": "empty file; replace it",
        "train/b/text.mp4": "not a video but text; replace or remove it",
    }
    assert {name: listed[name]["reason"] for name in reasons} == reasons
    assert "train/b/notes.txt" not in listed
    meta = PreparedDataset(run.dir / "prepared").meta
    assert meta["counts"]["train"] == [4, 3]
    assert meta["rejected"] == 3
    pixels, _ = PreparedDataset(run.dir / "prepared").load("train", only=["train/a/short.mp4"])
    assert all(np.array_equal(pixels[0, 2], pixels[0, frame]) for frame in range(3, 8))


def test_a_pipe_is_set_aside_and_a_folder_that_is_gone_stops_the_job(tmp_path):
    folder = two_classes(tmp_path)
    os.mkfifo(folder / "a" / "pipe.mp4")
    data = {"source": "videofolder", "path": str(folder.parent), "frames": 4, "size": 16}
    run = Run(tiny_config(tmp_path / "run", data=data, **NETWORKS))
    assert run.pipeline.validate() == 1
    reasons = pq.read_table(run.dir / "validation.parquet")["reason"].to_pylist()
    assert reasons == ["not a regular file; restore it as a readable file"]
    run = Run(tiny_config(tmp_path / "other", data=data, **NETWORKS))
    plan = ingest.plan(run.config)
    (folder / "b").rename(tmp_path / "away")
    with pytest.raises(Unreachable, match=r"train/b is not there any more; put it back"):
        tasks.ingest(run.pipeline.executor, run.config, plan.on_disk(tmp_path), tmp_path, lambda n: None)


def test_classes_without_clips_are_counted_with_a_reason_and_the_next_action(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_video(tmp_path / "train" / "a" / "x_1_2.mp4", numbered(5))
    rows = [f"{label},{label}{i},1,2,train" for label in ("c", "d") for i in range(2)]
    (tmp_path / "train.csv").write_text(
        "\n".join(["label,youtube_id,time_start,time_end,split", *rows, "a,x,1,2,train"]), encoding="utf-8"
    )
    data = {"source": "kinetics", "path": str(tmp_path), "frames": 4, "size": 16}
    with pytest.raises(
        UserError, match=r"2 of 3 classes have no training sample in .*'c' \(.*no file; download it\).*data\.classes"
    ):
        Run(tiny_config(tmp_path / "run", data=data, **NETWORKS)).stages("ingest")


def test_a_network_for_images_is_refused_before_anything_is_decoded(tmp_path, files):
    run = Run(tiny_config(tmp_path / "run", data={**DATA, "path": str(files)}))
    with pytest.raises(UserError, match=r"'convnet' takes images, the data are clips; take one of convnet3d"):
        run.stages("ingest")
    assert not (run.dir / "prepared").exists()


def test_where_only_val_is_there_it_can_be_distilled(tmp_path, shared_data):
    data = {"source": "kinetics", "path": str(shared_data / "kinetics400"), "frames": 8, "size": 32, "holdout": 0.25}
    with pytest.raises(UserError, match=r"holds no split 'train', only val; .*set data\.train_split"):
        Run(tiny_config(tmp_path / "no", data=data, **NETWORKS)).stages("ingest")
    run = Run(tiny_config(tmp_path / "run", data={**data, "train_split": "val"}, **NETWORKS)).stages("ingest")
    prepared = PreparedDataset(run.dir / "prepared")
    assert prepared.class_names == ["arm wrestling", "bungee jumping"]
    assert prepared.meta["counts"] == {"train": [3, 3], "test": [1, 1]}
    assert prepared.shape == (8, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.xdist_group("more ray")
def test_compiled_proxies_and_scores_of_clips_agree_with_eager_ones(tmp_path, files, clip_run):
    results = []
    for compile in ("always", "never"):
        config = settings(tmp_path / compile, files, score__compile=compile, score__precision="fp32")
        run = Run(config.model_copy(update={"run": config.run.model_copy(update={"reuse": str(clip_run.dir)})}))
        results.append(pq.read_table(run.stages("ingest", "score").dir / "scores.parquet"))
    assert results[0]["sample_id"].equals(results[1]["sample_id"])
    np.testing.assert_allclose(results[0]["score"].to_numpy(), results[1]["score"].to_numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.xdist_group("more ray")
@pytest.mark.usefixtures("ray_session")
def test_ray_prepares_and_distils_the_same_clips(tmp_path, files, clip_run):
    ray = pytest.importorskip("ray")
    from distill_at_scale.cluster.executor import RayExecutor
    from distill_at_scale.pipeline.pipeline import Pipeline

    assert ray.is_initialized()
    config = settings(tmp_path / "run", files, cluster={"actors": 2})

    class Executor(RayExecutor):
        def train(self, group):
            self.session.local = True  # on the actors of the pool, which start faster than Ray Train
            super().train(group)

    Pipeline(config, lambda: Executor(config, lambda text: None), clip_run.pipeline.display).run(
        ("ingest", "score", "select", "distill")
    )
    for name in ("prepared", "scores.parquet", "manifest.parquet"):
        paths = sorted((clip_run.dir / name).rglob("*.*")) if name == "prepared" else [clip_run.dir / name]
        for path in paths:
            assert (tmp_path / "run" / path.relative_to(clip_run.dir)).read_bytes() == path.read_bytes(), path
    assert torch.equal(synthetic_set.load(tmp_path / "run").images, synthetic_set.load(clip_run.dir).images)

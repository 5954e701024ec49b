"""A synthetic set: saved and loaded whole, and exported to layouts that others read."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.synthetic_set import SyntheticSet

NAMES = ["cat", "dog", "owl"]


def a_synthetic_set(names=NAMES, channels=3, ipc=2, snapshots=True, frames=None, side=8):
    """Pixels are whole numbers, so that eight bits hold them exactly; clips where `frames` is given."""
    sizes = (len(names) * ipc, *([frames] if frames else []), channels, side, side)
    pixels = torch.randint(256, sizes, generator=torch.Generator().manual_seed(0)).float()
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.25, 0.3][:channels]
    shape = (channels, 1, 1)
    images = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    card = {
        "class_names": list(names),
        "normalization": {"mean": mean, "std": std},
        "protocol": {"epochs": 3, "augment": "none"},
    }
    shots = {0: pixels[:2].to(torch.uint8), 10: pixels[2:4].to(torch.uint8)} if snapshots else {}
    return SyntheticSet(images, torch.arange(len(names)).repeat_interleave(ipc), card, shots)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    before = a_synthetic_set()
    before.save(tmp_path / "synthetic")
    for folder in (tmp_path / "synthetic", tmp_path, str(tmp_path)):
        after = synthetic_set.load(folder)
        assert torch.equal(after.images, before.images)
        assert torch.equal(after.labels, before.labels)
        assert after.card == before.card
        assert list(after.snapshots) == [0, 10]
        assert torch.equal(after.snapshots[10], before.snapshots[10])


def test_a_set_without_snapshots(tmp_path):
    a_synthetic_set(snapshots=False).save(tmp_path / "s")
    assert synthetic_set.load(tmp_path / "s").snapshots == {}


def test_equal_sets_are_equal_bytes(tmp_path):
    for name in "ab":
        a_synthetic_set().save(tmp_path / name)
    for file in ("synthetic.safetensors", "snapshots.safetensors", "card.json", "preview.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_folder_without_a_set_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="distill-at-scale distill"):
            synthetic_set.load(folder)


@pytest.mark.parametrize("file", ["synthetic.safetensors", "card.json", "snapshots.safetensors"])
def test_a_damaged_set_is_named(tmp_path, file):
    a_synthetic_set().save(tmp_path / "s")
    (tmp_path / "s" / file).write_bytes((tmp_path / "s" / file).read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        synthetic_set.load(tmp_path / "s")


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_undo_the_normalisation_and_are_clipped(channels):
    synthetic = a_synthetic_set(channels=channels)
    pixels = torch.randint(256, (6, channels, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(synthetic.pixels(), pixels)
    synthetic.images[0], synthetic.images[1] = 100, -100
    assert synthetic.pixels()[:2, 0, 0, 0].tolist() == [255, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_folder_is_read_by_torchvision_and_by_our_own_source(tmp_path, channels):
    synthetic = a_synthetic_set(channels=channels)
    synthetic.export_imagefolder(tmp_path / "out")
    theirs = ImageFolder(str(tmp_path / "out"))
    assert theirs.classes == NAMES
    assert [label for _, label in theirs.samples] == synthetic.labels.tolist()
    ours = SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(tmp_path / "out")))
    decoder = ImageDecoder(8, channels)
    pixels = np.stack([decoder(raw) for raw in ours.read(ours.listing("train"))])
    assert np.array_equal(pixels, synthetic.pixels().numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_parquet_file_is_read_by_our_own_source(tmp_path, channels):
    synthetic = a_synthetic_set(channels=channels)
    synthetic.export_parquet(tmp_path / "out" / "train-00000.parquet")
    source = SOURCES["parquet"](DataSection(source="parquet", path=str(tmp_path / "out")))
    assert source.class_names == NAMES
    rows = source.listing("train")
    assert rows["label"].to_pylist() == synthetic.labels.tolist()
    assert np.array_equal(
        np.stack([ImageDecoder(8, channels)(raw) for raw in source.read(rows)]), synthetic.pixels().numpy()
    )


def test_the_parquet_file_has_the_layout_that_hugging_face_writes(tmp_path):
    a_synthetic_set().export_parquet(tmp_path / "x.parquet")
    schema = pq.read_schema(tmp_path / "x.parquet")
    assert [str(schema.field(k).type) for k in ("image", "label")] == ["struct<bytes: binary, path: string>", "int64"]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}


def test_the_plain_file_loads_without_pickled_code(tmp_path):
    synthetic = a_synthetic_set()
    synthetic.export_pt(tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded["images"], synthetic.images)
    assert torch.equal(loaded["labels"], synthetic.labels)
    assert loaded["card"] == synthetic.card


@pytest.mark.parametrize(
    "names", [["a/b", "../up", "/abs"], ["..", ".", ""], ["a\\b", "nul\0", " "], ["n0 tench", "ä", "x" * 50]]
)
def test_no_class_name_leaves_the_folder(tmp_path, names):
    a_synthetic_set(names).export_imagefolder(tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    folders = [p for p in (tmp_path / "deep" / "out").iterdir() if p.is_dir()]
    assert len(folders) == 3
    assert all(len(list(folder.glob("*.png"))) == 2 for folder in folders)


@pytest.mark.parametrize("names", [["a/b", "a_b", "c"], ["a", " a", "c"]])
def test_classes_with_similar_names_are_not_mixed(tmp_path, names):
    a_synthetic_set(names).export_imagefolder(tmp_path / "out")
    folders = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [2, 2, 2]


@pytest.mark.parametrize(("classes", "ipc"), [(3, 1), (12, 1), (3, 5), (2, 30), (150, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_there_is_a_preview_of_any_set(tmp_path, classes, ipc, channels):
    a_synthetic_set([str(k) for k in range(classes)], channels, ipc).save(tmp_path / "s")
    with Image.open(tmp_path / "s" / "preview.png") as picture:
        assert picture.mode == "RGB"
        assert picture.width <= 10 * 66 + 2


@pytest.mark.parametrize(("classes", "ipc", "side"), [(3, 1, 8), (12, 1, 8), (2, 12, 8), (3, 2, 400)])
def test_the_preview_of_clips_moves(tmp_path, classes, ipc, side):
    a_synthetic_set([str(k) for k in range(classes)], 3, ipc, frames=4, side=side).save(tmp_path / "s")
    with Image.open(tmp_path / "s" / "preview.png") as picture:
        assert picture.n_frames == 4
        assert picture.info["loop"] == 0
        assert picture.width * picture.height * 12 <= 2 * synthetic_set.PREVIEW_BYTES


def test_clips_are_loaded_as_they_were_saved(tmp_path):
    before = a_synthetic_set(frames=4)
    for name in "ab":
        before.save(tmp_path / name)
    after = synthetic_set.load(tmp_path / "a")
    assert after.images.shape == (6, 4, 3, 8, 8)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.snapshots[10], before.snapshots[10])
    assert (tmp_path / "a" / "preview.png").read_bytes() == (tmp_path / "b" / "preview.png").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_of_each_clip_are_in_their_own_folder(tmp_path, channels):
    synthetic = a_synthetic_set(channels=channels, frames=4)
    synthetic.export_imagefolder(tmp_path / "out")
    clips = sorted(p for p in (tmp_path / "out").glob("*/*") if p.is_dir())
    names = [f"{NAMES[label]}/{i:05d}" for i, label in enumerate(synthetic.labels.tolist())]
    assert [p.relative_to(tmp_path / "out").as_posix() for p in clips] == sorted(names)
    for i, name in enumerate(names):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == [f"{t:05d}.png" for t in range(4)]
        read = np.stack([np.atleast_3d(np.asarray(Image.open(file))).transpose(2, 0, 1) for file in files])
        assert np.array_equal(read, synthetic.pixels()[i].numpy())


def decoded(path):
    """uint8 [T, H, W, 3] as a reader sees a video file, and the file's frame rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 33])
def test_exported_videos_hold_every_frame_and_every_pixels_own_colour(tmp_path, channels, side):
    synthetic = a_synthetic_set(names=["cat", "dog"], ipc=1, channels=channels, frames=5, side=side)
    synthetic.export_videofolder(tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.mp4")) == [
        "cat/00000.mp4", "dog/00001.mp4"
    ]  # fmt: skip
    for clip, name in zip(synthetic.pixels().numpy(), ("cat/00000.mp4", "dog/00001.mp4"), strict=True):
        frames, rate = decoded(tmp_path / "out" / name)
        assert frames.shape == (5, 2 * side, 2 * side, 3)
        assert rate == 8
        exact = np.broadcast_to(clip, (5, 3, side, side)).transpose(0, 2, 3, 1).astype(int)
        assert np.abs(frames[:, ::2, ::2] - exact).max() <= 16  # noise: the hardest there is


def test_the_card_of_exported_videos_says_that_they_are_lossy(tmp_path):
    synthetic = a_synthetic_set(frames=3)
    synthetic.export_videofolder(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text(encoding="utf-8"))
    assert card["class_names"] == NAMES
    assert (card["export"]["lossy"], card["export"]["enlarged"], card["export"]["frames_per_second"]) == (True, 2, 8)
    with pytest.raises(UserError, match="not empty; export to a new folder"):
        synthetic.export_videofolder(tmp_path / "out")


def test_equal_clips_are_equal_videos(tmp_path):
    for name in "ab":
        a_synthetic_set(frames=3).export_videofolder(tmp_path / name)
    assert (tmp_path / "a/cat/00000.mp4").read_bytes() == (tmp_path / "b/cat/00000.mp4").read_bytes()


def test_images_are_not_exported_as_videos(tmp_path):
    with pytest.raises(UserError, match=r"images, not clips; use export_imagefolder"):
        a_synthetic_set().export_videofolder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_an_encoder_the_export_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(UserError, match=r"no libx264, .*install the wheel of"):
        a_synthetic_set(frames=3).export_videofolder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_parquet_file_of_clips_holds_lists_of_images(tmp_path, channels):
    synthetic = a_synthetic_set(channels=channels, frames=4)
    synthetic.export_parquet(tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    kind = table.schema.field("frames").type
    assert [(field.name, str(field.type)) for field in kind.value_type] == [("bytes", "binary"), ("path", "string")]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["frames"] == {"feature": {"_type": "Image"}, "_type": "Sequence"}
    assert features["label"]["names"] == NAMES
    assert table["label"].to_pylist() == synthetic.labels.tolist()
    for row, clip in zip(table["frames"].to_pylist(), synthetic.pixels().numpy(), strict=True):
        pictures = [np.atleast_3d(np.asarray(Image.open(io.BytesIO(frame["bytes"])))) for frame in row]
        assert np.array_equal(np.stack(pictures).transpose(0, 3, 1, 2), clip)
    assert table["frames"][1].as_py()[2]["path"] == "00001/00002.png"


def test_the_plain_file_holds_clips(tmp_path):
    synthetic = a_synthetic_set(frames=4)
    synthetic.export_pt(tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["images"], synthetic.images)


def test_a_finished_run_carries_its_fingerprints(digits_run):
    card = synthetic_set.load(digits_run.dir).card
    assert set(card["fingerprints"]) == {"distill", "ingest", "score", "select"}
    assert card["fingerprints"]["distill"] == digits_run.pipeline.dir.record("distill")["fingerprint"]

"""The command init: which layout data have, and a configuration whose forecast fits a budget."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from PIL import Image
from rich.console import Console
from videos import write_video

from distill_at_scale import cli
from distill_at_scale.config.load import load
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.inspection.inspect import Inspection, inspect
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.pipeline.planning import starter, starter_config, starter_file


def jpeg(seed: int = 0, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def folders(root: Path, splits=("train", "val"), classes=("cat", "dog"), count: int = 6, **image) -> Path:
    for split in splits:
        for label, name in enumerate(classes):
            for k in range(count):
                path = root / split / name / f"{name}{k}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(10 * label + k, **image))
    return root


def table(root: Path, columns: dict, name: str = "train-00000-of-00001.parquet") -> Path:
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), root / name)
    return root


def shard(path: Path, count: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for k in range(count):
            for ending, content in (("jpg", jpeg(k)), ("cls", str(k % 2).encode())):
                info = tarfile.TarInfo(f"{k:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def inspected(path: Path, source: str | None = None) -> Inspection:
    return inspect(str(path), source, 0)


def refused(path: Path, source: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        inspected(path, source)
    return str(error.value)


def test_class_folders(tmp_path):
    found = inspected(folders(tmp_path))
    assert found.data["source"] == "imagefolder"
    assert not found.held_out
    assert found.counts == [6, 6]
    assert found.look.count == 24
    assert set(found.look.sizes) == {(20, 12)}
    assert not found.look.square
    assert "JPEG, 20 × 12 pixels, colour, none broken" in found.lines()[-1]


def test_a_test_split_is_held_out_where_there_is_none(tmp_path):
    found = inspected(folders(tmp_path, splits=("",), count=5))
    assert found.held_out
    assert found.data["holdout"] == 0.2
    assert found.counts == [4, 4]


def test_the_training_folder_alone_names_the_folder_above(tmp_path):
    lines = inspected(folders(tmp_path) / "train").lines()
    assert any(f"{tmp_path} also holds val/" in line for line in lines)


def test_broken_and_grey_samples_are_counted(tmp_path):
    folders(tmp_path, mode="L")
    (tmp_path / "train" / "cat" / "cat0.jpg").write_bytes(b"no image")
    found = inspected(tmp_path)
    assert found.look.all_grey
    assert [name for name, _ in found.look.broken] == ["train/cat/cat0.jpg"]
    assert "1 broken (train/cat/cat0.jpg: " in found.lines()[-1]


def test_data_of_which_no_sample_can_be_used_get_no_configuration(tmp_path, monkeypatch, capsys):
    folders(tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--data", "photos"]) == 2
    assert re.search(r"none of 24 samples can be used, for example .*: empty file", capsys.readouterr().err)
    assert not list(tmp_path.glob("*.yaml"))


def test_a_run_folder_is_no_data_and_a_folder_no_file_to_write(digits_run, tmp_path, capsys):
    assert cli.main(["init", "--data", str(digits_run.dir), "--out", str(tmp_path / "x.yaml")]) == 2
    assert "is a run folder, not data" in capsys.readouterr().err
    assert cli.main(["init", "--data", str(tmp_path), "--out", str(tmp_path), "--force"]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_an_error(tmp_path, monkeypatch, capsys):
    folders(tmp_path / "a\udcff")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--data", "a\udcff"]) == 2
    assert "the name is not UTF-8" in capsys.readouterr().err


def test_wordnet_folders_with_a_flat_val_are_imagenet(tmp_path):
    folders(tmp_path, splits=("train",), classes=("n01440764", "n02102040"))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02102040 1 2 3 4\n", encoding="utf-8"
    )
    found = inspected(tmp_path)
    assert found.data["source"] == "imagenet"
    assert "imagefolder" in found.others
    assert found.plan.listings["test"]["label"].to_pylist() == [1]


def test_parquet_columns_with_other_names(tmp_path):
    rows = [{"bytes": jpeg(k), "path": None} for k in range(12)]
    table(tmp_path / "set", {"img": rows, "fine_label": [k % 3 for k in range(12)]})
    found = inspected(tmp_path / "set")
    assert found.data["source"] == "parquet"
    assert (found.data["image_column"], found.data["label_column"]) == ("img", "fine_label")
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    assert inspected(file).data["path"] == str(tmp_path / "set")


def test_arrays_in_parquet(tmp_path):
    values = [np.full((1, 8), k, np.float32).tolist() for k in range(10)]
    found = inspected(table(tmp_path / "set", {"values": values, "label": [k % 2 for k in range(10)]}))
    assert found.data["source"] == "tensors"
    assert found.kind == "tensors"
    assert found.look.shape == (1, 8)


def test_shards_as_a_folder_and_as_a_pattern(tmp_path):
    shard(tmp_path / "train-0.tar")
    shard(tmp_path / "test-0.tar")
    found = inspected(tmp_path)
    assert found.data["source"] == "webdataset"
    assert found.plan.samples == 16
    assert inspected(tmp_path / "train-{0..0}.tar").plan.samples == 8


def test_video_folders(tmp_path):
    for name in ("run", "walk"):
        (tmp_path / name).mkdir()
        for k in range(3):
            write_video(tmp_path / name / f"{k}.mp4", np.full((12, 16, 16, 3), 40 * k, np.uint8))
    found = inspected(tmp_path)
    assert found.data["source"] == "videofolder"
    assert found.kind == "clips"
    assert found.data["frames"] == 8
    assert found.look.frames == [12] * 6
    assert not found.look.broken


def test_what_is_no_data_set_is_said(tmp_path):
    folders(tmp_path / "a" / "pets")
    table(tmp_path / "a" / "tables", {"image": [jpeg()], "label": [0]})
    both = refused(tmp_path / "a")
    assert "several data sets" in both
    assert f"did you mean {tmp_path}/a/pets or {tmp_path}/a/tables?" in both
    above = refused(folders(tmp_path / "deep" / "ILSVRC" / "Data").parents[1])
    assert "is above the root" in above
    assert f"did you mean {tmp_path}/deep/ILSVRC/Data?" in above
    flat = refused(folders(tmp_path / "flat") / "train" / "cat")
    assert "6 .jpg" in flat
    assert "in no class folders" in flat
    assert f"did you mean {tmp_path}/flat?" in refused(tmp_path / "flatt")
    for name, content in (
        ("x.zip", "Unpack the archives"),
        ("x.npy", "columns values (list<float32>"),
        ("x.doc", "source of your own"),
    ):
        (tmp_path / name[2:]).mkdir()
        (tmp_path / name[2:] / name).write_bytes(b"x")
        assert content in refused(tmp_path / name[2:])
    (tmp_path / "empty").mkdir()
    assert "holds no files" in refused(tmp_path / "empty")


def test_splits_within_classes_are_to_be_turned_around(tmp_path):
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (tmp_path / name / split).mkdir(parents=True)
            (tmp_path / name / split / "0.jpg").write_bytes(jpeg())
    assert "turn the order around: test/cat/…" in refused(tmp_path)


def sounds(root: Path, names, seconds: float = 0.4) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.sin(np.arange(round(8000 * seconds)) / 3), 8000)
    return root


def test_class_folders_of_sounds(tmp_path):
    sounds(tmp_path, [f"train/{name}/{k}.wav" for name in ("cat", "dog") for k in range(6)])
    inspection = inspected(tmp_path)
    assert inspection.why == "train/ has 2 folders with sounds"
    found = {key: inspection.data[key] for key in ("source", "rate", "seconds", "bands")}
    assert found == {"source": "audiofolder", "rate": 8000, "seconds": 0.4, "bands": 32}
    config = starter_config._base(inspection, "dm", 1, "x", starter_config.this_machine(tmp_path))
    assert (config.distill.network, config.distill.dm.augment) == ("convnet", "none")


@pytest.mark.parametrize(
    ("names", "classes", "why"),
    [
        ([f"recordings/{d}_{who}_{k}.wav" for d in range(3) for who in ("ann", "bo") for k in range(4)], list("012"),
         "part 1 has 3 values (0, 1, 2, …); part 2 has 2 values (ann, bo, …); part 3 has 4 values (0, 1, 2, …)"),
        ([f"03-01-{feeling}-{k}.wav" for feeling in ("05", "06") for k in range(4)], ["05", "06"], "part 3 has 2 values"),
        ([f"{k:03d}_{name}.wav" for k, name in enumerate(["cat", "dog"] * 4)], ["cat", "dog"], "part 2 has 2 values"),
    ],
)  # fmt: skip
def test_sounds_with_the_class_in_their_names(tmp_path, names, classes, why):
    inspection = inspected(sounds(tmp_path, names))
    assert inspection.plan.class_names == classes
    assert why in inspection.why
    assert inspection.plan.samples == len(names)


def test_sounds_without_classes(tmp_path):
    message = refused(sounds(tmp_path, [f"take {k}.wav" for k in range(4)]))
    assert "The sounds lie in no class folders" in message
    assert "data.label_pattern" in message


def test_a_source_by_name(tmp_path):
    folders(tmp_path)
    assert "did you mean imagefolder?" in refused(tmp_path, "imagefoldr")
    assert inspected(tmp_path, "imagefolder").why == "as --source says"


@pytest.mark.parametrize(("text", "seconds"), [("10min", 600), ("90s", 90), ("1h30min", 5400), ("1.5 h", 5400)])
def test_budgets(text, seconds):
    assert starter.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["10", "fast", "5s", "10min later", ""])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match="--budget"):
        starter.parse_budget(text)


def test_the_methods_are_those_of_the_registry():
    assert starter.known_methods() == list(METHODS)


def test_keep_rates():
    assert starter_config.keep_rate("images", 1, [5000] * 10) == 0.02
    assert starter_config.keep_rate("images", 1, [200] * 10) == 0.05  # ten samples per class
    assert starter_config.keep_rate("images", 10, [5000] * 10) == 1.0  # pruning by loss costs accuracy there
    assert starter_config.keep_rate("images", 1, [8, 5000]) == 1.0


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(starter_config, "MEASURE", 0.01)
    monkeypatch.setattr(starter_config, "WIDTHS", (16,))
    monkeypatch.setattr(starter_config, "AFFORDABLE", 0.0)
    every = starter_config.rungs
    monkeypatch.setattr(starter_config, "rungs", lambda *arguments: [[*every(*arguments)][place] for place in (0, -1)])


@pytest.fixture
def said():
    lines = io.StringIO()
    return lines, Display(Console(file=lines, width=300, highlight=False))


def test_the_configuration_loads_and_names_the_next_commands(tmp_path, quick, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "pets", size=(48, 32))
    lines, display = said
    file = starter.init(str(tmp_path / "pets"), display, budget="60s")
    config, text = load(file), file.read_text(encoding="utf-8")
    assert (config.data.source, config.data.path) == ("imagefolder", str(tmp_path / "pets"))
    assert (config.data.size, config.data.resize, config.distill.method, config.distill.ipc) == (32, "crop", "dm", 1)
    assert text.startswith("# yaml-language-server: $schema=")
    assert "published: 20,000 (distill about" in text
    assert all(f"distill-at-scale {command} {file}" in lines.getvalue() for command in ("validate", "plan", "run"))


@pytest.mark.parametrize("most", [2, 6])
def test_a_budget_that_is_too_small_is_said_and_the_file_written(tmp_path, quick, said, monkeypatch, most):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "pets", classes=tuple("abcdef"))
    monkeypatch.setattr(starter_config, "FEWER_CLASSES", (most,))
    monkeypatch.setattr(starter_config.Estimator, "least", lambda *_: 1e9)
    monkeypatch.setattr(starter_config, "USED", 1e-9)
    lines, display = said
    config = load(starter.init(str(tmp_path / "pets"), display, budget="10s"))
    assert config.data.classes == (["a", "b"] if most == 2 else None)  # only fewer classes than there are
    assert config.distill.width == 16
    monkeypatch.setattr(starter_config.Starter, "fits", False)
    starter.init(str(tmp_path / "pets"), display, budget="10s", force=True)
    assert "does not fit the budget of 10.0 s: the smallest settings take" in lines.getvalue()


@pytest.mark.parametrize("method", ["dc", "mtt", "rded", "pca"])
def test_other_methods_have_settings_that_load(tmp_path, method):
    folders(tmp_path, size=(16, 16))
    inspection = inspected(tmp_path)
    base = starter_config._base(inspection, method, 1, "x", starter_config.this_machine(tmp_path))
    smallest = list(starter_config.rungs(base, "images", 6))[-1]
    config = starter_config.with_overrides(base, smallest.values)
    assert config.distill.width == 16
    assert config.evaluate.seeds == 2


def test_the_rendered_text_says_what_was_chosen(tmp_path):
    folders(tmp_path, size=(16, 16))
    inspection = inspected(tmp_path)
    base = starter_config._base(inspection, "dc", 10, "x #1: y", starter_config.this_machine(tmp_path))
    small = starter_config.with_overrides(base, {"distill.steps": 50, "distill.dc.real_batch": 64})
    chosen = starter_config.Starter(small, inspection, 600, [], base, [], 2, 0, 2)
    text = starter_file.render(chosen, str(tmp_path), "10min")
    values = yaml.safe_load(text)
    assert values["distill"]["dc"] == {"real_batch": 64}
    assert values["distill"]["steps"] == 50
    assert values["run"]["dir"] == "runs/x #1: y"
    assert values["score"]["criterion"] == "random"
    assert max(len(line) for line in text.splitlines() if not line.startswith("#")) <= 200


def test_wrong_options_and_existing_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "pets")
    (tmp_path / "pets_dm_ipc1.yaml").write_text("mine", encoding="utf-8")
    for options, message in (
        ([], "pets_dm_ipc1.yaml exists; choose another file with --out, or overwrite it with --force"),
        (["--method", "dmm"], "the method is unknown; did you mean dm?"),
        (["--ipc", "0"], "give 1 or more"),
        (["--budget", "10"], "write a time such as 10min"),
        (["--out", "nowhere/x.yaml"], "the folder nowhere does not exist"),
    ):
        assert cli.main(["init", "--data", "pets", *options]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "pets_dm_ipc1.yaml").read_text(encoding="utf-8") == "mine"

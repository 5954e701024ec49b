"""`distill-at-scale export`: the synthetic set of a finished run, by its configuration or by its folder."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from distill_at_scale.cli import main
from distill_at_scale.distillation import synthetic_set


@pytest.fixture(params=["the configuration", "the run folder"])
def named(request, digits_run, tmp_path) -> str:
    if request.param == "the run folder":
        return str(digits_run.dir)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(digits_run.pipeline.config.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def test_the_set_is_written_in_every_format_with_a_line_on_its_use(digits_run, named, tmp_path, capsys):
    out = tmp_path / "out"
    formats = [
        "--imagefolder",
        "png",
        "--parquet",
        "hf",
        "--parquet",
        "one.parquet",
        "--pt",
        "s.pt",
        "--kept",
        "kept.csv",
    ]
    arguments = [text if text.startswith("--") else str(out / text) for text in formats]
    assert main(["export", named, *arguments]) == 0
    said, s = capsys.readouterr().out, synthetic_set.load(digits_run.dir)
    assert torch.equal(torch.load(out / "s.pt", weights_only=True)["images"], s.images)
    assert pq.read_table(out / "one.parquet").equals(pq.read_table(out / "hf" / "train-00000-of-00001.parquet"))
    assert (out / "png" / "card.json").is_file()
    assert (out / "kept.csv").is_file()
    text = "".join(said.split())  # the terminal wraps lines
    count = f"{len(s)}imagesof{len(s.class_names)}classes"
    for name, use in (("png", "torchvision.datasets.ImageFolder("), ("hf", "datasets.load_dataset("),
                      ("one.parquet", "datasets.load_dataset('parquet',"), ("s.pt", "torch.load(")):  # fmt: skip
        assert f"{out / name}:{count}use:{use}" in text


def test_what_cannot_be_written_is_one_error(named, tmp_path, capsys):
    assert main(["export", named, "--videofolder", str(tmp_path / "v")]) == 2
    assert "images, not clips" in " ".join(capsys.readouterr().err.split())
    assert main(["export", named]) == 2
    assert "add --imagefolder DIR, --videofolder DIR, --parquet DIR, --pt FILE" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("option", "target", "message"),
    [
        ("--pt", "scores.parquet", "belongs to the run folder"),
        ("--kept", "manifest.parquet", "belongs to the run folder"),
        ("--imagefolder", "synthetic/new", "belongs to the run folder"),
        ("--imagefolder", ".", "belongs to the run folder"),
        ("--pt", "tensorboard", "is a folder; name a file"),
    ],
)
def test_an_export_never_replaces_the_runs_own_files(digits_run, capsys, option, target, message):
    before = {path: path.stat().st_mtime_ns for path in digits_run.dir.rglob("*")}
    assert main(["export", str(digits_run.dir), option, str(digits_run.dir / target)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert {path: path.stat().st_mtime_ns for path in digits_run.dir.rglob("*")} == before


def test_an_empty_target_is_one_error(digits_run, capsys):
    assert main(["export", str(digits_run.dir), "--pt", ""]) == 2
    assert ". is a folder; name a file to write" in capsys.readouterr().err


def test_a_folder_without_a_run_and_a_run_without_a_set_say_what_to_do(make_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / "empty"), "--pt", str(tmp_path / "x.pt")]) == 2
    assert "a folder without a run.json; give a YAML file or a run folder" in " ".join(capsys.readouterr().err.split())
    run = make_run(tmp_path / "run").stages("ingest")
    assert main(["export", str(run.dir), "--pt", str(tmp_path / "x.pt")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"no output of distill yet; run this first: distill-at-scale distill {run.dir}" in told
    (run.dir / "run.json").write_text("{}", encoding="utf-8")
    assert main(["export", str(run.dir), "--pt", str(tmp_path / "x.pt")]) == 2
    assert "is damaged ('config'); give the YAML file of the run" in " ".join(capsys.readouterr().err.split())

"""The report: offline, safe against names that users chose, whole without its optional parts.

One tiny run on the digits is shared; the tests change copies of its artefacts.
"""

from __future__ import annotations

import base64
import html as html_text
import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from distill_at_scale.config.load import validate
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.summary import summarize
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report import run_plots, run_report
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.run_dir import RunDir

CONFIG = {
    "data": {"source": "digits", "size": 8, "channels": 1, "holdout": 0.25},
    "score": {"trials": 1, "epochs": 1, "width": 8, "batch": 64},
    "select": {"keep": 0.5},
    "distill": {"steps": 3, "width": 8, "evaluate_every": 2},
    "evaluate": {"seeds": 2, "epochs": 1, "bounds": ["kept"], "bound_epochs": 1},
    "cluster": {"address": "none"},
}


def config_in(folder):
    return validate({**CONFIG, "run": {"dir": str(folder)}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    Pipeline(config_in(folder), LocalExecutor, Display(Console(quiet=True))).run()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return RunDir(shutil.copytree(finished, tmp_path / "run"))


def page(run):
    return run_report.write(run, config_in(run.path)).read_text(encoding="utf-8")


def edit(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def set_aside(run, rows):
    columns = zip(*rows, strict=True)
    table = pa.table(dict(zip(("sample_id", "reason", "used"), map(list, columns), strict=True)))
    pq.write_table(table.append_column("location", pa.array([""] * len(rows))), run / "rejected.parquet")


def test_opens_offline(run):
    text = page(run)
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)
    sources = re.findall(r'src="([^"]{0,40})', text)
    assert len(sources) > 100
    assert all(source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in text


def test_has_every_part(run):
    text = page(run)
    parts = ("Accuracy", "What pruning changed", "Accuracy per class", "The synthetic images", "Use this set",
             "Where the time went", "During distillation", "Distillation", "Kept training samples",
             "The easiest and the hardest", "Data", "How to repeat it")  # fmt: skip
    assert re.findall("<h2>([^<]*)</h2>", text) == [*parts[:9], "The easiest and the hardest real samples", *parts[10:]]
    assert "Do 10 synthetic images (1 per class), distilled from 50.1\u00a0% of the training set, train" in text
    assert "All kept samples" in text
    assert "score: train the proxies" in text
    assert "min_per_class: 1\n" in text  # resolved, where the configuration leaves it open


def test_the_controls_and_their_differences_are_shown(run):
    assert "Not measured. With <code>evaluate.controls" in page(run)
    row = {"network": "convnet", "top5": 1.0, "per_class": [0.5] * 10, "seconds": 2.0}

    def add_controls(evaluation):
        for name, values in {"distilled": (0.6, 0.62), "unpruned": (0.4, 0.43), "random_keep": (0.6, 0.61)}.items():
            evaluation["rows"] = [line for line in evaluation["rows"] if line["set"] != name]
            evaluation["rows"] += [row | {"set": name, "seed": k, "top1": value} for k, value in enumerate(values)]
        evaluation["summary"] = summarize(evaluation["rows"])
        evaluation["controls"] = {name: {"kept": 500, "of": 1346, "steps": 3, "seconds": 4.0} for name in
                                  ("unpruned", "random_keep")}  # fmt: skip

    edit(run / "evaluation.json", add_controls)
    text = page(run)
    assert "Not measured" not in text
    assert text.index("Pruning changed top-1 by +19.5 points") < text.index("<h2>Accuracy per class")
    assert text.count("Distilled without pruning</td>") == 1
    assert "all samples, no runtime pruning" in text
    assert text.count("One distillation only") == 2


def test_a_run_that_prunes_nothing_says_so(run):
    table, facts = manifest.read(run / "manifest.parquet")
    everything = table.set_column(4, "kept", pa.array([True] * len(table)))
    manifest.write(run / "manifest.parquet", everything, facts)
    assert "The run prunes nothing" in page(run)


def test_many_classes_show_the_worst_and_the_best():
    values = [label / 100 for label in range(50)]
    line = {"network": "convnet", "n": 2, "per_class": values, "set": "distilled"}
    shown = run_report._per_class([line], [f"c{label}" for label in range(50)])
    assert (shown["ends"][0][0], shown["ends"][1][0], shown["all"], shown["classes"]) == ("c0", "c49", False, 50)
    names = re.findall(">(c[0-9]+)<", base64.b64decode(shown["chart"]["wide"].partition(",")[2]).decode())
    assert names == [f"c{label}" for label in (*range(10), *range(40, 50))]


def test_warnings_of_the_set_are_shown(run):
    edit(run / "synthetic" / "card.json", lambda card: card.update(warnings=["the loss was <0> at every logged step"]))
    assert '<p class="warning">The loss was &lt;0&gt; at every logged step.</p>' in page(run)


def test_the_script_of_the_page_runs(run):
    script = html_text.unescape(re.search(r"<h2>Use this set</h2>.*?<pre>(.*?)</pre>", page(run), re.DOTALL)[1])
    assert f"das.load({str(run.path)!r})" in script
    names: dict = {}
    exec(script, names)
    assert names["network"](names["s"].images).shape == (10, 10)
    assert float(names["loss"].detach()) < 0.5  # it has learned the ten images
    edit(run / "synthetic" / "card.json", lambda card: card.pop("resize"))  # of an early version
    assert "s.test_transform(resize=&#39;square&#39;)" in page(run)


def test_same_run_same_bytes(run):
    assert page(run) == page(run)


def test_a_class_name_is_text(run):
    name = "<b>x</b> & $y$"

    def rename(meta):
        meta["class_names"][0] = name

    edit(run / "prepared" / "dataset.json", rename)
    edit(run / "synthetic" / "card.json", rename)
    text = page(run)
    assert "<b>x" not in text
    assert "&lt;b&gt;x&lt;/b&gt; &amp; $y$" in text
    charts = [base64.b64decode(c).decode() for c in re.findall(r"image/svg\+xml;base64,([^\"]+)", text)]
    assert any("&lt;b&gt;x&lt;/b&gt; &amp; $y$" in chart for chart in charts)


def test_missing_optional_parts_are_left_out(run):
    for name in ("metrics.jsonl", "evaluation.json", "manifest.parquet", "scores.parquet", "run.json",
                 "synthetic/snapshots.safetensors", "rejected.parquet"):  # fmt: skip
        (run / name).unlink()
    text = page(run)
    assert "Not evaluated:" in text
    assert "<h2>Distillation" not in text
    assert "The synthetic images" in text


def test_a_repeated_step_counts_as_done_last(tmp_path):
    lines = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)]
    log = "".join(json.dumps({"stage": "distill", "step": step, "loss": loss}) + "\n" for step, loss in lines)
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        log + '{"stage": "distill", "step": 2, "top1": 0.5}\n{"stage": "other", "loss": 1}\n{"stage": "dis',
        encoding="utf-8",
    )
    assert run_report.distillation_log(path) == ([(1, 9.0), (2, 6.0)], [(2, 50.0)])


def test_rejected_samples_are_counted_and_named(run):
    set_aside(run, [(f"broken/{i}.png", "cannot be <decoded>", False) for i in range(4)])
    text = page(run)
    assert "<dt>Rejected samples</dt><dd>4</dd>" in text
    assert text.count("cannot be &lt;decoded&gt;") == 4
    assert "Used, with a remark" not in text


def test_many_rejected_samples_are_grouped_by_kind_of_reason(run):
    large = [(f"large/{i}.mp4", f"{i + 5},000 bytes, more than data.max_bytes = 1,000", False) for i in range(30)]
    set_aside(run, [("no/label.mp4", "it has no label in 'train.csv'", False), *large])
    rejected = run_report._rejected(run / "rejected.parquet")["rejected"]
    assert [(row["count"], row["sample_id"]) for row in rejected["rows"]] == [(30, "large/0.mp4"), (1, "no/label.mp4")]
    assert "<h3>Rejected: 31 samples</h3>" in page(run)


def test_more_kinds_than_fit_are_counted(run):
    set_aside(run, [(f"{i}.mp4", f"reason {'x' * i}", False) for i in range(run_report.KINDS + 3)])
    assert run_report._rejected(run / "rejected.parquet")["rejected"]["more"] == 3
    assert "And 3 more kinds" in page(run)


def test_samples_used_with_a_remark_are_a_list_of_their_own(run):
    short = [(f"short/{i}.mp4", f"{i} frames, fewer than 8: the last one repeats", True) for i in range(3)]
    set_aside(run, [("broken.mp4", "no video in it", False), *short])
    text = page(run)
    assert "<dt>Rejected samples</dt><dd>1</dd>" in text
    assert "<dt>Used with a remark</dt><dd>3</dd>" in text
    rejected, remarked = (
        text.index("<h3>Rejected: 1 sample</h3>"),
        text.index("<h3>Used, with a remark: 3 samples</h3>"),
    )
    assert (
        rejected < text.index("no video in it") < remarked < text.index("2 frames, fewer than 8: the last one repeats")
    )


def test_a_reused_stage_is_marked(run):
    edit(run / "stages" / "score.json", lambda record: record.update(reused_from="/elsewhere/run"))
    assert page(run).count("reused from <code>/elsewhere/run</code>") == 2


def test_random_selection_is_called_the_control(run):
    table = pq.read_table(run / "manifest.parquet")
    facts = json.loads(table.schema.metadata[b"selection"]) | {"criterion": "random"}
    pq.write_table(table.replace_schema_metadata({"selection": json.dumps(facts)}), run / "manifest.parquet")
    assert "<b>control</b>" in page(run)


def test_easiest_and_hardest_are_the_ends_of_the_scores(run):
    prepared = PreparedDataset(run / "prepared")
    labels, scores, _ = run_report._scores(run)
    first = run_report._samples(run, prepared)["rows"][0]
    pixels, targets = prepared.load("train", labels={0})
    assert (targets == 0).all()
    hardest = pixels[np.argsort(scores[labels == 0], kind="stable")[-1]]
    assert first["high"][-1]["image"] == run_plots.picture(hardest, run_report.SMALL_SIDE)
    assert (first["low"][0]["state"], first["high"][-1]["state"]) == ("kept", "dropped")


def test_one_channel_is_shown_grey_and_large_images_small():
    def opened(shape, limit):
        uri = run_plots.picture(np.full(shape, 100, np.uint8), limit)
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    assert (opened((1, 8, 8), 64).mode, opened((1, 8, 8), 64).size) == ("L", (8, 8))
    assert (opened((3, 128, 128), 64).mode, opened((3, 128, 128), 64).size) == ("RGB", (64, 64))
    assert (opened((4, 3, 128, 128), 64).size, opened((4, 1, 16, 16), 64).size) == ((64, 64), (16, 16))


def test_cut_marks():
    scores, flags = np.array([1.0, 2.0, 3.0, 4.0]), lambda *kept: np.array(kept, bool)
    assert run_plots.cuts(scores, flags(1, 1, 0, 0)) == [2.5]
    assert run_plots.cuts(scores, flags(0, 0, 1, 1)) == [2.5]
    assert run_plots.cuts(scores, flags(0, 1, 1, 0)) == [1.5, 3.5]
    assert run_plots.cuts(scores, flags(1, 0, 1, 0)) == []
    assert run_plots.cuts(scores, flags(1, 1, 1, 1)) == []


def noise_run(folder, classes, shape):
    """A run folder of one noise sample per class, without evaluation and log."""
    run = RunDir(folder)
    names, draw = [f"class {i}" for i in range(classes)], np.random.default_rng(0)
    pixels = draw.integers(0, 256, (classes, *shape), np.uint8)
    tables = (shards.to_table([f"{i:04d}"], [i], pixels[i : i + 1]) for i in range(classes))
    shards.write_shards(run / "prepared" / "train", tables, shards.schema(shape), 64)
    scale = {"mean": [0.5] * shape[-3], "std": [0.25] * shape[-3]}
    meta = {"class_names": names, "shape": shape, "counts": {"train": [1] * classes}, **scale}
    shards.write_meta(run / "prepared", meta, "")
    card = {"class_names": names, "images_per_class": 1, "method": "dc", "steps": 1, "normalization": scale}
    images = torch.from_numpy(pixels).float() / 64 - 2
    shots = {step: torch.from_numpy(pixels[:10].copy()) for step in range(6)}
    synthetic_set.SyntheticSet(images, torch.arange(classes), card, shots).save(run / "synthetic")
    labels, scores = pa.array(range(classes), pa.int32()), draw.random(classes, np.float32)
    columns = {"sample_id": [f"{i:04d}" for i in range(classes)], "label": labels, "score": scores}
    pq.write_table(pa.table(columns), run / "scores.parquet")
    kept = {"rank": pa.array([0] * classes, pa.int32()), "kept": [True] * classes}
    pq.write_table(pa.table(columns | kept), run / "manifest.parquet")
    return run


def test_a_thousand_classes_stay_small(tmp_path):
    text = page(noise_run(tmp_path / "many", 1000, (3, 64, 64)))
    assert len(text) < 5_000_000
    assert "The first 80 of 1000 classes" in text
    assert "The chart shows the first 20 of 1000 classes" in text


def pictures(text, alt):
    """The pictures whose alternative text begins so: (format, frames)."""
    images = re.findall(rf'src="data:image/(?:png|webp);base64,([^"]+)" alt="{alt}', text)
    opened = [Image.open(io.BytesIO(base64.b64decode(content))) for content in images]
    return [(picture.format, getattr(picture, "n_frames", 1)) for picture in opened]


def test_clips_move_and_are_called_clips(tmp_path):
    run = noise_run(tmp_path / "clips", 12, (4, 3, 16, 16))
    text = page(run)
    assert "Do 12 synthetic clips of 4 frames (1 per class), distilled from 100\u00a0% of the training set" in text
    assert "than 12 random real clips?" in text
    assert "with DC, 1 clip of 4 frames per class, 1 steps" in text
    assert "<h2>The synthetic clips</h2>\n<p>4 frames of 3 × 16 × 16 pixels each" in text
    assert "<dt>Frames per clip</dt><dd>4" in text
    assert "<dt>Pixels</dt><dd>3 × 16 × 16</dd>" in text
    assert not re.search(r"\bimages?\b", re.sub(r"<(style|pre)>.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL))
    assert pictures(text, "synthetic clip of class") == [("PNG", 4)] * 12
    assert pictures(text, "clip of class 0 at step") == [("PNG", 4)] * 6
    assert pictures(text, "kept sample with score") == [("WEBP", 4)] * 10
    assert "each clip is reduced to 256 colours" in text
    assert "compressed with loss (WebP)" in text
    assert "http://" not in text
    assert text == page(run)


def test_grey_clips_are_shown_exactly(tmp_path):
    run = noise_run(tmp_path / "clips", 3, (4, 1, 8, 8))
    text = page(run)
    assert pictures(text, "kept sample with score") == [("PNG", 4)] * 3
    assert "For this page" not in text
    shown = re.search(r'src="data:image/png;base64,([^"]+)" alt="synthetic clip of class 1"', text)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(shown)))
    picture.seek(2)
    assert np.array_equal(np.asarray(picture.convert("L")), synthetic_set.load(run.path).pixels()[1, 2, 0].numpy())


def test_a_page_that_would_be_too_heavy_shows_less_and_stills_of_real_clips(tmp_path, monkeypatch):
    run = noise_run(tmp_path / "clips", 12, (4, 3, 16, 16))
    monkeypatch.setattr(run_report, "CLIP_BYTES", 9_000)
    text = page(run)
    assert 0 < len(pictures(text, "synthetic clip of class")) < 12
    assert set(pictures(text, "synthetic clip of class")) == {("PNG", 4)}
    assert "<p>The first clip of the first class over" in text
    assert pictures(text, "clip of class 1 at step") == []
    assert pictures(text, "kept sample with score") == [("PNG", 1)] * 10
    assert "Only the middle frame of each clip is shown" in text


def test_clips_of_the_size_of_kinetics_stay_within_a_few_megabytes(tmp_path):
    text = page(noise_run(tmp_path / "clips", 60, (8, 3, 64, 64)))
    assert len(text) < 4 / 3 * 3 * run_report.CLIP_BYTES + 500_000
    assert re.search(r"The first \d\d of 60 classes", text)


def test_a_network_that_sees_one_frame_is_called_a_control(run):
    def name_it(evaluation):
        for row in evaluation["rows"] + evaluation["summary"]:
            row["network"] = "frame:convnet"

    assert "is a control" not in page(run)
    edit(run / "evaluation.json", name_it)
    text = page(run)
    assert "<b>frame:convnet</b> is a control" in text
    assert "chance is 10\u00a0%" in text


def test_the_report_shows_no_credentials_of_an_address(run):
    secret = "s3://KEYID:hush/hush@bucket"
    data = {"source": "imagenet", "path": secret, "val_labels": f"{secret}/list?secret_key=hush", "classes": [secret]}
    config = validate({**CONFIG, "run": {"dir": str(run.path)}, "data": {**CONFIG["data"], **data}})
    text = pages.as_yaml(run_report._settings({}, {}, config))
    assert "path: s3://bucket\n" in text
    assert "hush" not in text
    paths = (secret, f"{secret}/set/?a=b/c", "data/x?y", "", None)
    assert [last_name(path or "") for path in paths] == ["bucket", "set", "x?y", "", ""]

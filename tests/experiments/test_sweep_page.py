"""The page of a sweep: the answer first, controls in every plot, any swept keys, safe and small."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from sweep_tables import digits, row

from distill_at_scale.config.load import validate
from distill_at_scale.experiments.sweep import analysis, page
from distill_at_scale.experiments.sweep import plots as sweep_plots


def written(folder, rows, **sections):
    config = validate({"data": {"source": "digits"}, **sections})
    return page.write(folder, pa.Table.from_pylist(rows), config).read_text(encoding="utf-8")


def plots(rows):
    configurations = analysis.configurations(rows)
    return sweep_plots.accuracy_plots(configurations, analysis.recommend(analysis.distilled(configurations)))[0]


def test_the_answer_comes_first_with_accuracy_cost_and_both_controls(tmp_path):
    answer = re.search(r'<p class="text">(.*?)</p>', written(tmp_path, digits()), re.DOTALL).group(1)
    for part in (
        "Keep 10\u00a0%",
        "loss",
        "80.0\u00a0±",
        "3\u00a0×\u00a05",
        "unpruned in 10.0\u00a0s",
        "70.0\u00a0±",
        "at random",
    ):
        assert part in answer


def test_the_page_needs_nothing_from_outside(tmp_path):
    text = written(tmp_path, digits())
    assert (tmp_path / "sweep.html").is_file()
    assert "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="([^":]*:?)', text)) == {"data:"}
    assert "<script" not in text


def test_the_keep_rate_is_the_axis_and_controls_are_in_the_plot():
    (plot,) = plots(digits())
    assert [one.name for one in plot.series] == ["loss", "el2n", "random"]
    assert [one.role for one in plot.series] == ["ours", "other", "random"]
    assert list(plot.series[0].x) == [0.01, 0.1, 0.5]
    assert [name.split()[0] for name, _ in plot.levels] == ["unpruned", "random"]
    assert plot.marks == [("recommended: 10\u00a0%", 0.1)]
    assert plot.log_x


def test_every_setting_has_a_plot_with_its_own_controls():
    rows = [r | {"distill.method": m, "mean": r["mean"] - d} for m, d in (("dc", 0), ("dm", 0.1)) for r in digits(1)]
    rows = [r | {"trial": f"{r['trial']}{r['distill.method']}"} for r in rows]
    curves = plots(rows)
    assert [plot.title for plot in curves] == ["dc", "dm"]
    assert [plot.levels[0][1] for plot in curves] == pytest.approx([0.798, 0.698])


def test_a_numeric_key_is_the_axis_where_the_keep_rate_is_not_swept():
    rows = [row(0.5 + i / 100, 0.3, **{"distill.ipc": i}) for i in (1, 10, 50)]
    rows += [row(0.6, control="unpruned", **{"distill.ipc": i}) for i in (1, 10, 50)]
    rows = [{k: v for k, v in r.items() if not k.startswith("select.")} for r in rows]
    (plot,) = plots(rows)
    assert plot.x_label == "ipc (distill.ipc)"
    assert [(one.name, list(one.x)) for one in plot.series] == [("selected", [1, 10, 50]), ("unpruned", [1, 10, 50])]


def test_categories_are_bars_next_to_the_controls_of_their_setting():
    rows = [row(m, 0.3, **{"distill.method": n}) for n, m in (("dc", 0.5), ("dm", 0.6))]
    rows += [row(0.55, control="unpruned", **{"distill.method": n}) for n in ("dc", "dm")]
    rows = [{k: v for k, v in r.items() if k != "select.keep"} for r in rows]
    (plot,) = plots(rows)
    assert [(one.name, one.kind, list(one.x)) for one in plot.series] == [
        ("selected", "bars", ["dc", "dm"]),
        ("unpruned", "bars", ["dc", "dm"]),
    ]


def test_no_plot_has_more_series_than_a_reader_can_distinguish():
    rows = [row(0.5, keep, f"c{i}") for keep in (0.1, 0.5) for i in range(20)] + [row(0.5, control="unpruned")]
    curves = plots(rows)
    assert max(len(plot.series) for plot in curves) <= sweep_plots.MOST_SERIES
    assert sum(len(plot.series) for plot in curves) == 20
    assert all(plot.levels for plot in curves)


def test_a_key_of_pruning_gets_its_own_plots_before_series_are_cut():
    rows = [row(0.5, k, c, **{"runtime.drop": d}) for k in (0.1, 0.5) for c in ("a", "b", "c") for d in (0.0, 0.3, 0.6)]
    assert [plot.title for plot in plots(rows)] == ["drop 0", "drop 0.3", "drop 0.6"]


def test_names_and_errors_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    rows = [row(0.5, 0.1, evil), row(None, 0.2, evil, error=evil), row(0.4, 0.3, evil, stopped=7)]
    text = written(tmp_path, rows)
    assert evil not in text
    assert "&lt;script&gt;" in text


def test_failed_and_stopped_trials_are_listed(tmp_path):
    rows = [*digits(), row(None, 0.2, "loss", error="loss is not finite at step 3"), row(0.4, 0.3, "loss", stopped=7)]
    text = written(tmp_path, rows)
    assert "loss is not finite at step 3" in text
    assert "Failed: 1" in text
    assert "Stopped early: 1" in text


def test_credentials_are_not_shown(tmp_path):
    text = written(tmp_path, digits(), data={"source": "parquet", "path": "s3://key:secret@bucket/set?region=x"})
    assert "secret" not in text
    assert "<h1>set</h1>" in text


def test_a_sweep_without_a_finished_trial_has_a_page(tmp_path):
    assert "no trial has finished" in written(tmp_path, [row(None, 0.2, "loss", error="out of memory")])
    assert "no trial has finished" in written(tmp_path, [])


def test_gpu_time_counts_the_gpus_of_all_workers(tmp_path):
    text = written(tmp_path, digits(), distill={"workers": 2}, cluster={"gpus_per_worker": 0.5, "address": None})
    assert "GPU time saved" in text
    assert "net saved × 1 GPU," in text


def test_the_page_of_five_hundred_trials_is_small(tmp_path):
    rows = [
        row(0.5 + k / 10, k, c, **{"runtime.drop": d, "distill.ipc": i})
        for k in (0.01, 0.03, 0.1, 0.3, 0.5)
        for c in ("a", "b", "c", "d", "e")
        for d in (0.0, 0.2, 0.4, 0.6, 0.8)
        for i in (1, 2, 5, 10)
    ]
    text = written(tmp_path, rows)
    assert len(text.encode()) < 3_000_000
    assert "470 more</summary>" in text


def test_random_real_images_are_not_kept_samples():
    contents = page.contents(digits(), validate({}))
    assert contents["tested"] == "the test split"
    held_out = validate({"select": {"held_out": 0.2}, "evaluate": {"split": "held_out"}})
    assert page.contents(digits(), held_out)["tested"] == "the held-out part of the training split"
    assert {row["kept"] for row in contents["table"] if row["one"].set == "random_real"} == {None}
    assert None not in {row["kept"] for row in contents["table"] if row["one"].set == "distilled"}


def test_trials_in_one_process_never_ran_side_by_side():
    assert not page.contents(digits(), validate({"cluster": {"address": "none"}}))["side_by_side"]

"""What a run folder holds, for Python and for the command `show`: finished, partial, reused, damaged and foreign folders."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run as TinyRun
from conftest import tiny_config
from rich.console import Console

from distill_at_scale import cli
from distill_at_scale.core.errors import UserError
from distill_at_scale.pipeline import run_reader
from distill_at_scale.pipeline.report import show
from distill_at_scale.pipeline.run_reader import open_run


@pytest.fixture(scope="module")
def partial(tmp_path_factory, digits_run):
    """A run that took ingest and score over from another and selected; the rest is missing."""
    folder = tmp_path_factory.mktemp("partial") / "a run"
    return TinyRun(tiny_config(folder, run__reuse=str(digits_run.dir), select__keep=0.5)).stages(
        "ingest", "score", "select"
    )


def test_a_run_has_its_tables_results_and_configuration(digits_run):
    run = open_run(digits_run.dir)
    assert run.config == digits_run.config
    assert run.scores.column_names == ["sample_id", "label", "loss", "score"]
    assert run.scores["sample_id"].equals(run.manifest["sample_id"])
    kept, facts = run.manifest["kept"].to_numpy(), run.stages["select"].facts
    assert (kept.sum(), len(kept)) == (facts["kept"], facts["of"])
    by_set = {result.set: result for result in run.results}
    assert set(by_set) == {"distilled", "random_real"}
    for result in by_set.values():
        assert result.mean == pytest.approx(np.mean(result.values))
        assert result.std == pytest.approx(np.std(result.values, ddof=1))
        assert len(result.values) == result.n == digits_run.config.evaluate.seeds
    assert run.synthetic.images.shape[0] == len(run.synthetic.labels)
    assert len(str(run.results[0]).splitlines()) == 1
    assert open_run(str(digits_run.dir)).address == str(digits_run.dir)


def test_what_has_not_run_is_one_error_with_the_command(partial):
    run = open_run(partial.dir)
    wanted = {
        "results": "evaluate", "synthetic": "distill", "report_path": "report", "plot_loss": "distill",
        "plot_accuracy": "evaluate", "plot_images": "distill",
    }  # fmt: skip
    for name, stage in wanted.items():
        with pytest.raises(UserError) as error:
            getattr(run, name)()  # of a property the error comes first
        assert str(error.value).endswith(f"run `distill-at-scale {stage} '{partial.dir}'`"), name
    assert run.plot_scores().axes, "what is there can be used"


def test_the_command_of_an_error_is_accepted(partial, capsys):
    """The run folder itself is a CONFIG."""
    assert cli.main(["select", str(partial.dir)]) == 0
    assert "select: already done" in capsys.readouterr().out


def test_the_states_of_stages(partial, digits_run, tmp_path):
    states = {stage: state.state for stage, state in open_run(partial.dir).stages.items()}
    assert states == {"ingest": "reused", "score": "reused", "select": "finished", "distill": "missing",
                      "evaluate": "missing", "report": "missing"}  # fmt: skip
    assert open_run(partial.dir).stages["score"].reused_from == str(digits_run.dir)
    copy = tmp_path / "run"
    shutil.copytree(digits_run.dir, copy)
    (copy / "stages" / "score.json").write_text("{", encoding="utf-8")
    shutil.rmtree(copy / "synthetic")
    (copy / ".work" / "report-0123456789abcdef").mkdir(parents=True)
    run = open_run(copy)
    assert (run.stages["score"].state, run.stages["distill"].state) == ("damaged", "damaged")
    assert run.stages["report"].state == "unfinished"
    assert run.open_stages == ["score", "distill", "report"]
    assert "score damaged" in repr(run)


def test_warnings_are_those_of_all_stages(digits_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(digits_run.dir, copy)
    before = open_run(copy).warnings
    record = json.loads((copy / "stages" / "distill.json").read_text(encoding="utf-8"))
    (copy / "stages" / "distill.json").write_text(
        json.dumps({**record, "warnings": ["images equal real ones"]}), encoding="utf-8"
    )
    assert open_run(copy).warnings == [*before, "images equal real ones"]


def test_opening_a_run_and_its_tables_load_neither_torch_nor_ray(digits_run):
    code = f"""
import sys
import tempfile
import distill_at_scale as das
run = das.open_run({str(digits_run.dir)!r})
assert run.scores.num_rows and run.manifest.num_rows and run.results and run.config and run.stages and run.rejected is not None
assert repr(run) and run._repr_html_() and run.warnings is not None
from distill_at_scale import cli
assert cli.main(["show", {str(digits_run.dir)!r}]) == 0
heavy = {{"torch", "ray", "scipy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ([], "is not a run folder"),
        (["stages/readme.txt"], "is not a run folder"),
        (["sweep.parquet", "sweep.html"], "is the folder of a sweep, not of a run"),
        (["studies.html"], "is the folder of a study, not of a run"),
    ],
)
def test_another_folder_is_one_error(tmp_path, files, message):
    folder = tmp_path / "x"
    for name in files or []:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    if files == []:
        folder.mkdir()
    with pytest.raises(UserError, match=message):
        open_run(folder)


def shown(folder) -> str:
    out = io.StringIO()
    show.print_folder(show.describe(folder), Console(width=150, file=out))
    return out.getvalue()


def test_show_prints_stages_results_and_the_next_step(digits_run, partial):
    text = shown(digits_run.dir)
    for result in open_run(digits_run.dir).results:
        assert f"{100 * result.mean:.1f} ± {100 * result.std:.1f}" in text
    assert "method dc" in text
    assert f"next: distill-at-scale run {digits_run.dir}" in text, "the report is missing"
    text = shown(partial.dir)
    assert f"from {digits_run.dir}" in text
    facts = open_run(partial.dir).stages["select"].facts
    assert f"kept {facts['kept']} of {facts['of']}" in text
    assert f"next: distill-at-scale run '{partial.dir}'" in text


def test_show_prints_what_was_rejected_and_warned_of(digits_run, tmp_path):

    copy = tmp_path / "run"
    shutil.copytree(digits_run.dir, copy)
    schema = pq.read_schema(copy / "rejected.parquet")
    row = dict.fromkeys(schema.names) | {"sample_id": "a/[b].png", "reason": "it is empty", "used": False}
    pq.write_table(pa.Table.from_pylist([row], schema), copy / "rejected.parquet")
    ingest = json.loads((copy / "stages" / "ingest.json").read_text(encoding="utf-8"))
    ingest["outputs"]["rejected.parquet"]["bytes"] = (copy / "rejected.parquet").stat().st_size
    distill = json.loads((copy / "stages" / "distill.json").read_text(encoding="utf-8"))
    for record in (ingest, {**distill, "warnings": ["images equal [real] ones"]}):
        (copy / "stages" / f"{record['stage']}.json").write_text(json.dumps(record), encoding="utf-8")
    text = shown(copy)
    assert f"rejected samples: 1, listed in {copy / 'rejected.parquet'}" in text
    assert "a/[b].png: it is empty" in text
    assert "warning: images equal [real] ones" in text


def test_show_as_json_has_the_same(digits_run, capsys):
    assert cli.main(["show", str(digits_run.dir), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == json.loads(json.dumps(show.describe(digits_run.dir)))
    assert described["kind"] == "run"
    assert [row["stage"] for row in described["stages"]] == list(run_reader.STAGES)
    assert [row["mean"] for row in described["results"]] == [result.mean for result in open_run(digits_run.dir).results]
    assert described["data"]["samples"].keys() == {"train", "test"}


def test_show_names_the_page_of_a_sweep_and_of_a_study(tmp_path):
    sweep, study = tmp_path / "sweep", tmp_path / "study"
    for path in (sweep / "sweep.html", sweep / "sweep.parquet", sweep / "points" / "a" / "stages" / "evaluate.json",
                 study / "studies" / "drop.json"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    assert f"sweep {sweep}\npage: {sweep}/sweep.html" in shown(sweep)
    assert "finished distillations: 1" in shown(sweep)
    assert "page: not written yet" in shown(study)
    assert "next: distill-at-scale study CONFIG" in shown(study)


def test_show_of_a_sweep_or_study_that_has_written_no_page(tmp_path):
    (tmp_path / "points" / "a" / "stages").mkdir(parents=True)
    assert shown(tmp_path).startswith(f"sweep or study {tmp_path}\npage: not written yet")
    with pytest.raises(UserError, match="is the folder of a sweep or study, not of a run"):
        open_run(tmp_path)


def test_show_of_a_damaged_stage_says_what_to_do(digits_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(digits_run.dir, copy)
    (copy / "evaluation.json").write_text("{", encoding="utf-8")
    (copy / "rejected.parquet").write_bytes(b"x" * (copy / "rejected.parquet").stat().st_size)
    shutil.rmtree(copy / "synthetic")
    text = shown(copy)
    assert f"problem: {copy}/evaluation.json is not what was written" in text
    assert f"problem: {copy}/synthetic/card.json is missing" in text
    assert cli.main(["show", str(copy)]) == 0
    assert f"distill-at-scale distill {copy} run.redo=distill" in capsys.readouterr().out
    assert "rejected.parquet is not a readable Parquet file" in text
    assert "evaluate damaged" in repr(open_run(copy))


def test_show_of_a_configuration_of_another_version_shows_the_rest(digits_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(digits_run.dir, copy)
    facts = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    facts["config"]["select"]["later"] = 1
    (copy / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    text = shown(copy)
    assert "problem: unknown key select.later" in text
    assert f"CONFIG run.dir={copy}\n" in text  # the folder cannot stand for CONFIG
    assert "distilled" in text


def test_show_of_no_run_folder_exits_with_two(tmp_path, capsys):
    assert cli.main(["show", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "is not a run folder" in err
    (tmp_path / "run.yaml").touch()
    assert cli.main(["show", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml is a file; give the run.dir" in capsys.readouterr().err


def test_a_run_in_an_object_store_is_opened_without_fetching_all_of_it(digits_run, s3, monkeypatch, tmp_path):
    s3.upload(digits_run.dir, "opened", "run/")
    s3.client.put_object(Bucket="opened", Key="run/.run", Body=b"0123456789abcdef")  # as a command leaves it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = open_run(s3("opened/run"))
    assert run.address == "s3://opened/run"
    assert run.results == open_run(digits_run.dir).results
    assert not (run.path / "scores.parquet").exists()
    assert run.scores.equals(open_run(digits_run.dir).scores)
    assert not list(run.path.glob("prepared/*/*.parquet")), "the samples stay in the store"
    assert len(run.synthetic.labels) == len(open_run(digits_run.dir).synthetic.labels)
    assert {state.state for stage, state in run.stages.items() if stage != "report"} == {"finished"}
    text = shown(s3("opened/run"))
    assert "next: distill-at-scale run CONFIG run.dir=s3://opened/run" in text
    with pytest.raises(UserError, match="s3://opened/elsewhere is not a run folder"):
        open_run(s3("opened/elsewhere"))

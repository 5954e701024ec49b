"""The command: exit status, messages without tracebacks, and the table at the end."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import yaml
from conftest import TINY

from distill_at_scale import cli
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.storage.run_dir import STAGES


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}))
    return str(path)


def output(capsys) -> tuple[str, str]:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def test_one_stage_runs_and_a_second_time_is_skipped(tiny_file, tmp_path, capsys):
    assert cli.main(["ingest", tiny_file]) == 0
    assert (tmp_path / "run" / "prepared" / "dataset.json").is_file()
    assert "ingest: finished" in output(capsys)[0]
    assert cli.main(["ingest", tiny_file]) == 0
    assert "already done" in output(capsys)[0]


def test_overrides_reach_the_run(tiny_file, tmp_path):
    assert cli.main(["ingest", tiny_file, "data.classes=['8', '9']", f"run.dir={tmp_path / 'other'}"]) == 0
    assert json.loads((tmp_path / "other" / "prepared" / "dataset.json").read_text())["class_names"] == ["8", "9"]


def test_validate_reports_usable_samples_and_exits_with_zero(tiny_file, tmp_path, capsys):
    assert cli.main(["validate", tiny_file]) == 0
    assert "all 537 samples can be used" in output(capsys)[0]
    assert not (tmp_path / "run" / "prepared").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score"], "distill-at-scale ingest"),
        (["run", "select.kep=1"], "did you mean select.keep?"),
        (["run", "select.keep=2"], "select.keep = 2"),
        (["run", "distill.method=dcc"], "distill.method = 'dcc' is unknown; did you mean dc?"),
        (["run", "data.source=imagefolder", "data.path=/no/such/folder"], "no such folder"),
        (["run", "nonsense"], "nonsense"),
    ],
)
def test_a_user_error_is_one_line_and_exits_with_two(tiny_file, capsys, arguments, message):
    assert cli.main([arguments[0], tiny_file, *arguments[1:]]) == 2
    out, err = output(capsys)
    assert message in err
    assert err.startswith("error: ")
    assert "started" not in out


def test_a_missing_configuration_is_named(capsys):
    assert cli.main(["run", "no/such/file.yaml"]) == 2
    assert "no/such/file.yaml" in output(capsys)[1]


def test_a_message_is_not_mistaken_for_markup(tiny_file, capsys):
    assert cli.main(["run", tiny_file, "data.classes=['[red]x']"]) == 2
    assert "'[red]x' is not a class" in output(capsys)[1]


@pytest.mark.parametrize("arguments", [["fly", "x.yaml"], [], ["run"]])
def test_wrong_usage_exits_with_two_and_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: distill-at-scale" in capsys.readouterr().err


def test_the_help_names_every_stage(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert cli.STAGES == STAGES
    assert all(stage in out for stage in ("run", "validate", "plan", "sweep", "study", "export", *STAGES))


HELP = """
import runpy, sys
sys.argv = ["distill-at-scale", {argument!r}]
try:
    runpy.run_module("distill_at_scale", run_name="__main__")
except SystemExit as exit:
    assert exit.code == {status}, exit.code
heavy = {{"torch", "torchvision", "ray", "numpy", "pyarrow", "pydantic", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("fly", 2)])
def test_the_help_and_usage_errors_import_nothing_heavy(argument, status):
    code = HELP.format(argument=argument, status=status)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: distill-at-scale" in done.stdout + done.stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "distill_at_scale", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: distill-at-scale" in done.stdout


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "same command again"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "No space left on device: /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "Permission denied: /x/y"),
    ],
)
def test_interruption_and_a_full_disk_end_with_advice(tiny_file, capsys, monkeypatch, raised, status, message):
    def fail(*arguments):
        raise raised

    monkeypatch.setattr(Pipeline, "run", fail)
    assert cli.main(["run", tiny_file]) == status
    assert message in output(capsys)[1]


def test_a_bug_is_not_hidden(tiny_file, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("bug")

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["run", tiny_file])


def test_the_table_at_the_end_has_every_set(digits_run, capsys):
    from rich.console import Console

    from distill_at_scale.storage.run_dir import RunDir

    cli.show_result(RunDir(digits_run.dir), Console(width=120))
    out = capsys.readouterr().out
    summary = json.loads((digits_run.dir / "evaluation.json").read_text())["summary"]
    for row in summary:
        assert row["set"] in out
        assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in out


def test_the_studies_end_with_their_answers_and_a_second_call_reads_them(tiny_file, tmp_path, capsys):
    """The whole path without Ray: shared ingest and scores, points, findings, the table."""
    keys = ["studies.run=[drop]", "studies.seeds=2", "distill.steps=1", "evaluate.epochs=1"]
    assert cli.main(["study", tiny_file, *keys]) == 0
    assert "Dropping 10\N{NO-BREAK SPACE}% by loss, against" in output(capsys)[0]
    assert (tmp_path / "run" / "studies" / "studies.parquet").is_file()
    assert json.loads((tmp_path / "run" / "studies" / "drop.json").read_text())["study"] == "drop"
    assert cli.main(["study", tiny_file, *keys]) == 0
    out = output(capsys)[0]
    assert "study drop: already done" in out
    assert "points:" not in out

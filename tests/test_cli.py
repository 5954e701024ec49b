"""The command: exit status, messages without tracebacks, and the table at the end."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import yaml
from conftest import ROOT, TINY
from rich.console import Console

import distill_at_scale
from distill_at_scale import cli
from distill_at_scale.config.load import load
from distill_at_scale.core.errors import RunWarning
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pipeline.report.show import show_result
from distill_at_scale.storage.run_dir import STAGES, RunDir

OVERRIDE = re.compile(r"\w+(\.\w+)+=")


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(tmp_path / "run")}}), encoding="utf-8")
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
    assert json.loads((tmp_path / "other" / "prepared" / "dataset.json").read_text(encoding="utf-8"))[
        "class_names"
    ] == ["8", "9"]


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


def test_a_run_folder_as_the_configuration_warns_of_nothing_that_nobody_set(tiny_file, tmp_path, capsys):
    assert cli.main(["ingest", tiny_file, "data.frames=null"]) == 0
    assert "no effect" not in output(capsys)[0]
    assert cli.main(["ingest", str(tmp_path / "run")]) == 0
    out = output(capsys)[0]
    assert "no effect" not in out
    assert "already done" in out


def test_a_forgotten_configuration_is_not_taken_for_a_file(capsys):
    assert cli.main(["run", "select.keep=0.1"]) == 2
    assert "CONFIG is missing: select.keep=0.1 is an override; write `distill-at-scale run CONFIG" in output(capsys)[1]


FIRST_LINE = """
import sys
for name in ("torch", "ray", "scipy", "matplotlib"):
    sys.modules[name] = None
from distill_at_scale.cli import main
main(["run", {config!r}, *{overrides!r}])
"""


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([], "in this process"),
        (["cluster.address=null"], "on Ray, on this machine"),
        (["cluster.address=10.0.0.1:6379"], "on the Ray cluster at 10.0.0.1:6379"),
        (["run.dir=s3://key:secret@bucket/x?region=a"], "in the run folder s3://bucket/x?region=a, in this process"),
    ],
)
def test_the_first_line_comes_before_torch_and_ray_are_loaded(tiny_file, overrides, where):
    """Both take seconds; here they cannot be imported at all."""
    code = FIRST_LINE.format(config=tiny_file, overrides=overrides)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    line = done.stdout.splitlines()[0]
    assert line.startswith(f"distill-at-scale {distill_at_scale.__version__}: run {tiny_file}, in the run folder ")
    assert line.endswith(where)


def test_a_warning_of_ours_is_one_line_and_one_of_a_library_is_not_shown(tiny_file, capsys, monkeypatch):
    def warn(*arguments):
        warnings.warn("the batch is small; enlarge it", RunWarning, stacklevel=1)
        warnings.warn("Tip: in future versions of Ray ...", FutureWarning, stacklevel=1)
        warnings.warn("Converting a tensor", UserWarning, stacklevel=1)

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(Pipeline, "run", warn)
    assert cli.main(["run", tiny_file]) == 0
    assert output(capsys)[1] == "warning: the batch is small; enlarge it\n"


NO_CUDA = """
from distill_at_scale.core import error_messages
with error_messages.own_warnings_only():
    import torch.utils.cpp_extension
"""


def test_torch_does_not_say_that_it_finds_no_cuda_runtime(tmp_path):
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", NO_CUDA], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_a_missing_configuration_is_named(capsys):
    assert cli.main(["run", "no/such/file.yaml"]) == 2
    assert "no/such/file.yaml" in output(capsys)[1]


def test_a_message_is_not_mistaken_for_markup(tiny_file, capsys):
    assert cli.main(["run", tiny_file, "data.classes=['[red]x']"]) == 2
    assert "'[red]x' is not a class" in output(capsys)[1]


@pytest.mark.parametrize(
    ("arguments", "message", "help_of"),
    [
        (["fly", "x.yaml"], "No such command 'fly'", ""),
        (["rum", "x.yaml"], "No such command 'rum'. Did you mean 'run'?", ""),
        (["inges", "x.yaml"], "No such command 'inges'. Did you mean 'ingest'?", ""),
        ([], "Missing command", ""),
        (["run"], "Missing argument 'CONFIG'", "run "),
        (["run", "x.yaml", "--kept", "kept.csv"], "No such option: --kept", "run "),
        (
            ["export", "x.yaml", "--score", "scores.csv"],
            "No such option: --score (Possible options: --scores)",
            "export ",
        ),
        (["export", "x.yaml", "--scores"], "Option '--scores' requires an argument", "export "),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint_and_exits_with_two(arguments, message, help_of, capsys):
    assert cli.main(arguments) == 2
    out, err = output(capsys)
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith(f"error: {message}")
    assert lines[1:] == [f"Try `distill-at-scale {help_of}--help`."]


def test_the_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = output(capsys)[0]
    assert cli.STAGES == STAGES
    assert {"run", "validate", "plan", "sweep", "study", "compare", "export", *STAGES} <= set(cli.commands())
    for name in cli.commands():
        assert re.search(rf"^  {name} +\w.*\w\.$", out, re.MULTILINE), f"{name} has no summary of one line"


def examples_of(name: str, out: str) -> list[list[str]]:
    """The words of each example behind `distill-at-scale NAME`, without comments."""
    lines = out.partition("Examples:\n")[2].splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(f"    distill-at-scale {name} ")]


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_each_command_has_its_own_help_with_examples_that_are_accepted(name, capsys):
    """Usage, one or two sentences, every argument explained; the configurations and keys of the examples are right."""
    assert cli.main([name, "--help"]) == 0
    out = output(capsys)[0]
    assert f"Usage: distill-at-scale {name} [OPTIONS]" in out
    examples = examples_of(name, out)
    assert len(examples) >= 2, out
    for words in examples:
        overrides = [word for word in words if OVERRIDE.match(word)]
        if "{CONFIG}" in out and not words[0].startswith("runs/"):
            load(words[0], overrides)


def test_overrides_are_optional_and_may_stand_between_options(capsys):
    assert cli.main(["export", "--help"]) == 0
    assert "{CONFIG} [section.key=value]..." in output(capsys)[0]
    mixed = ["export", "no.yaml", "run.dir=a", "--kept", "kept.csv", "select.keep=0.1"]
    assert cli.main(mixed) == 2
    assert "no.yaml" in output(capsys)[1], "read as the configuration"


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert output(capsys)[0] == f"distill-at-scale {distill_at_scale.__version__}\n"


HEAVY = {"torch", "torchvision", "ray", "scipy", "matplotlib", "sklearn"}
COMMAND = """
import runpy, sys
sys.argv = ["distill-at-scale", *{arguments!r}]
try:
    runpy.run_module("distill_at_scale", run_name="__main__")
except SystemExit as exit:
    assert exit.code == {status}, exit.code
heavy = {heavy!r} & set(sys.modules)
assert not heavy, heavy
"""


def in_process(arguments: list[str], status: int, heavy: set[str]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which must end with `status` and import nothing `heavy`."""
    code = COMMAND.format(arguments=arguments, status=status, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["run", "-h"], 0), (["fly"], 2), (["--version"], 0)]
)
def test_the_help_and_usage_errors_import_nothing_heavy(arguments, status):
    done = in_process(arguments, status, HEAVY | {"numpy", "pyarrow", "rich"})
    assert "distill-at-scale" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "override", ["select.kep=1", "select.keep=2", "nonsense", "data=3", "data.source=folder", "evaluate.networks=x"]
)
def test_errors_of_the_configuration_import_neither_torch_nor_ray(override):
    done = in_process(["run", str(ROOT / "configs" / "digits.yaml"), override], 2, HEAVY)
    assert done.stderr.startswith("error: ")


def test_the_package_runs_as_a_module_under_the_same_name():
    done = subprocess.run([sys.executable, "-m", "distill_at_scale", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: distill-at-scale" in done.stdout


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
    show_result(RunDir(digits_run.dir), Console(width=120))
    out = capsys.readouterr().out
    summary = json.loads((digits_run.dir / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    for row in summary:
        assert row["set"] in out
        assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in out


def test_the_studies_end_with_their_answers_and_a_second_call_reads_them(tiny_file, tmp_path, capsys):
    """The whole path without Ray: shared ingest and scores, points, findings, the table."""
    keys = ["studies.run=[drop]", "studies.seeds=2", "distill.steps=1", "evaluate.epochs=1"]
    assert cli.main(["study", tiny_file, *keys]) == 0
    assert "Dropping 10\N{NO-BREAK SPACE}% by loss, against" in output(capsys)[0]
    assert (tmp_path / "run" / "studies" / "studies.parquet").is_file()
    assert json.loads((tmp_path / "run" / "studies" / "drop.json").read_text(encoding="utf-8"))["study"] == "drop"
    assert cli.main(["study", tiny_file, *keys]) == 0
    out = output(capsys)[0]
    assert "study drop: already done" in out
    assert "points:" not in out

"""The shipped configurations: found by name, described by their heads, copied by the command `configs cp`."""

from __future__ import annotations

import io
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from rich.console import Console

from distill_at_scale import cli
from distill_at_scale.config import shipped
from distill_at_scale.config.load import load
from distill_at_scale.core.errors import UserError


def test_the_package_holds_the_files_of_configs():
    assert shipped.names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert "digits" in shipped.names()
    assert (shipped.FOLDER / "schema.json").is_file()


def test_a_wheel_holds_every_shipped_file():
    """The package data of pyproject.toml name them; the link makes them files of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["distill_at_scale"]
    package = ROOT / "distill_at_scale"
    assert (package / "configs").resolve() == ROOT / "configs"
    packed = {path.name for pattern in patterns for path in package.glob(pattern)}
    assert {*(f"{name}.yaml" for name in shipped.names()), "schema.json"} <= packed


@pytest.mark.parametrize("name", shipped.names())
def test_every_head_has_the_same_lines_and_its_command_runs_the_file(name):
    lines = shipped.path(name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    labels = [match[1] for line in lines if (match := re.match(r"# ([A-Z]\w+): ", line)) and match[1] in shipped.LABELS]
    assert labels == list(shipped.LABELS)
    head = shipped.head(name)
    assert f"configs/{name}.yaml" in head.run
    assert head.run.split()[1] in (*cli.commands(), "jobs/benchmarks/methods.py")
    sections = [section for section in ("sweep", "studies") if f"\n{section}:" in "\n".join(lines)]
    command = {"sweep": "sweep", "studies": "study"}.get(sections[0]) if sections else None
    assert command in (None, head.run.split()[1])
    assert head.data.startswith("none") == ("data.path=" not in head.run)


def test_a_head_without_a_line_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("# Purpose: nothing\n", encoding="utf-8")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="lacks the line '# Data"):
        shipped.head("x")


def test_a_name_is_a_configuration_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("digits") == load(ROOT / "configs" / "digits.yaml")
    Path("digits").write_text("distill: {ipc: 7}", encoding="utf-8")
    assert load("digits").distill.ipc == 7


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("digits.yaml", "digits is a shipped configuration: give `digits` as CONFIG"),
        ("configs/digits.yaml", "or copy it with `distill-at-scale configs cp digits`"),
        ("digit", "Did you mean the shipped configuration digits"),
        ("zzz.yaml", "Is the path right? `distill-at-scale configs` lists the shipped ones"),
    ],
)
def test_a_missing_file_leads_to_the_shipped_ones(tmp_path, monkeypatch, missing, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(missing)
    assert message in str(error.value)


def test_the_table_says_purpose_data_and_cost():
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(shipped.table())
    text = console.export_text()
    for name in shipped.names():
        head = shipped.head(name)
        assert re.search(rf"{name} +{re.escape(head.purpose[:30])}.* +{re.escape(head.data[:20])}", text), name
    assert text.index("digits ") < text.index("cifar10_dc_ipc1 ")  # those without data first


def schema_of(copy: Path) -> Path:
    return Path(copy.read_text(encoding="utf-8").splitlines()[0].removeprefix(shipped.SCHEMA_LINE))


@pytest.mark.parametrize("target", [None, "own.yaml", "sub", "sub/own.yaml"])
def test_a_copy_loads_alike_finds_its_schema_and_says_the_next_command(tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    assert cli.main(["configs", "cp", "cifar10_dm_ipc1", *([target] if target else [])]) == 0
    name = {None: "cifar10_dm_ipc1.yaml", "sub": "sub/cifar10_dm_ipc1.yaml"}.get(target, target)
    assert f"distill-at-scale run {name} data.path=PATH" in capsys.readouterr().out
    assert load(name) == load("cifar10_dm_ipc1")
    assert schema_of(Path(name)).is_absolute()
    assert schema_of(Path(name)).is_file()
    assert f"run {name} data.path=PATH" in Path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "there.yaml"], "there.yaml exists and is not overwritten"),
        (["digits", "no/such/x.yaml"], "the folder no/such does not exist"),
        (["digit"], "the shipped configuration 'digit' does not exist; did you mean digits"),
    ],
)
def test_a_copy_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine", encoding="utf-8")
    assert cli.main(["configs", "cp", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Path("there.yaml").read_text(encoding="utf-8") == "mine"


def test_configs_and_keys_are_commands(capsys):
    assert cli.main(["configs"]) == 0
    assert "studies_moving_digits" in capsys.readouterr().out
    assert cli.main(["keys", "select.keep"]) == 0
    assert "keep rate (0 to 1]" in capsys.readouterr().out
    assert cli.main(["keys", "select", "--json"]) == 0
    assert '"additionalProperties": false' in capsys.readouterr().out
    assert cli.main(["keys", "select.kep"]) == 2
    assert "did you mean select.keep?" in capsys.readouterr().err

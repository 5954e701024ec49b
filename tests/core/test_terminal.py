"""A terminal or log whose encoding lacks a character gets a replacement, never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from rich.console import Console
from rich.table import Table

from distill_at_scale.core.progress import Display
from distill_at_scale.core.terminal import replace_unknown_characters


def written(monkeypatch, encoding: str, text: str, errors: str = "strict") -> str:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
    replace_unknown_characters()
    sys.stdout.write(text)
    sys.stdout.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "83.2 +- 1.0, 8 x 8, >= 4, ??, ?"),
        ("gbk", "83.2 ± 1.0, 8 × 8, ≥ 4, 猫?, ?"),
        ("koi8-r", "83.2 +- 1.0, 8 x 8, ≥ 4, ??, ?"),
        ("utf-8", "83.2 ± 1.0, 8 × 8, ≥ 4, 猫é, 🐱"),
    ],
)
def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch, encoding, shown):
    assert (
        written(monkeypatch, encoding, "83.2 ± 1.0, 8 × 8, ≥ 4, 猫é, 🐱").replace(
            "é", "?" if encoding == "gbk" else "é"
        )
        == shown
    )


def test_a_choice_of_the_user_is_kept(monkeypatch):
    assert written(monkeypatch, "ascii", "±", errors="xmlcharrefreplace") == "&#177;"


def test_a_stream_that_cannot_be_changed_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    replace_unknown_characters()


def test_tables_and_messages_of_a_display_reach_an_ascii_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    display = Display()
    table = Table(title="top-1 accuracy, mean ± std")
    table.add_column("×")
    table.add_row("83.2 ± 1.0")
    display.console.print(table)
    display.say("класс: 5 ± 1")
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "83.2 +- 1.0" in text
    assert "?????: 5 +- 1" in text


COMMANDS = [["keys"], ["configs"], ["--help"], ["run", "no/sßch.yaml"], ["keys", "zßz"], ["run"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_command_prints_whatever_the_encoding(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distill_at_scale", *arguments]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    assert (done.stdout + done.stderr).isascii()


def test_the_console_of_rich_draws_its_boxes_in_ascii_there():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert console.options.ascii_only

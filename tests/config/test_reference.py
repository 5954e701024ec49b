"""configs/README.md: the generated reference is current, and the table lists all shipped configurations."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from pydantic import BaseModel

from distill_at_scale.config import reference
from distill_at_scale.config.load import Config

PAGE = ROOT / "configs" / "README.md"
CONFIGURATIONS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def test_the_reference_is_current():
    """If this fails, run `python -m distill_at_scale.config.reference configs/README.md`."""
    assert reference.update(PAGE.read_text()) == PAGE.read_text()


def test_a_page_without_the_marker_is_refused():
    with pytest.raises(ValueError, match="lacks the marker"):
        reference.update("# Configurations\n")


def test_every_key_has_a_description_and_every_section_a_docstring():
    def check(model: type[BaseModel], prefix: str) -> None:
        assert model.__doc__, prefix
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                check(inner, f"{prefix}{name}.")
            else:
                assert field.description, f"{prefix}{name}"

    check(Config, "")


def test_ranges_and_choices_are_shown():
    text = reference.reference()
    for row in (
        "| `dir`° | text | `runs/run` |",
        "| `size` | integer ≥ 4 and ≤ 1 024 | `32` |",
        "| `keep` | number > 0 and ≤ 1, or `auto` | `1.0` |",
        "| `resize` | `square`, `crop` | `square` |",
        "| `lr` | number > 0 | `0.01` |",
        "| `tracking_uri`° | text, or null | `null` |",
    ):
        assert row in text


def test_the_table_names_exactly_the_shipped_configurations():
    table, _, _ = PAGE.read_text().partition(reference.MARKER)
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+\.yaml)`", row.split(" | ")[0])]
    assert sorted(names) == CONFIGURATIONS

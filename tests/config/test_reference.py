"""What is generated from the schema: configs/README.md, configs/schema.json, and what the command `keys` prints."""

from __future__ import annotations

import io
import re

import pytest
from conftest import ROOT
from pydantic import BaseModel
from rich.console import Console

from distill_at_scale.config import reference, shipped, typed_yaml
from distill_at_scale.config.keys import sections
from distill_at_scale.config.load import Config, validate
from distill_at_scale.core.errors import UserError

PAGE = ROOT / "configs" / "README.md"


def test_the_reference_is_current():
    """If this fails, run `python -m distill_at_scale.config.reference configs/README.md`."""
    assert reference.update(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")


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


def test_the_schema_file_is_current():
    """If this fails, run `python -m distill_at_scale.config.reference configs/README.md`."""
    assert (ROOT / "configs" / "schema.json").read_text(encoding="utf-8") == reference.json_text() + "\n"


def json_problems(values, name=None) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema comes with moto, an extra of the tests")
    schema = reference.json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(values)]


@pytest.mark.parametrize("name", shipped.names())
def test_the_json_schema_accepts_every_shipped_configuration(name):
    assert json_problems(typed_yaml.read(shipped.path(name).read_text(encoding="utf-8"), Config, Config)) == []


def test_the_json_schema_accepts_the_defaults():
    assert json_problems(Config().model_dump()) == []


@pytest.mark.parametrize(
    ("values", "accepted"),
    [
        ({"select": {"keep": "auto"}}, True),
        ({"select": "auto"}, True),
        ({"select": "all"}, False),
        ({"select": {"keep": 1.5}}, False),
        ({"select": {"kep": 0.5}}, False),
        ({"selct": {}}, False),
        ({"distill": {"dm": {"image_lr": 0}}}, False),
        ({"evaluate": {"networks": "resnet18"}}, True),
        ({"evaluate": {"networks": []}}, False),
        ({"evaluate": {"bounds": "ful"}}, False),
        ({"data": {"classes": ["a", 5]}}, False),
        ({"track": {"mlflow": None}}, True),
        ({"track": {"mlflow": {"x": 1}}}, False),
    ],
)
def test_the_json_schema_accepts_what_the_command_accepts(values, accepted):
    assert (json_problems(values) == []) is accepted
    if accepted:
        validate(values)
    else:
        with pytest.raises(UserError):
            validate(values)


def test_the_json_schema_describes_every_key():
    for section in sections(Config):
        properties = reference.json_schema(section.name)["properties"]
        for key in section.keys:
            entry = properties[key.name.rpartition(".")[2]]
            assert entry["description"] == key.field.description
            assert entry["default"] == key.field.get_default()


def test_a_key_has_its_own_json_schema():
    assert json_problems(0.5, "select.keep") == []
    assert json_problems(0, "select.keep") != []
    assert "keep rate" in reference.json_schema("select.keep")["description"]


def printed(name=None, width=140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in reference.tables(name):
        console.print(table)
    return console.export_text()


def test_keys_prints_type_range_default_and_meaning():
    assert re.search(r"select\.keep +number > 0 and ≤ 1, or auto +1\.0 +keep rate", printed("select.keep", 200))
    assert "select.scope" not in printed("select.keep")
    section = printed("distill.dm")
    assert "Distribution matching" in section
    assert "distill.dm.image_lr" in section
    assert "distill.dc." not in section
    assert "distill.dc.outer" in printed("distill")
    assert "track.mlflow.experiment" in printed("track")
    assert printed("ipc").count("distill.ipc") == 1
    everything = printed(width=250)
    assert all(key.name in everything for section in sections(Config) for key in section.keys)


def test_the_last_name_of_a_key_has_its_json_schema_too():
    assert reference.json_schema("keep") == reference.json_schema("select.keep")


@pytest.mark.parametrize("show", [reference.tables, reference.json_schema])
def test_keys_of_an_empty_name_are_no_keys(show):
    with pytest.raises(UserError, match="unknown section"):
        show("")


@pytest.mark.parametrize("name", ["select.kep", "selct", "kep"])
@pytest.mark.parametrize("show", [reference.tables, reference.json_schema])
def test_keys_names_the_nearest_of_an_unknown_name(show, name):
    with pytest.raises(UserError, match=r"unknown .*did you mean select"):
        show(name)

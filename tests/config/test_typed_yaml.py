"""Values in YAML and in overrides: the type of a key decides how its text is read."""

from __future__ import annotations

import math

import pytest

from distill_at_scale.config import keys, typed_yaml
from distill_at_scale.config import load as config

ALL_KEYS = [key for section in keys.sections(config.Config) for key in section.keys]
TEXT_KEYS = [key for key in ALL_KEYS if keys.is_text(key.annotation) and not keys.choices(key.annotation)]
LOOK_ALIKES = ["exp #7", "12:30", "2024-01-01", "no", "yes", "off", "1e3", "0x10", "5", "a: b", "~", "*x", "&x", "!x y",
               "%x", "@x", "- a", "a\\b", " a ", "s3://b/x-{0000..0003}.tar?region=us-east-1", "none", "it's"]  # fmt: skip


def test_the_text_keys_are_those_that_hold_free_text():
    """A mapping or a list may stand in their place; a number or a date may not."""
    names = {key.name for key in TEXT_KEYS}
    assert {"run.dir", "data.path", "data.classes", "score.criterion", "evaluate.networks", "cluster.address",
            "distill.dsa.augment", "track.mlflow.experiment", "select.criterion"} <= names  # fmt: skip
    assert not {"select.keep", "distill.ipc", "data.frames", "distill.workers", "score.imported"} & names
    assert len(names) > 30


@pytest.mark.parametrize("key", TEXT_KEYS, ids=lambda key: key.name)
def test_a_text_key_takes_the_text_of_an_override_as_it_is(key):
    for text in LOOK_ALIKES:
        assert typed_yaml.read_override(text, config.Config, key.annotation) == text


@pytest.mark.parametrize("key", TEXT_KEYS, ids=lambda key: key.name)
def test_a_text_key_takes_the_characters_of_a_plain_value_in_a_file(key):
    section, _, name = key.name.rpartition(".")
    annotation = keys.annotation_of(config.Config, section)
    for text in ["12:30", "2024-01-01", "no", "yes", "off", "1e3", "0x10", "5", "1_000"]:
        assert typed_yaml.read(f"{name}: {text}", config.Config, annotation) == {name: text}
        if keys.entry_of_list(key.annotation):
            assert typed_yaml.read(f"{name}: [{text}, a]", config.Config, annotation) == {name: [text, "a"]}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path=null", None),
        ("data.path=", None),
        ("data.path='null'", "null"),
        ("data.path='a b'", "a b"),
        ('data.path="a #b"', "a #b"),
        ("data.path='a' and 'b'", "'a' and 'b'"),
        ("run.dir=null", "null"),
        ("cluster.address=null", None),
        ("cluster.address=none", "none"),
        ("data.classes=[no, 8, 2024-01-01]", ["no", "8", "2024-01-01"]),
        ("data.classes='[8]'", "[8]"),
        ("data.classes={a}", "{a}"),
        ("data.path=[a]", "[a]"),
        ("score.imported={x: 12:30, 1: no}", {"x": "12:30", "1": "no"}),
        ("score.imported.x=a #b", {"x": "a #b"}),
        ("select.criterion={loss: 0.5}", {"loss": 0.5}),
        ("sweep.space={data.path: [2024-01-01, no], select.keep: [0.1]}",
         {"data.path": ["2024-01-01", "no"], "select.keep": [0.1]}),
        ("studies.across.sets={a: {data.path: 12:30, data.frames: 8}}", {"a": {"data.path": "12:30", "data.frames": 8}}),
        ("distill.options={at: 12:30, on: 2024-01-01, n: 010, x: 1e3, y: 0x10, z: 1_000, w: -.inf, 1: yes}",
         {"at": "12:30", "on": "2024-01-01", "n": "010", "x": 1000.0, "y": 16, "z": 1000, "w": -math.inf, "1": True}),
        ("cluster.grows=yes", True),
    ],
)  # fmt: skip
def test_the_type_of_a_key_decides_how_an_override_is_read(override, value):
    name, _, text = override.partition("=")
    annotation = keys.annotation_of(config.Config, name)
    read = typed_yaml.read_override(text, config.Config, annotation)
    assert read == (value[name.rpartition(".")[2]] if name == "score.imported.x" else value)

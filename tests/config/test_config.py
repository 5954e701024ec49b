"""The schema: accepted values, and errors that name the key, the value and the allowed values."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from distill_at_scale.config import load as config
from distill_at_scale.config.fields import flatten
from distill_at_scale.config.registry import resolve
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.pipeline.validate import check_names


@pytest.fixture
def load(tmp_path: Path):
    def write_and_load(text: str, *overrides: str) -> config.Config:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return config.load(path, overrides)

    return write_and_load


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == config.Config()


def test_the_file_overrides_defaults_and_the_command_line_overrides_the_file(load):
    loaded = load("select: {keep: 0.5}\ndistill: {ipc: 10}", "select.keep=0.1", "distill.dc.outer=2")
    assert (loaded.select.keep, loaded.distill.ipc, loaded.distill.dc.outer, loaded.distill.dc.real_batch) == (
        0.1,
        10,
        2,
        256,
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_every_way_to_write_a_float_is_a_float(load, text):
    assert load(f"score: {{lr: {text}}}").score.lr == 0.001
    assert load("", f"score.lr={text}").score.lr == 0.001


def test_a_whole_number_is_accepted_for_a_float(load):
    assert load("distill: {dm: {image_lr: 10}}").distill.dm.image_lr == 10.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.kep=1", "unknown key select.kep (in the command line); did you mean select.keep?"),
        ("distill.dc.outr=1", "unknown key distill.dc.outr (in the command line); did you mean distill.dc.outer?"),
        ("distil.ipc=1", "unknown key distil (in the command line); did you mean distill?"),
    ],
)
def test_an_unknown_key_names_itself_its_origin_and_the_nearest(load, override, message):
    with pytest.raises(UserError) as error:
        load("", override)
    assert str(error.value) == message


def test_an_unknown_key_of_the_file_names_the_file(load):
    with pytest.raises(UserError, match=r"unknown key select\.kep \(in .*run\.yaml\); did you mean select\.keep\?"):
        load("select: {kep: 1}")


@pytest.mark.parametrize(
    ("override", "key", "value", "allowed"),
    [
        ("select.keep=0", "select.keep", "0", "greater than 0"),
        ("select.keep=1.5", "select.keep", "1.5", "less than or equal to 1"),
        ("select.scope=klass", "select.scope", "klass", "'class', 'global' or 'adaptive'"),
        ("distill.ipc=ten", "distill.ipc", "ten", "integer"),
        ("distill.ipc=1.5", "distill.ipc", "1.5", "integer"),
        ("data.channels=4", "data.channels", "4", "1 or 3"),
        ("runtime.drop=1.0", "runtime.drop", "1.0", "less than 1"),
        ("run.seed='0'", "run.seed", "'0'", "integer"),
        ("evaluate.networks=[]", "evaluate.networks", "[]", "at least 1"),
        ("score.lr=.nan", "score.lr", "nan", "finite number"),
        ("score.criterion=[loss, loss]", "score.criterion", "loss", "each once"),
    ],
)
def test_a_wrong_value_names_key_value_origin_and_what_is_allowed(load, override, key, value, allowed):
    with pytest.raises(UserError) as error:
        load("", override)
    for part in (key, value, allowed, "command line"):
        assert part in str(error.value)


def test_a_value_of_the_wrong_type_is_named_by_its_own_key(load):
    with pytest.raises(UserError) as error:
        load("", "score.criterion=5")
    assert "score.criterion = 5 (in the command line)" in str(error.value)


@pytest.mark.parametrize("key", ["score.lr", "evaluate.lr", "distill.dc.image_lr"])
def test_an_infinite_learning_rate_is_refused(load, key):
    with pytest.raises(UserError, match=key):
        load("", f"{key}=.inf")


def test_every_problem_is_reported_at_once(load):
    with pytest.raises(UserError) as error:
        load("select: {keep: 2}\ndistill: {ipc: 0}")
    assert "select.keep" in str(error.value)
    assert "distill.ipc" in str(error.value)


@pytest.mark.parametrize("keep", [1.0, 1e-4, 0.0004, 1])
def test_keep_accepts_the_whole_interval(load, keep):
    assert load("", f"select.keep={keep}").select.keep == keep


def test_a_stratum_must_end_at_or_before_one(load):
    assert load("select: {order: stratum, stratum_start: 0.5, keep: 0.5}").select.stratum_start == 0.5
    with pytest.raises(UserError, match="stratum"):
        load("select: {order: stratum, stratum_start: 0.6, keep: 0.5}")


def test_a_stratum_can_be_cut_by_count(load):
    assert load("select: {order: stratum, stratum_start: 0.5, per_class: 2}").select.per_class == 2


def test_a_repeated_key_is_an_error(load):
    with pytest.raises(UserError, match="keep is given twice"):
        load("select:\n  keep: 0.1\n  keep: 0.2\n")
    with pytest.raises(UserError, match="select is given twice"):
        load("select: {keep: 0.1}\nselect: {scope: class}\n")


@pytest.mark.parametrize("text", ["select: [", "a: b: c", "- 1\n- 2", "just words"])
def test_a_file_that_is_not_a_configuration_is_refused(load, text):
    with pytest.raises(UserError, match=r"run\.yaml"):
        load(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        config.load(tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"x\.yaml"):
        config.load(tmp_path / "x.yaml")


@pytest.mark.parametrize("override", ["select.keep", "keep=0.1", "=1", "select.keep=[1"])
def test_an_override_that_cannot_be_read_is_quoted(load, override):
    with pytest.raises(UserError) as error:
        load("", override)
    assert override in str(error.value)


def test_an_override_below_a_value_is_refused(load):
    with pytest.raises(UserError, match=r"select\.keep\.x=1"):
        load("select: {keep: 0.5}", "select.keep.x=1")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid_and_its_names_resolve(path):
    check_names(config.load(path))


def test_min_per_class_follows_the_images_per_class():
    assert config.validate({"distill": {"ipc": 10}}).min_per_class == 10
    assert config.validate({"distill": {"ipc": 10}, "select": {"min_per_class": 3}}).min_per_class == 3


def test_flatten_gives_dotted_keys():
    flat = flatten(config.DistillSection(), "distill.")
    assert flat["distill.dc.image_lr"] == 0.1
    assert flat["distill.options"] == {}


def test_a_name_is_looked_up_in_its_table():
    assert resolve("distill.method", "dc", METHODS) is METHODS["dc"]


def test_an_unknown_name_names_key_and_nearest():
    with pytest.raises(UserError, match=r"data\.source = 'parket' is unknown; did you mean parquet\?"):
        resolve("data.source", "parket", SOURCES)


def test_a_plug_in_is_imported_from_its_module():
    assert (
        resolve("x", "distill_at_scale.data.sources.image.digits:Digits", SOURCES, ("splits", "read"))
        is SOURCES["digits"]
    )


@pytest.mark.parametrize("name", ["no_such_module_here:Thing", "json:NoSuchThing", ":x", "json:"])
def test_a_plug_in_that_does_not_import_is_named(name):
    with pytest.raises(UserError, match="cannot be imported") as error:
        resolve("distill.method", name, {})
    assert name in str(error.value)


def test_a_plug_in_that_breaks_the_contract_says_what_it_lacks():
    with pytest.raises(UserError, match="lacks load, no_such_thing"):
        resolve("distill.method", "json:JSONDecoder", {}, ("decode", "load", "no_such_thing"))


@pytest.mark.parametrize(
    "names",
    [
        {"data__source": "json:JSONDecoder"},
        {"score__criterion": "json:JSONDecoder"},
        {"distill__method": "json:JSONDecoder"},
        {"select__criterion": "los"},
        {"score__network": "convnett"},
        {"distill__network": "convnett"},
        {"evaluate__networks": ["convnet", "convnett"]},
        {"distill__dsa__augment": "color_flop", "distill__method": "dsa"},
    ],
)
def test_every_name_is_checked_before_anything_is_computed(make_config, tmp_path, names):
    with pytest.raises(UserError):
        check_names(make_config(tmp_path, **names))

"""Names of parts of the package and of plug-ins: found, or refused with the nearest name."""

from __future__ import annotations

import pytest

from distill_at_scale.config.registry import ALIASES, resolve
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.models.spec import NETWORKS
from distill_at_scale.pipeline.validate import check_names
from distill_at_scale.pruning.criteria import CRITERIA


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


@pytest.mark.parametrize("name", ["no_such_module_here:Thing", "json:NoSuchThing", ":x", "json:", "../json:x", "a b:x"])
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


@pytest.mark.parametrize(
    ("key", "name", "table", "meant"),
    [
        ("data.source", "folder", SOURCES, "did you mean imagefolder?"),
        ("data.source", "Image-Folder", SOURCES, "did you mean imagefolder?"),
        ("data.source", "hf", SOURCES, "did you mean parquet?"),
        ("data.source", "kinetic", SOURCES, "did you mean kinetics or kinetics_tar?"),
        ("data.source", "something", SOURCES, "did you mean something_v2?"),
        ("distill.method", "sre2", METHODS, "did you mean sre2l?"),
        ("distill.method", "trajectory_matching", METHODS, "did you mean mtt?"),
        ("score.criterion", "early", CRITERIA, "did you mean loss_early?"),
        ("score.network", "resnet", NETWORKS, "did you mean resnet18?"),
        ("data.source", "zzzz", SOURCES, "known: audiofolder, digits"),
    ],
)
def test_a_word_for_a_part_of_the_package_leads_to_its_name(key, name, table, meant):
    with pytest.raises(UserError) as error:
        resolve(key, name, table)
    assert meant in str(error.value)


def test_every_alias_names_a_part():
    names = {*SOURCES, *METHODS, *CRITERIA, *NETWORKS}
    assert set(ALIASES.values()) <= names
    assert not set(ALIASES) & names

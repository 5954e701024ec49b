"""The schema: accepted values, and errors that name the key, the value and the allowed values."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
from conftest import ROOT

from distill_at_scale.config import keys
from distill_at_scale.config import load as config
from distill_at_scale.config.fields import flatten
from distill_at_scale.core.errors import UserError
from distill_at_scale.pipeline.validate import check_names


@pytest.fixture
def load(tmp_path: Path):
    def write_and_load(text: str, *overrides: str) -> config.Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
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
        (
            "select.kep=1",
            "unknown key select.kep (in the command line); did you mean select.keep? Keys of select: crit",
        ),
        ("distill.dc.outr=1", "unknown key distill.dc.outr (in the command line); did you mean distill.dc.outer? Keys"),
        ("distill.keep=1", "unknown key distill.keep (in the command line); did you mean select.keep? Keys of distill"),
        ("select.seeds=1", "did you mean select.seed or evaluate.seeds or sweep.seeds? Keys of select"),
        (
            "distill.dcc.outer=1",
            "unknown key distill.dcc (in the command line); did you mean distill.dc? Keys of distill",
        ),
        (
            "distil.ipc=1",
            "unknown section distil (in the command line); did you mean distill? Sections: run, data, score",
        ),
        ("zzz.ipc=1", "unknown section zzz (in the command line); sections: run, data, score"),
        ("track.mlflow.experimentt=1", "did you mean track.mlflow.experiment? Keys of track.mlflow: tracking_uri, exp"),
    ],
)
def test_an_unknown_key_names_itself_its_origin_the_nearest_and_the_keys_of_its_section(load, override, message):
    with pytest.raises(UserError) as error:
        load("", override)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("keep=0.1", "select.keep=0.1?"),
        ("ipc=10", "distill.ipc=10?"),
        ("seed=1", "run.seed=1 or select.seed=1 or distill.seed=1?"),
        ("kepp=0.1", "select.keep=0.1?"),
        ("zzz=0.1", "write section.key=value"),
    ],
)
def test_an_override_without_a_section_names_the_sections_that_have_the_key(load, override, meant):
    with pytest.raises(UserError) as error:
        load("", override)
    assert meant in str(error.value)
    with pytest.raises(UserError, match="unknown section"):
        load(override.replace("=", ": "))


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("run=3", "run is a section; write run.key=value, for example run.dir=3"),
        ("distill.=3", "write section.key=value"),
        (".keep=3", "did you mean select.keep=3?"),
        ("se\udcfflect.keep=3", "write section.key=value"),
    ],
)
def test_an_override_of_no_key_says_what_to_write(load, override, advice):
    with pytest.raises(UserError, match="cannot read the override") as error:
        load("", override)
    assert advice in str(error.value)


def test_a_key_outside_a_section_of_a_file_names_its_section(load):
    with pytest.raises(UserError, match=r"unknown section keep \(in .*run\.yaml\); did you mean select\.keep\?"):
        load("keep: 0.1")


def test_an_unknown_key_of_the_file_names_the_file(load):
    with pytest.raises(UserError, match=r"unknown key select\.kep \(in .*run\.yaml\); did you mean select\.keep\?"):
        load("select: {kep: 1}")


@pytest.mark.parametrize(
    ("override", "key", "value", "allowed"),
    [
        ("select.keep=0", "select.keep", "0", "a number between 0 (excluded) and 1, or auto"),
        ("select.keep=1.5", "select.keep", "1.5", "a number between 0 (excluded) and 1, or auto"),
        ("select.keep=no", "select.keep", "false", "a number between 0 (excluded) and 1, or auto"),
        ("select.scope=klass", "select.scope", "klass", "class, global or adaptive; did you mean class?"),
        ("distill.ipc=ten", "distill.ipc", "ten", "an integer of at least 1"),
        ("distill.ipc=1.5", "distill.ipc", "1.5", "an integer of at least 1"),
        ("data.channels=4", "data.channels", "4", "1 or 3"),
        ("data.size=2000", "data.size", "2000", "an integer between 4 and 1,024"),
        ("runtime.drop=1.0", "runtime.drop", "1.0", "a number between 0 and 1 (excluded)"),
        ("run.seed='0'", "run.seed", "'0'", "an integer of at least 0"),
        ("run.dir=", "run.dir", "null", "text"),
        ("evaluate.networks=[]", "evaluate.networks", "[]", "a list of text with at least 1"),
        ("evaluate.bounds=[kept, ful]", "evaluate.bounds", "ful", "a list of kept or full"),
        ("studies.interaction.drops=0.5", "studies.interaction.drops", "0.5", "a list of numbers with at least 3"),
        ("score.imported_useful.x=lo", "score.imported_useful", "lo", "a mapping of text to low or high"),
        (
            "select.criterion={loss: high}",
            "select.criterion",
            "high",
            "text, or a mapping of text to a number, or null",
        ),
        ("score.lr=.nan", "score.lr", "nan", "a finite number above 0"),
        ("score.lr=1e39", "score.lr", "1e+39", "a number above 0 and at most 3e+38"),
        ("distill.dc=3", "distill.dc", "3", "a section with keys, such as image_lr"),
        ("track.mlflow=3", "track.mlflow", "3", "a section with keys, such as tracking_uri"),
        ("score.criterion=[loss, loss]", "score.criterion", "loss", "each once"),
    ],
)
def test_a_wrong_value_names_key_value_origin_and_what_is_allowed(load, override, key, value, allowed):
    with pytest.raises(UserError) as error:
        load("", override)
    for part in (f"{key} = ", value, allowed, "command line"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)  # one line, also for a key that takes several types


def test_a_problem_between_two_keys_is_said_without_the_whole_section(load):
    with pytest.raises(UserError) as error:
        load("", "distill.mtt.max_start=99")
    assert str(error.value).startswith("distill.mtt (in the command line): max_start + target_epochs is 102")


ALL_KEYS = [key for section in keys.sections(config.Config) for key in section.keys]


def value_at(loaded, name):
    for part in name.split("."):
        loaded = getattr(loaded, part)
    return loaded


@pytest.mark.parametrize(
    "text", ["data: {path: !!python/object:os.system x}", "data: {path: !mine x}", "data: {!mine path: x}"]
)
def test_a_tag_that_safe_yaml_refuses_is_refused_for_a_text_too(load, text):
    with pytest.raises(UserError, match="not valid YAML"):
        load(text)


def test_one_anchor_may_serve_a_text_and_a_number(load):
    loaded = load("data: {path: &x 12, chunk: *x}")
    assert (loaded.data.path, loaded.data.chunk) == ("12", 12)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("evaluate.networks=resnet18", ["resnet18"]),
        ("evaluate.networks=12:30", ["12:30"]),
        ("evaluate.bounds=kept", ["kept"]),
        ("evaluate.controls=unpruned", ["unpruned"]),
        ("sweep.controls=random", ["random"]),
        ("studies.run=drop", ["drop"]),
        ("studies.stability.networks=mlp", ["mlp"]),
        ("studies.stability.steps=5", [5]),
        ("studies.across.keep=0.2", [0.2]),
        ("compare.labels=soft", ["soft"]),
        ("compare.networks=resnet18", ["resnet18"]),
        ("compare.baselines=random", ["random"]),
        ("compare.budgets=bytes", ["bytes"]),
    ],
)
def test_every_list_takes_a_single_value(load, override, value):
    name, _, text = override.partition("=")
    section, _, key = name.rpartition(".")
    assert value_at(load("", override), name) == value
    nested = text
    for part in reversed(name.split(".")):
        nested = f"{{{part}: {nested}}}"
    assert value_at(load(nested), name) == value
    assert key in keys.section_of(keys.annotation_of(config.Config, section)).model_fields


def test_all_lists_are_covered_by_the_test_above():
    lists = {key.name for key in ALL_KEYS if typing.get_origin(key.field.annotation) is list}
    lists -= {"select.window"}  # which takes two values
    assert lists == {"evaluate.networks", "evaluate.bounds", "evaluate.controls", "sweep.controls", "studies.run",
                     "studies.stability.networks",
                     "studies.stability.steps", "studies.across.keep", "studies.interaction.drops",
                     "compare.labels", "compare.networks", "compare.baselines", "compare.budgets"}  # fmt: skip


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


def test_a_preset_sets_the_keys_that_are_not_given(load):
    fast = config.sections.PRESETS["fast"]
    loaded = load("score: {preset: fast, width: 8}", "score.lr=0.5").score
    assert (loaded.width, loaded.lr, loaded.share) == (8, 0.5, fast["share"])
    assert load("", "score.preset=fast").score == load("score: {preset: fast}").score
    with pytest.raises(UserError, match="'fats'"):
        load("score: {preset: fats}")


def test_a_preset_replaces_what_was_set_before_and_goes_with_all_its_keys(load):
    fast = config.sections.PRESETS["fast"]
    given = load("score: {trials: 7, width: 9, batch: 64}", "score.width=8", "score.preset=fast").score
    assert (given.trials, given.width, given.batch) == (fast["trials"], 8, 64)
    chosen = load("score: {preset: fast}")
    assert config.with_overrides(chosen, {"score.trials": 3}).score.width == fast["width"]
    assert config.with_overrides(load("score: {width: 9}"), {"score.preset": "fast"}).score == chosen.score
    assert config.with_overrides(chosen, {"score.preset": None}).score == load("").score
    assert config.load({"score": {"width": 8, "preset": "fast"}}).score.width == 8


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


def test_many_problems_are_cut(load):
    with pytest.raises(UserError, match=r"unknown section a19 .*\nand 30 more problems$"):
        load("\n".join(f"a{i}: 1" for i in range(50)))


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_an_empty_or_impossible_name_is_refused(name):
    with pytest.raises(UserError, match=r"CONFIG is .*give a YAML file"):
        config.load(name)


def test_a_run_folder_of_another_version_says_so(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {"later": {}}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown section later .*\n.* of another version"):
        config.load(tmp_path)
    (tmp_path / "run.json").write_text('{"config": []}', encoding="utf-8")
    with pytest.raises(UserError, match=r"^the content = \[\] \(in .*run\.json\) is not allowed"):
        config.load(tmp_path)


def test_a_run_folder_of_the_version_before_the_search_among_candidates_is_read(tmp_path):
    auto = {"seeds": 2, "tolerance": 1.0, "lowest": 0.001, "points": 6}
    written = {"select": {"keep": 0.5, "auto": auto}}
    (tmp_path / "run.json").write_text(json.dumps({"config": written}), encoding="utf-8")
    assert config.load(tmp_path).select.keep == 0.5


def test_a_run_folder_gives_neither_its_redo_nor_a_run_to_reuse_that_is_gone(tmp_path):
    """run.redo would move results of later commands aside, and a run that is gone would refuse every command."""
    written = {"run": {"redo": "select", "reuse": str(tmp_path / "other")}, "select": {"keep": 0.5}}
    (tmp_path / "run.json").write_text(json.dumps({"config": written}), encoding="utf-8")
    assert config.load(tmp_path) == config.load({"select.keep": 0.5, "run.dir": tmp_path})
    (tmp_path / "other").mkdir()
    assert config.load(tmp_path).run.reuse == str(tmp_path / "other")


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


@pytest.mark.parametrize("name", ["a\0b", "a\udcff"])
def test_a_run_folder_that_cannot_be_written_is_refused(name):
    with pytest.raises(UserError, match=r"run\.dir = .* name another folder"):
        config.load({"run.dir": name})


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

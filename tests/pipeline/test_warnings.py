"""Warnings at the start of a command: keys that have no effect, a missing test split, classes that keep too little."""

from __future__ import annotations

import io

import pytest
import yaml
from conftest import TINY
from plan_cases import measure_quickly
from rich.console import Console

from distill_at_scale import cli
from distill_at_scale.config import shipped
from distill_at_scale.config.fields import explicit_keys
from distill_at_scale.config.keys import annotation_of
from distill_at_scale.config.load import Config, load, validate, with_overrides
from distill_at_scale.core.progress import Display
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.pipeline import warnings


def loaded(tmp_path, *overrides: str) -> Config:
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    return load(tmp_path / "empty.yaml", overrides)


CASES = [
    ("runtime.drop", ["runtime.drop=0.5"], ["runtime.rule=loss"]),
    ("runtime.refresh", ["runtime.refresh=5"], ["runtime.rule=ite"]),
    ("runtime.tail", ["runtime.rule=loss", "runtime.tail=0.2"], ["runtime.rule=ite"]),
    ("runtime.rule and runtime.drop", ["runtime.rule=loss", "runtime.drop=0.2", "distill.method=mtt"], ["distill.method=dm"]),
    ("data.path", ["data.path=/x"], ["data.source=imagefolder"]),
    ("data.fold", ["data.fold=2"], ["data.source=ucf101"]),
    ("data.annotations", ["data.annotations=x"], ["data.source=kinetics"]),
    ("data.synsets", ["data.synsets=x"], ["data.source=imagenet"]),
    ("data.image_column", ["data.image_column=x"], ["data.source=parquet"]),
    ("data.value_column", ["data.value_column=x"], ["data.source=tensors"]),
    ("data.stride", ["data.stride=2"], ["data.frames=8", "data.sampling=dense"]),
    ("data.stride", ["data.stride=2", "data.frames=8"], ["data.sampling=dense"]),
    ("data.decoder", ["data.decoder=pyav"], ["data.frames=8"]),
    ("data.quality", ["data.quality=80"], ["data.store=jpeg"]),
    ("data.imbalance", ["data.imbalance=5.0"], ["data.transform=long_tail"]),
    ("data.copies", ["data.copies=5"], ["data.transform=near_duplicates"]),
    ("data.variance_classes", ["data.variance_classes=5"], ["data.transform=low_variance"]),
    ("score.trials and score.lr", ["score.trials=2", "score.lr=0.1", "score.weights=x.pt"], ["score.weights=null"]),
    ("score.epochs", ["score.epochs=2", "score.criterion=random"], ["score.criterion=loss"]),
    ("score.early", ["score.early=2"], ["score.criterion=grand"]),
    ("score.late", ["score.late=2"], ["score.criterion=loss_converged"]),
    ("score.features", ["score.features=8"], ["score.criterion=[loss, herding]"]),
    ("score.late", ["score.late=2"], ["score.criterion=el2n_late"]),
    ("score.features", ["score.features=8"], ["score.criterion=[loss, clusters]"]),
    ("score.clusters", ["score.clusters=8"], ["score.criterion=[loss, clusters]"]),
    ("score.cad_windows and score.cad_length", ["score.cad_windows=1", "score.cad_length=2"], ["score.criterion=cad"]),
    ("score.neighbours", ["score.neighbours=8"], ["score.criterion=density"]),
    ("score.monte_carlo.subsets", ["score.monte_carlo.subsets=8"], ["score.criterion=monte_carlo"]),
    ("score.monte_carlo.steps", ["score.monte_carlo.steps=8", "score.criterion=monte_carlo"], ["score.monte_carlo.learn=dc"]),
    ("select.keep", ["select.keep=0.5", "select.per_class=3"], ["select.per_class=null"]),
    ("select.auto.seeds", ["select.auto.seeds=3"], ["select.keep=auto"]),
    ("select.stratum_start", ["select.stratum_start=0.5", "select.keep=0.1"], ["select.order=stratum"]),
    ("select.easiest", ["select.easiest=0.5"], ["select.order=easy_random"]),
    ("select.strata", ["select.strata=5"], ["select.order=coverage"]),
    ("select.window", ["select.window=[0.1, 0.5]"], ["select.order=window"]),
    ("distill.options", ["distill.options={a: 1}"], ["distill.method=tests.no:Method"]),
    ("distill.steps and distill.evaluate_every", ["distill.method=pca", "distill.steps=9", "distill.evaluate_every=3"],
     ["distill.method=dm"]),
    ("distill.checkpoint_every", ["distill.method=rded", "distill.checkpoint_every=3"], ["distill.method=sre2l"]),
    ("distill.steps", ["distill.method=coreset", "distill.steps=9"], ["distill.method=dc"]),
    ("distill.rded.teacher_lr", ["distill.method=rded", "distill.rded.teacher_lr=0.1", "distill.rded.teacher_weights=x"],
     ["distill.rded.teacher_weights=null"]),
    ("distill.tesla.label_lr", ["distill.method=tesla", "distill.tesla.label_lr=2", "distill.tesla.learn_labels=false"],
     ["distill.tesla.learn_labels=true"]),
    ("evaluate.bound_epochs", ["evaluate.bound_epochs=3"], ["evaluate.bounds=full"]),
    ("run.scratch", ["run.scratch=/x"], ["run.dir=s3://b/x"]),
    ("cluster.actors", ["cluster.actors=2", "cluster.address=none"], ["cluster.address=null"]),
    ("sweep.samples", ["sweep.samples=3"], ["sweep.search=random"]),
    ("sweep.grace", ["sweep.grace=3"], ["sweep.search=asha"]),
    ("studies.drop.drop", ["studies.drop.drop=0.2", "studies.run=stratified"], ["studies.run=[drop]"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "ignored", "used"), CASES, ids=[f"{case[0]} {case[2][0]}" for case in CASES])
def test_a_key_without_effect_is_said_and_one_with_effect_is_not(tmp_path, keys, ignored, used):
    lines = warnings.of_keys(loaded(tmp_path, *ignored))
    assert [line.partition(" ha")[0] for line in lines] == [keys]
    assert "{" not in lines[0]
    changed = [text for text in ignored if text.partition("=")[0] not in {new.partition("=")[0] for new in used}]
    if "tests.no:Method" in used[0]:  # a method of one's own need not exist for the table
        assert not any(row.condition(validate({"distill": {"method": "x:Y"}})) for row in warnings.NO_EFFECT
                       if row.keys == ("options",))  # fmt: skip
    else:
        assert warnings.of_keys(loaded(tmp_path, *changed, *used)) == []


def test_the_table_names_keys_of_the_schema():
    for row in warnings.NO_EFFECT:
        for key in (*(f"{row.section}.{key}" for key in row.keys), row.unless):
            assert annotation_of(Config, key) is not None, key
    assert set().union(*warnings.KEYS_OF_SOURCES.values()) <= set(SOURCES)


def test_defaults_are_never_reported():
    assert explicit_keys(Config()) == []
    assert warnings.of_keys(Config()) == []
    assert warnings.of_keys(validate({"data": {"frames": 8, "source": "ucf101"}})) == []


def test_only_keys_that_were_set_are_explicit_also_after_more_overrides():
    config = validate({"runtime": {"drop": 0.5}, "distill": {"dm": {"image_lr": 1.0}}})
    assert explicit_keys(config) == ["distill.dm.image_lr", "runtime.drop"]
    changed = with_overrides(config, {"runtime.tail": 0.1})
    assert set(explicit_keys(changed)) == {"distill.dm.image_lr", "runtime.drop", "runtime.tail", "data.chunk"}


def test_overrides_keep_the_size_of_a_chunk():
    """Ids of points depend on it."""
    assert with_overrides(Config(), {"data.frames": 8}).data.chunk == 1024
    assert with_overrides(validate({"data": {"frames": 8}}), {"data.frames": None}).data.chunk == 64


def test_what_a_sweep_or_a_study_varies_is_not_reported(tmp_path):
    assert warnings.of_keys(loaded(tmp_path, "runtime.drop=0.5", "sweep.space={runtime.rule: [none, loss]}")) == []
    sets = "studies.across.sets={a: {data.transform: long_tail}}"
    assert warnings.of_keys(loaded(tmp_path, "data.imbalance=5.0", sets)) == []


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_configurations_start_without_a_warning(name):
    assert warnings.of_keys(load(name)) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["distill.dm.image_lr=2"], "distill.dm.image_lr"),
        (["distill.method=dm", "distill.dm.image_lr=2"], None),
        (
            ["distill.dc.outer=2", "score.criterion=monte_carlo", "score.monte_carlo.learn=dc", "distill.method=dm"],
            None,
        ),
        (["distill.dc.outer=2", "distill.method=dm"], "distill.dc.outer"),
        (["distill.dm.image_lr=2", "sweep.space={distill.method: [dc, dm]}"], None),
    ],
)
def test_a_key_of_another_method_on_the_command_line_is_said(tmp_path, overrides, key):
    lines = warnings.of_overrides(loaded(tmp_path, *overrides), overrides)
    assert [line.partition(" has")[0] for line in lines] == ([key] if key else [])
    assert warnings.of_keys(validate({"distill": {"dm": {"image_lr": 2.0}}})) == []  # in a file it is fine


@pytest.mark.parametrize(
    ("select", "ipc", "names"),
    [
        ({"keep": 0.02}, 1, ["'a'"]),
        ({"keep": 0.02}, 10, ["'a'", "'b'"]),
        ({"keep": 0.1}, 1, []),
        ({"per_class": 3}, 3, ["'a'", "'b'", "'c'"]),
        ({"per_class": 4}, 3, []),
        ({"keep": "auto"}, 1, []),
        ({"keep": 0.02, "scope": "global"}, 1, []),  # known after selection only
    ],
)
def test_classes_that_keep_no_more_than_is_distilled_are_named(select, ipc, names):
    config = validate({"select": select, "distill": {"ipc": ipc}})
    lines = list(warnings.of_data(config, ["a", "b", "c"], [50, 500, 5000], 1000))
    assert len(lines) == bool(names)
    assert all(name in lines[0] for name in names)
    assert sum(f"'{name}'" in " ".join(lines) for name in "abc") == len(names)


def test_a_missing_test_split_is_said_with_the_key_that_makes_one():
    assert list(warnings.of_data(Config(), ["a"], [500], 1000)) == []
    (line,) = warnings.of_data(Config(), ["a"], [500], 2)
    assert "only 2 samples, and each is 50 points" in line
    (line,) = warnings.of_data(Config(), ["a"], [500], 0)
    assert "nothing will be evaluated; data.holdout=0.2 makes one" in line


def test_commands_warn_once_and_before_the_work(tmp_path, capsys, monkeypatch):
    measure_quickly(monkeypatch)
    path = tmp_path / "tiny.yaml"
    settings = {**TINY, "run": {"dir": str(tmp_path / "run")}, "runtime": {"drop": 0.5}, "select": {"per_class": 1}}
    settings["data"] = {key: value for key, value in TINY["data"].items() if key != "holdout"}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def warned(command: str) -> list[str]:
        assert cli.main([command, str(path), "distill.mtt.experts=2"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        said = [line for line in lines if line.startswith("warning: ")][:4]  # a run warns of its result, too
        expected = ("runtime.drop", "distill.mtt.experts", "test split", "'0', '1', '2'")
        assert [key in line for key, line in zip(expected, said, strict=True)] == [True] * 4, said
        work = [i for i, line in enumerate(lines) if line.startswith(("decode:", "measure:", "score: finished"))]
        assert lines.index(said[-1]) < max(work)
        return said

    assert warned("validate") == warned("plan") == warned("run")
    assert cli.main(["run", str(path), "distill.mtt.experts=2"]) == 0  # ingest is done, so the data are known at once
    assert capsys.readouterr().out.count("warning: there is no test split") == 1


def test_a_warning_is_said_through_the_display():
    console = Console(file=io.StringIO(), width=200)
    warnings.warn(validate({"runtime": {"drop": 0.5}}), Display(console))
    assert console.file.getvalue().startswith("warning: runtime.drop has no effect: runtime.rule is none")


def test_the_keys_of_a_run_folder_that_have_their_default_count_as_not_set(digits_run):
    config = load(digits_run.dir)
    assert config == digits_run.config.model_copy(update={"run": config.run})
    assert "runtime.drop" not in explicit_keys(config)
    assert warnings.of_keys(config) == []

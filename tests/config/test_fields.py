"""Which keys change results: declared on the fields, used by fingerprints, points, the automatic keep rate and sweeps."""

from __future__ import annotations

import pytest

from distill_at_scale.config.fields import changes_results, flatten, is_execution_key, result_values
from distill_at_scale.config.load import Config, validate, with_overrides
from distill_at_scale.config.sections import PRESETS


def keys_of(model, wanted, prefix="") -> set[str]:
    result = set()
    for name, field in model.model_fields.items():
        if changes_results(field) == wanted:
            result.add(prefix + name)
        elif hasattr(field.annotation, "model_fields"):
            result |= keys_of(field.annotation, wanted, f"{prefix}{name}.")
    return result


def test_the_keys_that_never_change_results():
    """A change of this list changes the fingerprints of run folders."""
    assert keys_of(Config, "never") == {
        "run.dir", "run.scratch", "run.retry_seconds", "run.reuse", "run.redo", "score.monte_carlo.at_once",
        "score.workers", "score.check_weights",
        "select.auto", "distill.workers", "distill.evaluate_every", "distill.checkpoint_every", "distill.hold",
        "cluster", "track", "sweep", "studies", "compare",
    }  # fmt: skip


def test_the_keys_whose_file_content_counts():
    assert keys_of(Config, "by content") == {
        "data.path", "data.class_names", "data.val_labels", "data.synsets", "data.annotations", "score.imported",
        "score.weights",
    }  # fmt: skip


def test_the_keys_that_were_added_later():
    assert keys_of(Config, "unless default") == {
        "data.value_column", "data.whiten", "data.train_split", "data.max_bytes", "data.transform", "data.imbalance",
        "data.copies", "data.variance_classes", "data.options",
        "data.label_pattern", "data.test_pattern", "data.rate", "data.seconds", "data.bands",
        "score.early", "score.late", "score.features", "score.neighbours", "score.clusters",
        "score.cad_windows", "score.cad_length", "score.checkpoints_per_epoch",
        "select.easiest", "select.strata", "select.window", "select.held_out", "evaluate.split",
        "score.imported_useful", "evaluate.control", "evaluate.controls",
        "distill.precision", "evaluate.precision", "select.refresh", "select.refresh_pool",
        "score.infobatch", "distill.sre2l.class_statistics", "distill.sre2l.first_layer", "distill.sre2l.crop_schedule",
        "distill.sre2l.blocks", "distill.sre2l.residual", "distill.sre2l.block_sizes",
        "distill.mtt.expert_infobatch", "distill.tesla.expert_infobatch",
        "distill.sre2l.teacher_infobatch", "distill.rded.teacher_infobatch",
        "compare.teacher.teacher_infobatch", "evaluate.bound_infobatch", "distill.pca", "distill.coreset",
    }  # fmt: skip


@pytest.mark.parametrize(
    "override",
    [{"distill.workers": 4}, {"cluster.actors": 2}, {"track": {"wandb": {}}}, {"data.path": "/x"}, {"run.dir": "y"},
     {"select.auto.seeds": 5}, {"score.monte_carlo.at_once": 1}],
)  # fmt: skip
def test_values_do_not_depend_on_where_and_how_a_run_works(override):
    config = Config()
    assert result_values(with_overrides(config, override)) == result_values(config)


def test_a_key_that_sets_others_counts_by_them_alone():
    assert keys_of(Config, "by others") == {"score.preset"}
    preset = validate({"score": {"preset": "fast"}})
    explicit = validate({"score": PRESETS["fast"]})
    for options in ({}, {"unused": True}, {"neutral": True, "locations": True}):
        assert result_values(preset, **options) == result_values(explicit, **options)


@pytest.mark.parametrize("section", ["distill", "evaluate"])
def test_a_resolved_precision_counts_where_it_differs_from_that_of_older_runs(section):
    def values(precision):
        return result_values(validate({section: {"precision": precision}}))

    assert values("fp32") == values("auto") == result_values(Config())
    assert values("bf16") == result_values(Config()) | {f"{section}.precision": "bf16"}


@pytest.mark.parametrize("override", [{"run.seed": 1}, {"data.copies": 6}, {"distill.dm.real_batch": 1}])
def test_values_depend_on_what_decides(override):
    assert result_values(with_overrides(Config(), override)) == result_values(Config()) | override


def test_later_keys_count_only_where_they_are_used():
    section = validate({"score": {"early": 3}}).score
    values = result_values(section, "score.")
    assert values["score.early"] == 3
    assert "score.late" not in values
    assert result_values(section, unused=True)["late"] == 5


def test_neutral_values_hold_every_key_of_ids_with_the_default_where_it_does_not_decide():
    config = validate({"distill": {"workers": 4, "ipc": 2}, "track": {"mlflow": {}}, "data": {"path": "/x"}})
    values = result_values(config, neutral=True)
    newer = {
        "score.cad_windows", "score.cad_length", "score.clusters", "score.checkpoints_per_epoch",
        "select.easiest", "select.strata", "select.window", "select.refresh", "select.refresh_pool",
        "select.held_out", "evaluate.split", "distill.sre2l.class_statistics", "distill.sre2l.first_layer",
        "distill.sre2l.crop_schedule", "distill.sre2l.blocks", "distill.sre2l.residual", "distill.sre2l.block_sizes",
    }  # fmt: skip
    sections = ("distill.pca.", "distill.coreset.")
    every = {
        key: value for key, value in flatten(Config()).items()
        if key not in newer and not key.startswith(sections) and not key.endswith("infobatch")
    }  # fmt: skip
    assert values == every | {"distill.ipc": 2}
    assert result_values(validate({"score": {"clusters": 3}}), neutral=True)["score.clusters"] == 3
    assert result_values(config, neutral=True, locations=True) == values | {"data.path": "/x"}


@pytest.mark.parametrize(
    ("key", "answer"),
    [("distill.workers", True), ("cluster.actors", True), ("cluster", True), ("score.monte_carlo.at_once", True),
     ("score.monte_carlo.subsets", False), ("distill", False), ("data.path", False), ("select.kep", False)],
)  # fmt: skip
def test_execution_keys_are_known_by_their_dotted_name(key, answer):
    assert is_execution_key(Config, key) is answer

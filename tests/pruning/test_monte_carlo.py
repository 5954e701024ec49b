"""Monte Carlo: draws, recovery of a planted signal, reliability, resuming, and the same bytes on Ray."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run, tiny_config, write_prepared
from rich.console import Console

from distill_at_scale.config.sections import MonteCarloSection
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pruning.scoring import extra_columns, monte_carlo, monte_carlo_utility
from distill_at_scale.pruning.scoring.columns import ExtraColumn
from distill_at_scale.pruning.selection import checks
from distill_at_scale.storage.run_dir import RunDir

SMALL = {"subsets": 12, "per_class": 20, "epochs": 3, "width": 4, "validation": 10, "at_once": 5}


def small_config(folder, **more):
    keys = {f"score__monte_carlo__{key}": value for key, value in {**SMALL, **more}.items()}
    return tiny_config(folder, score__criterion="monte_carlo", **keys)


@pytest.fixture(scope="module")
def prepared(digits_run):
    return PreparedDataset(digits_run.dir / "prepared")


class Counting(LocalExecutor):
    """Records which units were run."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.advanced = []

    def run_subsets(self, config, prepared):
        def run(folder, advance):
            def counted(count):
                self.advanced.append(count)
                advance(count)

            tasks.run_subsets(self, config, prepared.folder, folder, counted)

        return run


def subset_trials(config, folder, device):
    return tasks.RunSubsets(config, {"prepared": folder}, device, TimeSpent()).trials


def columns(config, prepared, executor=None):
    log = io.StringIO()
    run = RunDir(config.run.dir)
    run.create()
    display = Display(Console(file=log, width=250))
    loaded = extra_columns.load(config, run, prepared, (executor or Counting()).run_subsets(config, prepared), display)
    return loaded, log.getvalue()


def test_learned_and_tested_samples_of_a_subset_share_nothing():
    section = MonteCarloSection(per_class=5, validation=7)
    for subset in range(20):
        for drawn, count in zip(monte_carlo.draw_subset(0, subset, [30, 12, 9], section), (30, 12, 9), strict=True):
            assert len(drawn.members) == min(5, count // 2)
            assert len(drawn.validation) == min(7, count - len(drawn.members))
            assert len({*drawn.members, *drawn.validation}) == len(drawn.members) + len(drawn.validation)
            assert max(*drawn.members, *drawn.validation) < count


def test_a_subset_depends_on_seed_and_number_alone():
    section = MonteCarloSection(per_class=5)

    def members(seed, subset):
        return np.concatenate(
            [drawn.members for drawn in monte_carlo.draw_subset(seed, subset, [40, 40], section)]
        ).tolist()

    assert members(1, 7) == members(1, 7)
    assert members(1, 7) != members(1, 8)
    assert members(1, 7) != members(2, 7)


def test_every_sample_is_learned_from_about_as_often_and_tested_too():
    section, held, tested = MonteCarloSection(per_class=5, validation=5), np.zeros(20), np.zeros(20)
    for subset in range(400):
        (drawn,) = monte_carlo.draw_subset(0, subset, [20], section)
        held[drawn.members] += 1
        tested[drawn.validation] += 1
    assert held.sum() == tested.sum() == 2000
    assert held.min() > 60
    assert tested.min() > 60


def test_units_cover_every_subset_once():
    units = monte_carlo.subset_ranges(MonteCarloSection(subsets=21, at_once=8))
    assert units == [(0, 8), (8, 8), (16, 5)]


def by_hand(accuracies, counts, section, seed):
    """The slow reference: lists of accuracies per sample."""
    lists = [[[] for _ in range(count)] for count in counts]
    for subset, row in enumerate(accuracies):
        for label, drawn in enumerate(monte_carlo.draw_subset(seed, subset, counts, section)):
            for place in drawn.members:
                lists[label][place].append(float(row[label]))
    return [values for of_class in lists for values in of_class]


def test_utility_error_and_count_are_those_of_the_subsets_that_held_a_sample():
    section, counts = MonteCarloSection(subsets=30, per_class=3), [12, 8]
    accuracies = np.random.default_rng(0).random((30, 2)).astype(np.float32)
    estimate = monte_carlo_utility.estimate(accuracies, counts, section, 5)
    for place, values in enumerate(by_hand(accuracies, counts, section, 5)):
        assert estimate.held[place] == len(values)
        assert estimate.utility[place] == pytest.approx(np.mean(values), abs=1e-6)
        if len(values) > 1:
            assert estimate.error[place] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-6)


def test_a_sample_that_no_subset_held_gets_the_mean_of_its_class_and_is_counted():
    section, counts = MonteCarloSection(subsets=3, per_class=3), [20, 10]
    accuracies = np.array([[0.2, 0.9], [0.4, 0.8], [0.6, 0.7]], np.float32)
    estimate, lists = (
        monte_carlo_utility.estimate(accuracies, counts, section, 0),
        by_hand(accuracies, counts, section, 0),
    )
    missed = [place for place, values in enumerate(lists) if not values]
    assert estimate.facts["missed"] == len(missed) > 0
    assert np.isfinite(estimate.utility).all()
    held = [np.mean(values) for values in lists[:20] if values]
    assert estimate.utility[missed[0]] == pytest.approx(np.mean(held), abs=1e-6)
    assert any(
        "are in no subset and get the mean of their class" in line
        for line in monte_carlo_utility.summary(estimate.facts)
    )


def planted(subsets, noise, per_class=5, count=40, seed=0):
    """Utilities from accuracies that are the mean worth of a subset's samples plus noise, and the worths."""
    section, chance = MonteCarloSection(subsets=subsets, per_class=per_class), np.random.default_rng(seed)
    worth = chance.normal(0.5, 0.1, (2, count))
    drawn = (monte_carlo.draw_subset(0, k, [count, count], section) for k in range(subsets))
    accuracies = np.array([[worth[c][d.members].mean() for c, d in enumerate(both)] for both in drawn])
    accuracies = accuracies + chance.normal(0, noise, accuracies.shape)
    return monte_carlo_utility.estimate(accuracies.astype(np.float32), [count, count], section, 0), worth.reshape(-1)


def test_a_planted_utility_is_recovered_as_well_as_the_reliability_says():
    for subsets, noise in ((150, 0.0), (150, 0.05), (600, 0.05)):
        estimate, worth = planted(subsets, noise)
        accuracies, true = (
            (v.reshape(2, -1) - v.reshape(2, -1).mean(1)[:, None]).reshape(-1) for v in (estimate.utility, worth)
        )
        truth = (
            np.corrcoef(accuracies, true)[0, 1] ** 2
        )  # reliability is the squared correlation with the truth, within classes
        assert estimate.facts["reliability"] == pytest.approx(truth, abs=0.15)
        assert estimate.facts["split_half"] == pytest.approx(truth, abs=0.15)


def test_the_number_of_subsets_that_are_missing_is_about_right():
    few, _ = planted(150, 0.05)
    more, _ = planted(150 + few.facts["more_subsets"], 0.05)
    assert few.facts["more_subsets"] > 0
    assert more.facts["reliability"] == pytest.approx(0.8, abs=0.06)


def test_pure_noise_has_no_reliability_and_promises_nothing():
    section = MonteCarloSection(subsets=200, per_class=5)
    accuracies = np.full((200, 2), 0.5, np.float32)
    estimate = monte_carlo_utility.estimate(accuracies, [40, 40], section, 0)
    assert estimate.facts["reliability"] == 0
    assert estimate.facts["more_subsets"] is None
    assert any("cannot estimate how many" in line for line in monte_carlo_utility.summary(estimate.facts))


def test_broken_samples_are_worth_less(tmp_path):
    """Half of each class is noise: networks that learn from it are worse, and its samples have a lower utility."""
    chance = np.random.default_rng(0)
    pixels, labels = np.zeros((120, 1, 8, 8), np.uint8), np.repeat([0, 1, 2], 40)
    for k, label in enumerate(labels):
        pixels[k, 0, 2 * label : 2 * label + 2] = 200
    pixels = np.clip(pixels + chance.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
    for first in (0, 40, 80):
        pixels[first : first + 20] = chance.integers(0, 255, (20, 1, 8, 8))
    prepared = write_prepared(tmp_path / "prepared", pixels, labels)
    config = small_config(tmp_path / "run", subsets=60, per_class=3, epochs=6, validation=20)
    added, _ = columns(config, prepared)
    scores, broken = added["monte_carlo"].scores, (np.arange(120) % 40) < 20
    assert added["monte_carlo"].useful == "high"
    assert scores[broken].mean() + 0.03 < scores[~broken].mean()


def test_the_command_says_error_reliability_and_what_is_missing_and_leaves_a_table(tmp_path, prepared):
    config = small_config(tmp_path / "run")
    added, log = columns(config, prepared)
    assert "Monte Carlo: 12 subsets, each sample in" in log
    assert "standard error" in log
    assert "reliability" in log
    table = pq.read_table(tmp_path / "run" / "monte_carlo.parquet")
    assert table.column_names == ["sample_id", "label", "monte_carlo", "standard_error", "held"]
    ids, labels = prepared.index()
    assert (table["sample_id"].to_pylist(), table["label"].to_pylist()) == (ids, labels.tolist())
    assert checks.monte_carlo_facts(tmp_path / "run" / "monte_carlo.parquet") == added["monte_carlo"].facts
    assert list(extra_columns.outputs(config, RunDir(tmp_path / "run"))) == [tmp_path / "run" / "monte_carlo.parquet"]


def test_an_interrupted_command_resumes_and_more_subsets_reuse_the_finished_ones(tmp_path, prepared):
    expected, _ = columns(small_config(tmp_path / "whole"), prepared)
    first = small_config(tmp_path / "run", subsets=10)
    columns(first, prepared)
    executor = Counting()
    again, _ = columns(small_config(tmp_path / "run"), prepared, executor)
    assert executor.advanced == [10, 2]  # the first ten exist already
    assert again["monte_carlo"].scores.tobytes() == expected["monte_carlo"].scores.tobytes()
    executor = Counting()
    columns(small_config(tmp_path / "run"), prepared, executor)
    assert executor.advanced == [12]


def test_the_size_of_a_unit_does_not_matter(tmp_path, prepared):
    added = [columns(small_config(tmp_path / str(n), at_once=n), prepared)[0]["monte_carlo"] for n in (1, 12)]
    assert added[0].scores.tobytes() == added[1].scores.tobytes()


def test_pixels_that_do_not_fit_are_read_as_they_are_needed(tmp_path, prepared, monkeypatch):
    config = small_config(tmp_path / "run")
    held = subset_trials(config, prepared.folder, torch.device("cpu"))
    monkeypatch.setattr(monte_carlo, "HELD_BYTES", 0)
    read = subset_trials(config, prepared.folder, torch.device("cpu"))
    assert held.pixels is not None
    assert read.pixels is None
    assert torch.equal(held.run(3), read.run(3))


def test_subsets_may_be_distilled_first(tmp_path, prepared):
    config = small_config(tmp_path / "run", subsets=2, learn="dc", steps=2, epochs=10)
    trials = subset_trials(config, prepared.folder, torch.device("cpu"))
    drawn = monte_carlo.draw_subset(0, 0, prepared.counts(), config.score.monte_carlo)
    images, labels = trials.distil({c: trials._take(c, parts.members) for c, parts in enumerate(drawn)}, 0)
    assert images.shape == (3, *prepared.shape)
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(trials.run(0), trials.run(0))
    plain = small_config(tmp_path / "run", subsets=2)
    assert monte_carlo.work_key(config, prepared) != monte_carlo.work_key(plain, prepared)


def test_a_rate_that_is_too_high_is_named(tmp_path, prepared):
    config = small_config(tmp_path / "run", lr=1e30)
    with pytest.raises(DistillationDiverged, match=r"score.monte_carlo.lr = 1e"):
        subset_trials(config, prepared.folder, torch.device("cpu")).run(0)


def test_too_few_subsets_are_refused_with_the_number_that_is_needed(tmp_path, prepared):
    executor = Counting()
    with pytest.raises(UserError, match=r"subsets = 20: .* would be in 0\.\d\d subsets .*; use at least \d+ subsets"):
        columns(small_config(tmp_path / "run", subsets=20, per_class=1), prepared, executor)
    assert executor.advanced == []


def test_a_class_of_one_sample_is_refused(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", np.zeros((5, 1, 8, 8), np.uint8), np.array([0, 0, 0, 0, 1]))
    with pytest.raises(UserError, match="class 'c1' has 1 training samples"):
        columns(small_config(tmp_path / "run"), prepared)


def test_a_column_can_be_read_in_any_order_and_refuses_unknown_ids():
    column = ExtraColumn("low", pa.array(["a", "b", "c", "d"]), np.array([1, 2, 3, 4], np.float32))
    assert column.values(pa.array(["a", "b"])).tolist() == [1, 2]
    assert column.values(pa.chunked_array([["c"], ["d"]])).tolist() == [3, 4]
    assert column.values(pa.array(["a", "b"])).tolist() == [1, 2]  # starts over
    assert column.values(pa.array(["d", "a"])).tolist() == [4, 1]
    with pytest.raises(KeyError, match="x"):
        column.values(pa.array(["x"]))


def test_noisy_utilities_are_warned_about_at_select(tmp_path):
    """With the break point of an earlier interaction study."""
    run = Run(tiny_config(tmp_path / "run", select__keep=0.5)).stages("ingest", "score")
    folder = tmp_path / "run" / "studies"
    folder.mkdir()
    (folder / "interaction.json").write_text(json.dumps({"facts": {"break_drop": 0.3}}), encoding="utf-8")
    run.stages("select")
    facts = json.loads(pq.read_schema(tmp_path / "run" / "manifest.parquet").metadata.get(b"selection", b"{}") or b"{}")
    facts = facts or json.loads(pq.ParquetFile(tmp_path / "run" / "manifest.parquet").metadata.metadata[b"selection"])
    assert any("accuracy broke at 30.0% and held at 0.0%" in line for line in facts["warnings"])
    assert "warning: " in run.text


@pytest.mark.usefixtures("ray_session")
def test_utilities_are_the_same_bytes_on_ray(tmp_path, prepared):
    pytest.importorskip("ray")
    from distill_at_scale.cluster.executor import RayExecutor

    config, advanced = small_config(tmp_path / "run"), []
    for name in ("ray", "local"):
        (tmp_path / name).mkdir()
    on_ray, local = RayExecutor(config, lambda text: None), LocalExecutor(torch.device("cpu"))
    tasks.run_subsets(on_ray, config, prepared.folder, tmp_path / "ray", advanced.append)
    tasks.run_subsets(local, config, prepared.folder, tmp_path / "local", lambda count: None)
    assert sum(advanced) == 12
    for unit in monte_carlo.subset_ranges(config.score.monte_carlo):
        here, there = (monte_carlo.subset_part_path(tmp_path / name, unit).read_bytes() for name in ("ray", "local"))
        assert here == there

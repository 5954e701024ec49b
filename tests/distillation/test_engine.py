"""The loop: resume, runtime pruning switched off, poisoned samples, divergence, and two workers in a process group."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from distill_runs import CPU, LOOPS, elsewhere, lines, same, start, stop_before
from safetensors.torch import load_file

from distill_at_scale.core.collectives import SingleProcess, current_workers
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import pixels_of, to_table
from distill_at_scale.data.prepared.manifest import kept
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.checkpoint import Timer, checkpoint_step
from distill_at_scale.distillation.engine import Distillation
from distill_at_scale.distillation.student import TrainingProtocol

FORMATION = {
    "distill__method": "idc",
    "distill__ipc": 2,
    "distill__idc__inner": 3,
    "distill__idc__network_samples": 20,
    "distill__idc__network_batch": 8,
    "distill__idc__real_batch": 12,
}
CASES = {
    "dc": {**LOOPS, "distill__steps": 5},
    "dc, runtime": {**LOOPS, "distill__steps": 5, "runtime__rule": "loss", "runtime__drop": 0.3},
    "dsa": {**LOOPS, "distill__method": "dsa", "distill__dsa__outer": 2, "distill__dsa__inner": 2, "distill__steps": 5},
    "dm": {"distill__method": "dm", "distill__steps": 5},
    "dm, shards": {"distill__method": "dm", "distill__steps": 5, "distill__hold": "shards"},
    "dm, runtime": {"distill__method": "dm", "distill__steps": 7, "runtime__rule": "loss", "runtime__refresh": 4},
    "dc, effects": {**LOOPS, "distill__steps": 5, "runtime__rule": "ite", "runtime__refresh": 3},
    "dsa, effects": {
        "distill__method": "dsa",
        "distill__dsa__outer": 2,
        "distill__dsa__inner": 1,
        "distill__steps": 5,
        "runtime__rule": "ite",
        "runtime__refresh": 3,
    },
    "dm, effects": {"distill__method": "dm", "distill__steps": 7, "runtime__rule": "ite", "runtime__refresh": 4},
    "idc": {**FORMATION, "distill__steps": 5},
    "idc, effects": {
        **FORMATION,
        "distill__steps": 5,
        "distill__hold": "shards",
        "runtime__rule": "ite",
        "runtime__refresh": 3,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_equals_an_uninterrupted_run(places, case, stop):
    """Checkpoints come every two steps: none yet at step 1, a fresh one at 2, and one step to repeat at 3."""
    uninterrupted = start(elsewhere(places, "whole"), **CASES[case]).run()
    parts = elsewhere(places, "parts")
    first = start(parts, **CASES[case])
    stop_before(first, stop)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert parts.state.exists() is (stop > 1)
    assert same(start(parts, **CASES[case]).run(), uninterrupted)


@pytest.mark.parametrize(("waited", "took", "step"), [(0, 0.1, 0), (61, 0.1, 1), (61, 10, 0), (201, 10, 1)])
def test_a_checkpoint_is_due_once_a_minute_but_where_saving_takes_long(places, waited, took, step):
    """Of 10 s: every 200 s, so that it takes a twentieth of the time."""
    slow = start(places, distill__checkpoint_every=1000)
    slow.timer.took = took
    slow.timer.last -= waited
    stop_before(slow, 2)
    with pytest.raises(KeyboardInterrupt):
        slow.run()
    assert checkpoint_step(places.state) == step


def test_how_long_saving_took_decides_when_it_is_due_again(monkeypatch):
    clock = Mock(return_value=100.0)
    monkeypatch.setattr("distill_at_scale.distillation.checkpoint.time", Mock(monotonic=clock))
    timer = Timer()

    def is_due(now):
        clock.return_value = now
        return timer.is_due

    assert [is_due(159), is_due(161)] == [False, True], "a minute after 100 s"
    timer.saved(began=151)
    assert [is_due(360), is_due(362)] == [False, True], "it took 10 s, so 200 s after 161 s"


def test_a_finished_distillation_is_not_done_again(places):
    first = start(places).run()
    again = start(places)
    stop_before(again, 0)
    assert same(again.run(), first)


@pytest.mark.parametrize("case", ["dc", "dsa", "dm"])
def test_a_seed_decides_the_set(places, case):
    first, same_seed = (start(elsewhere(places, name), **CASES[case]).run() for name in ("a", "b"))
    other = start(elsewhere(places, "c"), run__seed=1, **CASES[case]).run()
    assert same(first, same_seed)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("case", ["dc", "dsa", "dm"])
def test_a_rate_of_zero_is_bit_identical_to_no_runtime_pruning(places, case):
    none = start(elsewhere(places, "none"), **CASES[case], runtime__rule="none").run()
    zero = start(elsewhere(places, "zero"), **CASES[case], runtime__rule="loss", runtime__drop=0.0).run()
    some = start(elsewhere(places, "some"), **CASES[case], runtime__rule="loss", runtime__drop=0.5).run()
    assert same(none, zero)
    assert not torch.equal(none.images, some.images)


def poison(prepared: Path, kept: set[str]) -> int:
    """Random pixels for every training sample that is not kept; returns how many."""
    chance, count = np.random.default_rng(0), 0
    for path in (prepared / "train").glob("shard-*.parquet"):
        file = pq.ParquetFile(path)
        groups = [file.read_row_group(g) for g in range(file.num_row_groups)]
        with pq.ParquetWriter(path.with_suffix(".new"), file.schema_arrow) as writer:
            for table in groups:
                ids, pixels = table["sample_id"].to_pylist(), pixels_of(table).copy()
                rows = [k for k, name in enumerate(ids) if name not in kept]
                pixels[rows] = chance.integers(0, 256, pixels[rows].shape, np.uint8)
                writer.write_table(to_table(ids, table["label"].to_numpy(), pixels))
                count += len(rows)
        path.with_suffix(".new").replace(path)
    return count


@pytest.mark.parametrize("case", CASES)
def test_pruned_samples_are_never_read(places, tmp_path, case):
    poisoned = replace(elsewhere(places, "poisoned"), prepared=tmp_path / "prepared")
    shutil.copytree(places.prepared, poisoned.prepared)
    assert poison(poisoned.prepared, set(kept(places.manifest).to_pylist())) > 100
    assert same(start(poisoned, **CASES[case]).run(), start(elsewhere(places, "clean"), **CASES[case]).run())


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_the_set_does_not_depend_on_the_placement_of_kept_samples(places, method):
    holds = ("auto", "device", "host", "shards")
    sets = [start(elsewhere(places, hold), **CASES[method], distill__hold=hold).run() for hold in holds]
    assert all(same(sets[0], other) for other in sets[1:])


def test_the_placement_of_kept_samples_is_logged_once(places):
    reported = []
    config = tiny_config("unused", distill__steps=3, distill__hold="shards")
    Distillation(config, places, SingleProcess(), CPU, reported.append).run()
    placements = [line["held"] for line in reported if "held" in line]
    assert len(placements) == 1
    assert "stay on disk" in placements[0]
    assert json.loads(places.log.read_text(encoding="utf-8").splitlines()[0])["held"] == placements[0]


def test_the_kept_samples_do_matter(places, tmp_path):
    poisoned = replace(elsewhere(places, "poisoned"), prepared=tmp_path / "prepared")
    shutil.copytree(places.prepared, poisoned.prepared)
    poison(poisoned.prepared, set())
    assert not same(start(poisoned).run(), start(elsewhere(places, "clean")).run())


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_divergence_names_class_step_and_rate_and_keeps_a_finite_state(places, method):
    with pytest.raises(
        DistillationDiverged,
        match=rf"class '\d' is not finite at step \d+, image learning rate 1e\+30.*{method}\.image_lr",
    ):
        start(places, distill__method=method, distill__steps=20, **{f"distill__{method}__image_lr": 1e30}).run()
    state = load_file(places.state)
    assert {f"images/{c}" for c in range(3)} <= set(state)
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())


def test_the_log_has_the_loss_of_every_step(places):
    start(places, distill__steps=4).run()
    assert [line["step"] for line in lines(places)] == [1, 2, 3, 4]
    assert all(line["stage"] == "distill" and line["of"] == 4 and line["loss"] > 0 for line in lines(places))


def test_a_step_that_is_done_again_is_logged_once(places):
    first = start(places, distill__steps=6)
    stop_before(first, 3)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    start(places, distill__steps=6).run()
    assert [line["step"] for line in lines(places)] == [1, 2, 3, 4, 5, 6]


def test_a_long_log_is_thinned_out(places, monkeypatch):
    monkeypatch.setattr(distill, "LOG_LINES", 3)
    start(places, distill__steps=10, distill__method="dm").run()
    assert [line["step"] for line in lines(places)] == [3, 6, 9, 10]


def test_intermediate_accuracy_is_logged_and_changes_nothing(places):
    plain = start(elsewhere(places, "plain"), distill__steps=4).run()
    watched = elsewhere(places, "watched")
    assert same(start(watched, distill__steps=4, distill__evaluate_every=2, evaluate__epochs=1).run(), plain)
    assert [line["step"] for line in lines(watched) if "top1" in line] == [2, 4]


def test_the_card_says_what_the_set_is(places):
    card = start(places, **CASES["dc, runtime"]).run().card
    expected = {
        "class_names": ["0", "1", "2"],
        "shape": [1, 8, 8],
        "method": "dc",
        "images_per_class": 2,
        "steps": 5,
        "seed": 0,
        "protocol": TrainingProtocol(300).card(),
    }
    assert {key: card[key] for key in expected} == expected
    assert card["runtime"]["rule"] == "loss"
    assert card["method_options"]["outer"] == 2
    prepared = PreparedDataset(places.prepared)
    assert (card["normalization"]["mean"], card["normalization"]["std"]) == (prepared.mean, prepared.std)
    json.dumps(card)


def test_snapshots_are_taken_from_the_start_to_the_end(places):
    synthetic = start(places, distill__steps=20, distill__method="dm").run()
    assert list(synthetic.snapshots) == [0, 1, 4, 10, 20]
    assert {tuple(s.shape) for s in synthetic.snapshots.values()} == {(3, 1, 8, 8)}
    assert torch.equal(synthetic.snapshots[20], synthetic.pixels())


def test_distillation_moves_the_images_towards_the_data(places):
    start(places, distill__method="dm", distill__steps=60, distill__dm__augment="none").run()
    losses = [line["loss"] for line in lines(places)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_what_cannot_work_is_refused_before_the_start(places, make_config):
    prepared = PreparedDataset(places.prepared)
    with pytest.raises(UserError, match=r"keeps no sample of the class '1'; raise select\.keep"):
        distill.check_inputs(make_config("x"), prepared, [5, 0, 5])
    with pytest.raises(UserError, match=r"the class '2' has 3 samples, fewer than distill\.ipc = 4"):
        distill.check_inputs(make_config("x", distill__method="dm", distill__ipc=4), prepared, [5, 5, 3])
    distill.check_inputs(make_config("x", distill__method="dc", distill__ipc=4), prepared, [5, 5, 3])  # from noise
    with pytest.raises(UserError, match=r"distill\.workers = 4 is more than the 3 classes"):
        distill.check_inputs(make_config("x", distill__workers=4), prepared, [5, 5, 5])


def test_a_custom_method(places):
    synthetic = start(places, distill__method="test_engine:Frozen", distill__options={"level": 0.25}).run()
    assert torch.equal(synthetic.images, torch.full((3, 1, 8, 8), 0.25))
    assert synthetic.card["method_options"] == {"level": 0.25}


class Frozen:
    """A method that moves nothing."""

    parallel, default_steps = "classes", 3
    init_of = staticmethod(lambda config: "noise")
    protocol = staticmethod(lambda config: TrainingProtocol(1))

    def __init__(self, context):
        self.context = context

    def prepare(self, real):
        self.images = torch.full(
            (len(self.context.labels), *self.context.spec.shape), self.context.config.distill.options["level"]
        )

    def step(self, i):
        return {"loss": 0.0}

    def snapshot(self):
        return self.images, torch.tensor(self.context.labels)

    def state_dict(self):
        return {f"images/{c}": self.images[k] for k, c in enumerate(self.context.labels)}

    def load_state_dict(self, state):
        self.images = torch.stack([state[f"images/{c}"] for c in self.context.labels])


def test_alone_means_solo():
    workers = current_workers(CPU)
    assert (workers.rank, workers.size) == (0, 1)
    assert (workers.gather(3), workers.broadcast(4), workers.all_reduce_max(0), workers.all_reduce_max(2)) == (
        [3],
        4,
        0,
        2,
    )
    assert workers.smallest(None) is None

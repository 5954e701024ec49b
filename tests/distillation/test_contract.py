"""The contract of a method (methods/contract.py), for each entry of METHODS.

A method runs with its own small settings where SMALL has some, else with its defaults, on the tiny digits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, tiny_config

from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.engine import (
    DistillPaths,
    make_network,
    method_class,
    method_context,
    missing_networks,
)
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.base import Cost, FinalOutputs
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pruning.scoring.scorer import score_part_path

CPU = torch.device("cpu")
NAMES = sorted(METHODS)


def config_of(method: str, **keys: Any):
    sections = {f"distill__{method}": SMALL[method]} if method in SMALL else {}
    return tiny_config("unused", distill__method=method, distill__ipc=2, distill__steps=3, **sections, **keys)


@pytest.fixture(scope="module")
def made_networks(digits_run, tmp_path_factory):
    """The networks of each method, trained at first use, once for all tests."""
    folders: dict[str, Path] = {}

    def make(method: str, places: DistillPaths) -> DistillPaths:
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            own = replace(places, networks=folders[method])
            for name in missing_networks(config_of(method), own):
                make_network(config_of(method), own, name, CPU)
            assert missing_networks(config_of(method), own) == []
            if method_class(config_of(method)).ranks_patches:
                rank(config_of(method), own)
        return replace(places, networks=folders[method])

    return make


def rank(config, places: DistillPaths) -> None:
    """Rank the patches as the pipeline does."""
    chunks, pieces = (
        PreparedDataset(places.prepared).chunks("train"),
        patch_ranking.parts_folder(places.networks, config),
    )
    pieces.mkdir(parents=True)
    candidates = patch_ranking.draw_candidates(places.manifest, config, pieces)
    tasks.rank_patches(LocalExecutor(), config, places, chunks, lambda samples: None)
    paths = [score_part_path(pieces, chunk) for chunk in chunks]
    patch_ranking.merge(paths, candidates, config.distill.rded.crops, patch_ranking.table_path(places.networks, config))


@pytest.fixture
def start(places, made_networks):
    """start(method): a prepared backend of all classes."""

    def ready(method: str):
        config, where = config_of(method), made_networks(method, places)
        prepared = PreparedDataset(where.prepared)
        context = method_context(config, prepared, where, SingleProcess(), CPU)
        backend = method_class(config)(context)
        first = method_class(config).first_kept(config)
        seed = config.distill_seed
        backend.prepare(ClassSampler.load(prepared, where.manifest, context.labels, seed, CPU, first=first))
        return backend

    return ready


def copied(state):
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("method", NAMES)
def test_a_method_implements_the_whole_contract(method):
    config = config_of(method)
    method_type = method_class(config)
    assert method_type.parallel in ("classes", "replicate")
    assert method_type.default_steps >= 1
    assert isinstance(method_type.no_runtime, str)
    assert method_type.batch_norm in ("refused", "wanted", "any")
    assert method_type.init_of(config) in ("noise", "real")
    protocol = method_type.protocol(config)
    assert isinstance(protocol, TrainingProtocol)
    assert TrainingProtocol.from_card(json.loads(json.dumps(protocol.card()))) == protocol
    names = method_type.networks(config)
    assert len(set(names)) == len(names)
    assert json.loads(json.dumps(method_type.network_options(config))) is not None
    assert bool(names) == bool(method_type.network_options(config))
    for cost in method_type.costs(config):
        assert isinstance(cost, Cost)
        assert cost.images in ("kept", "synthetic")
        assert cost.passes >= 0, asdict(cost)


@pytest.mark.parametrize("method", NAMES)
def test_a_step_gives_numbers_and_the_set_has_its_shape(method, start):
    backend = start(method)
    for i in range(2):
        metrics = backend.step(i)
        assert metrics
        assert all(isinstance(value, float) and value == value for value in metrics.values())
    images, labels = backend.snapshot()
    assert images.shape == (6, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.device.type == "cpu"
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not images.requires_grad
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("method", NAMES)
def test_a_step_makes_the_draws_that_are_scheduled_for_it(method, start, monkeypatch):
    backend, asked, draw = start(method), [], ClassSampler.draw

    def spy(self, labels, n, purpose, *index):
        asked.append(DrawRequest(tuple(labels), n, purpose, index))
        return draw(self, labels, n, purpose, *index)

    monkeypatch.setattr(ClassSampler, "draw", spy)
    for i in (0, 2):
        scheduled = list(backend.draws(i))
        asked.clear()
        backend.step(i)
        assert asked == scheduled
    assert bool(asked) == (method in ("dc", "dsa", "dm", "idc"))


def test_a_run_from_shards_reads_every_draw_in_advance(places):
    run = distill.Distillation(config_of("idc", distill__hold="shards"), places, SingleProcess(), CPU)
    started_with = run.sampler.lookahead.misses  # the initial images
    run.run()
    assert run.sampler.lookahead.misses == started_with
    assert run.sampler.lookahead.hits > 3 * 3


@pytest.mark.parametrize("method", NAMES)
def test_a_state_continues_with_the_same_bytes(method, start):
    uninterrupted, resumed = start(method), start(method)
    uninterrupted.step(0)
    state = copied(uninterrupted.state_dict())
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in state.values())
    resumed.load_state_dict(copied(state))
    again = resumed.state_dict()
    assert sorted(again) == sorted(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    uninterrupted.step(1)
    resumed.step(1)
    for a, b in zip(uninterrupted.snapshot(), resumed.snapshot(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", NAMES)
def test_the_conclusion_fits_the_set_and_its_protocol(method, start):
    backend = start(method)
    backend.step(0)
    images, labels = backend.snapshot()
    outputs = backend.finalize(images, labels)
    assert isinstance(outputs, FinalOutputs)
    assert all(isinstance(value, torch.Tensor) for value in outputs.extras.values())
    json.dumps(dict(outputs.card))
    expected = method_class(config_of(method)).protocol(config_of(method))
    assert TrainingProtocol.from_card(expected.card() | dict(outputs.protocol))


@pytest.mark.parametrize("method", NAMES)
def test_the_loop_makes_a_set_that_can_be_saved_and_trained_on(method, places, made_networks, tmp_path):
    config, where = config_of(method), made_networks(method, places)
    result = distill.Distillation(config, where, SingleProcess(), CPU).run()
    result.save(tmp_path / "set")
    assert result.card["method"] == method
    training = result.training_set()
    assert len(training.images) == len(training.labels) > 0
    assert isinstance(result.protocol, TrainingProtocol)


def test_networks_train_with_deterministic_kernels(digits_run, places, monkeypatch):
    deterministic = []
    monkeypatch.setattr(
        METHODS["mtt"],
        "make_network",
        lambda *_: deterministic.append(torch.backends.cudnn.deterministic),
        raising=False,
    )
    make_network(config_of("mtt"), places, "expert-000.safetensors", CPU)
    assert deterministic == [True]

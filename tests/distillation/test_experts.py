"""Experts: their files, resuming, divergence, and that methods share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expert_cases import (
    CLASSES,
    CPU,
    HELD,
    assert_close,
    make_config,
    make_context,
    make_method,
    make_sampler,
    train_experts,
)

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.core.rng import generator
from distill_at_scale.distillation.augment import FAMILIES
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.shared.experts import ExpertFiles, ExpertTraining, flat
from distill_at_scale.distillation.methods.shared.unroll import FlatNetwork
from distill_at_scale.models.precision import cpu_has_bf16
from distill_at_scale.pipeline.stages.distill import network_inputs


def test_an_expert_keeps_its_parameters_after_every_epoch(experts):
    held = safetensors_io.load(experts / "expert-001.safetensors")["parameters"]
    context = make_context(make_config(), experts)
    fresh = ExpertTraining(1, context, context.config.distill.mtt, make_sampler())
    assert torch.equal(held[0], flat(fresh.network))
    assert held.shape == (5, len(held[0]))
    assert held.dtype == torch.float32
    assert len({float(row.norm()) for row in held}) == 5
    assert sorted(p.name for p in experts.iterdir()) == ["expert-000.safetensors", "expert-001.safetensors"]
    assert not torch.equal(held, safetensors_io.load(experts / "expert-000.safetensors")["parameters"])


def test_an_epoch_is_plain_sgd_over_shuffled_batches(experts):
    held = safetensors_io.load(experts / "expert-000.safetensors")["parameters"]
    pool = make_sampler()
    network = make_context(make_config(), experts).spec.build(5)
    torch.nn.utils.vector_to_parameters(held[1].clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    pixels, labels = pool.all_samples()
    order = torch.randperm(len(labels), generator=generator(0, "expert epoch", 0, 1))
    for rows in order.split(8):
        optimizer.zero_grad()
        F.cross_entropy(network(pool.normalization.apply(pixels[rows])), labels[rows]).backward()
        optimizer.step()
    assert_close(flat(network) - held[1], held[2] - held[1])


def test_an_expert_reports_the_samples_that_it_has_seen(tmp_path):
    seen, config = list[int](), make_config()
    context = replace(make_context(config, tmp_path), progressed=seen.append)
    METHODS["mtt"].make_network("expert-000.safetensors", context, make_sampler())
    assert seen == [27 * epoch + batch for epoch in range(4) for batch in (8, 16, 24, 27)]
    assert METHODS["mtt"].network_epochs(config) == 4


@pytest.mark.skipif(not cpu_has_bf16(), reason="bf16 is emulated here")
def test_an_expert_in_bf16_has_float32_weights_close_to_those_in_fp32(experts, tmp_path):
    config = make_config()
    config = config.model_copy(update={"distill": config.distill.model_copy(update={"precision": "bf16"})})
    METHODS["mtt"].make_network("expert-000.safetensors", make_context(config, tmp_path), make_sampler())
    exact, rounded = (safetensors_io.load(f / "expert-000.safetensors")["parameters"] for f in (experts, tmp_path))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert_close(rounded[-1] - rounded[0], exact[-1] - exact[0], 0.3)


def test_experts_learn_their_samples(tmp_path):
    config = make_config(expert_epochs=60, expert_lr=0.3, experts=1)
    context, pool = make_context(config, tmp_path), make_sampler()
    METHODS["mtt"].make_network("expert-000.safetensors", context, pool)
    student = FlatNetwork(context.spec.build(0), 100)
    held = ExpertFiles(tmp_path, 60, sum(student.sizes), CPU)
    pixels, labels = pool.all_samples()
    first, last = held.parameters(0, 0, 60)
    right = [
        float((student.logits(p, pool.normalization.apply(pixels)).argmax(1) == labels).float().mean())
        for p in (first, last)
    ]
    assert right[0] < 0.7
    assert right[1] > 0.9


@pytest.mark.parametrize(("momentum", "infobatch"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.5)])
def test_a_killed_expert_resumes_to_the_same_bytes(tmp_path, monkeypatch, momentum, infobatch):
    options = {"expert_momentum": momentum, "expert_augment": "color_crop", "experts": 1, "expert_infobatch": infobatch}
    uninterrupted, killed = train_experts(tmp_path / "whole", **options), tmp_path / "killed"
    epoch_of = ExpertTraining._epoch

    def dies(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        epoch_of(self, epoch)

    monkeypatch.setattr(ExpertTraining, "_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        train_experts(killed, **options)
    done = []
    monkeypatch.setattr(ExpertTraining, "_epoch", lambda self, epoch: (done.append(epoch), epoch_of(self, epoch)))
    train_experts(killed, **options)
    assert done == [2, 3]
    name = "expert-000.safetensors"
    assert (uninterrupted / name).read_bytes() == (killed / name).read_bytes()
    assert [path.name for path in killed.iterdir()] == [name]


def test_a_diverging_expert_names_itself_epoch_and_rate(tmp_path):
    with pytest.raises(
        DistillationDiverged, match=r"expert 0 diverged in epoch \d at learning rate 1e\+30.*mtt.expert_lr"
    ):
        train_experts(tmp_path, expert_lr=1e30)
    assert not list(tmp_path.glob("*.safetensors"))


def test_augmentation_of_experts_is_drawn_per_image(tmp_path, monkeypatch):
    seen = []
    flip = FAMILIES["flip"]
    monkeypatch.setitem(FAMILIES, "flip", lambda images, u: (seen.append(u[:, 0].tolist()), flip(images, u))[1])
    train_experts(tmp_path, expert_augment="flip", experts=1, expert_epochs=4)
    assert len(seen) == 4 * -(-CLASSES * HELD // 8)
    assert all(len(set(u)) == len(u) for u in seen)


def test_methods_share_experts_and_their_number_does_not_count(make_run, tmp_path):
    run = make_run(tmp_path, distill__method="mtt").stages("ingest", "score", "select")

    def fingerprint(method="mtt", **values):
        given = {f"distill__{method}__{key}": value for key, value in values.items()}
        other = make_run(tmp_path, distill__method=method, **given)
        return network_inputs(other.config, other.pipeline.dir).fingerprint

    first = fingerprint()
    assert fingerprint("tesla") == first
    assert fingerprint(experts=3, student_steps=7, image_lr=3.0, augment="none") == first
    for key, value in {
        "expert_lr": 0.02,
        "expert_epochs": 60,
        "expert_batch": 99,
        "expert_augment": "flip",
        "expert_infobatch": 0.5,
    }.items():
        assert fingerprint(**{key: value}) != first
    assert network_inputs(run.config, run.pipeline.dir).fingerprint == first
    wider = make_run(tmp_path, distill__method="mtt", distill__width=16)
    assert network_inputs(wider.config, wider.pipeline.dir).fingerprint != first


def test_an_expert_file_that_does_not_fit_is_named(experts, tmp_path):
    method = make_method(tmp_path)
    with pytest.raises(UserError, match=r"expert-00\d.safetensors cannot be read"):
        method.step(0)
    for number in range(2):
        safetensors_io.save(tmp_path / f"expert-{number:03d}.safetensors", {"parameters": torch.zeros(5, 3)})
    with pytest.raises(UserError, match=r"expert-00\d.safetensors does not hold 5 x \d+ parameters; it was renamed"):
        method.step(0)


def test_an_augmentation_that_is_not_known_is_refused_for_experts(tmp_path):
    with pytest.raises(UserError, match="unknown augmentation 'wobble'"):
        train_experts(tmp_path, expert_augment="wobble")


def test_a_damaged_epoch_of_an_unfinished_expert_is_named(tmp_path):
    partial = tmp_path / "expert-000.partial"
    partial.mkdir()
    (partial / "epoch-000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(
        UserError, match=r"epoch-000.safetensors is damaged .* renamed to epoch-000.safetensors.damaged"
    ):
        train_experts(tmp_path, experts=1)
    train_experts(tmp_path, experts=1)


def test_an_expert_with_infobatch_makes_the_steps_of_the_rule(tmp_path):
    options = {"expert_epochs": 2, "experts": 1, "max_start": 0, "target_epochs": 1}
    whole, rows = train_experts(tmp_path / "whole", **options), []
    train_experts(tmp_path / "rule", **options, expert_infobatch=0.5)
    for folder in (whole, tmp_path / "rule"):
        rows.append(safetensors_io.load(folder / "expert-000.safetensors")["parameters"])
    assert torch.equal(rows[0][1], rows[1][1])  # nothing is known in the first epoch, and the second of two is the last
    assert torch.equal(rows[0][2], rows[1][2])
    options |= {"expert_epochs": 4}
    seen, context = list[int](), make_context(make_config(**options, expert_infobatch=0.5), tmp_path / "seen")
    METHODS["mtt"].make_network("expert-000.safetensors", replace(context, progressed=seen.append), make_sampler())
    lengths = [max(n for n in seen if 27 * k < n <= 27 * (k + 1)) - 27 * k for k in range(4)]
    assert lengths[0] == lengths[3] == 27
    assert all(13 <= length < 27 for length in lengths[1:3])

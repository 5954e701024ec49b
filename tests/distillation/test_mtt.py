"""MTT: its step against a reference unroll, learned tensors, checkpoints, errors, and several workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave_group
from expert_cases import (
    CLASSES,
    CPU,
    SHAPE,
    SMALL,
    assert_close,
    make_config,
    make_context,
    make_method,
    reference_unroll,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.collectives import ProcessGroup
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.shared.unroll import StudentStep, SyntheticData, unrolled
from distill_at_scale.distillation.student import TrainingProtocol


def test_the_cost_of_the_experts_is_stated():
    (cost,) = METHODS["mtt"].costs(make_config(experts=7, network="vgg11"))
    assert (cost.what, cost.network, cost.images, cost.passes, cost.backward) == (
        "train 7 experts",
        "vgg11",
        "kept",
        28,
        True,
    )


@pytest.mark.parametrize("batch", [None, 4])
def test_a_step_matches_the_reference(experts, batch):
    """Images and rate move along the gradient of a full unroll, whole batches or parts of them."""
    method = make_method(experts, student_batch=batch)
    before, rate = method.images.detach().clone(), method.student_lr.detach().clone()
    task, network = method.segment(5, 0), method.context.spec.build(0)
    loss, of_images, of_rate = reference_unroll(network, task, before.flatten(0, 1), method.labels, rate)
    metrics = method.step(5)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["student_lr"] == pytest.approx(0.1)
    assert_close(before.flatten(0, 1) - method.images.detach().flatten(0, 1), of_images)
    assert_close(rate - method.student_lr.detach(), 1e-3 * of_rate, 1e-2)


def test_momentum_is_that_of_sgd(experts):
    method = make_method(experts, image_momentum=0.5, image_lr=0.1)
    gradients, images = [], [method.images.detach().clone()]
    for i in range(2):
        _, actual = method.match(method.segment(i, 0), method.synthetic())
        gradients.append(actual[0].view_as(method.images))
        method.step(i)
        images.append(method.images.detach().clone())
    assert_close(images[0] - images[1], 0.1 * gradients[0])
    assert_close(images[1] - images[2], 0.1 * (gradients[1] + 0.5 * gradients[0]))


def test_start_and_target_are_epochs_of_one_expert(experts):
    method = make_method(experts)
    held = [safetensors_io.load(experts / name)["parameters"] for name in method.networks(method.context.config)]
    seen = set()
    for i in range(40):
        task = method.segment(i, 0)
        (actual,) = [(k, e) for k in range(2) for e in range(5) if torch.equal(task.start, held[k][e])]
        assert torch.equal(task.target, held[actual[0]][actual[1] + 2])
        seen.add(actual)
    assert seen == {(k, e) for k in range(2) for e in range(3)}  # max_start 2 is the last one


def test_batches_shuffle_all_images_before_any_comes_again(experts):
    steps = make_method(experts, student_batch=4, student_steps=6).segment(0, 0).steps
    assert [len(step.rows) for step in steps] == [4, 2, 4, 2, 4, 2]
    rounds = [torch.cat([steps[k].rows, steps[k + 1].rows]).tolist() for k in (0, 2, 4)]
    assert all(sorted(rows) == list(range(6)) for rows in rounds)
    assert rounds[0] != rounds[1]


def test_every_step_and_worker_has_its_own_trajectory_and_augmentation(experts):
    method = make_method(experts, augment=SIAMESE_AUGMENT)
    tasks = [method.segment(i, rank) for i in range(3) for rank in range(2)]
    assert len({float(task.steps[0].params.numbers.sum()) for task in tasks}) == 6
    assert len({tuple(u.tolist()) for u in tasks[0].steps[0].params.numbers}) == 6  # per image
    again = make_method(experts, augment=SIAMESE_AUGMENT).segment(1, 0)
    assert torch.equal(again.steps[0].params.numbers, tasks[2].steps[0].params.numbers)


def test_the_loss_falls_where_it_is_optimised(experts):
    method = make_method(experts, image_lr=5.0, student_lr_rate=1e-3, max_start=0)
    tasks = [method.segment(1000 + i, 0) for i in range(4)]

    def total():
        return sum(float(unrolled(method.student, t, method.synthetic(), method.student_lr)[0]) for t in tasks)

    before = total()
    for i in range(30):
        method.step(i)
    assert total() < 0.95 * before


@pytest.mark.parametrize("method", ["mtt", "tesla"])
def test_a_restored_state_continues_to_the_same_bytes(experts, method):
    options = {"image_momentum": 0.5, "augment": "color_crop", "image_lr": 0.1}
    uninterrupted, resumed = make_method(experts, method, **options), make_method(experts, method, **options)
    uninterrupted.step(0)
    state = {key: value.clone() for key, value in uninterrupted.state_dict().items()}
    uninterrupted.step(1)
    resumed.load_state_dict(state)
    resumed.step(1)
    ours, theirs = uninterrupted.state_dict(), resumed.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {"rate", "rate momentum", "images/0", "momentum/2"} <= set(ours)


def test_learned_values_are_in_the_protocol_and_the_card(experts):
    method = make_method(experts)
    method.step(0)
    synthetic = method.finalize(*method.snapshot())
    rate = float(method.student_lr.detach())
    assert rate != pytest.approx(0.1, abs=1e-9)
    assert dict(synthetic.protocol) == {"lr": rate}
    assert synthetic.extras["student_lr"].tolist() == [rate]
    assert synthetic.card["student_lr"]["learned"] == rate


def test_the_defaults_are_the_official_ones():
    config, method = configuration.Config(), METHODS["mtt"]
    section = config.distill.mtt
    assert (method.default_steps, method.parallel, method.init_of(config)) == (5000, "replicate", "real")
    assert method.protocol(config) == TrainingProtocol(1000, SIAMESE_AUGMENT)
    assert len(method.networks(config)) == 100
    assert (section.image_lr, section.image_momentum, section.student_lr, section.student_lr_rate) == (
        1000,
        0.5,
        0.01,
        1e-5,
    )
    assert (section.student_steps, section.target_epochs, section.max_start, section.expert_epochs) == (20, 3, 25, 50)


@pytest.mark.parametrize("method", ["mtt", "tesla"])
def test_non_finite_values_change_nothing_and_name_class_step_and_rates(experts, method):
    matcher = make_method(experts, method)
    before = {key: value.clone() for key, value in matcher.state_dict().items()}
    match = matcher.match

    def poisoned(task, synthetic):
        loss, gradients = match(task, synthetic)
        gradients[0][2] = float("nan")
        return loss, gradients

    matcher.match = poisoned
    message = (
        f"gradient of class 'one' is not finite at step 7, image learning rate 1, student .* 0.1 .*{method}.image_lr"
    )
    with pytest.raises(DistillationDiverged, match=message):
        matcher.step(7)
    after = matcher.state_dict()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_distance_that_is_not_finite_stops_the_run(experts):
    method = make_method(experts)
    with torch.no_grad():
        method.student_lr.fill_(1e30)
    before = method.images.detach().clone()
    with pytest.raises(DistillationDiverged, match=r"from the expert is not finite at step 3.*1e\+30"):
        method.step(3)
    assert torch.equal(method.images.detach(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_lr": 3e38}, "an update of class 'zero' is not finite"),
        ({"student_lr_rate": 1e3}, "rate would become -"),
    ],
)
def test_an_impossible_update_is_refused(experts, options, message):
    """The second case: the student rate would become negative."""
    method = make_method(experts, image_momentum=0.5, **options)
    match = method.match
    method.match = lambda task, synthetic: (
        match(task, synthetic)[0],
        [torch.full_like(synthetic.images, 1e6), torch.tensor(1.0)],
    )
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(DistillationDiverged, match=message):
        method.step(0)
    after = method.state_dict()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_batch_norm_is_refused_with_the_reason(tmp_path):
    config = make_config(network="resnet18_bn")
    with pytest.raises(UserError, match=r"resnet18_bn.*batch norm, whose running statistics are no parameters"):
        METHODS["mtt"](make_context(config, tmp_path, shape=(1, 16, 16)))


def test_in_parts_a_draw_stays_with_its_images():
    """The augmented parts, put together, are the augmented whole."""
    images = torch.rand(5, *SHAPE)
    draw = Augmentation("color").draw(torch.Generator().manual_seed(0), per_image=5)
    step, synthetic = StudentStep(torch.randperm(5), draw), SyntheticData(images, torch.arange(5) % CLASSES)
    parts = [synthetic.batch(part) for part in step.split(2)]
    together = synthetic.batch(step)
    assert torch.allclose(torch.cat([p[0] for p in parts]), together[0])
    assert torch.equal(torch.cat([p[1] for p in parts]), together[1])


def work(rank: int, folder: str, experts: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for method in ("mtt", "tesla"):
        matcher = make_method(Path(experts), method, ProcessGroup(CPU), image_momentum=0.5, image_lr=0.1)
        for i in range(2):
            matcher.step(i)
        safetensors_io.save(Path(folder) / f"{method}-{rank}.safetensors", matcher.state_dict())
    with torch.no_grad():
        matcher.images[0].fill_(float("inf") if rank else 0.0)
    with pytest.raises(DistillationDiverged):
        matcher.step(2)
    leave_group()


def test_two_workers_average_the_gradients_of_two_trajectories(experts, tmp_path):
    """Both workers have the bytes of one process that follows both trajectories; a failure of one stops both."""
    mp.spawn(work, (str(tmp_path), str(experts)), nprocs=2)
    for method in ("mtt", "tesla"):
        actual = [safetensors_io.load(tmp_path / f"{method}-{rank}.safetensors") for rank in range(2)]
        assert all(torch.equal(actual[0][key], actual[1][key]) for key in actual[0])
        alone = make_method(experts, method, image_momentum=0.5, image_lr=0.1)
        start = alone.images.detach().clone()
        for i in range(2):
            pairs = [alone.match(alone.segment(i, rank), alone.synthetic()) for rank in range(2)]
            mean = [(a + b) / 2 for a, b in zip(*(gradients for _, gradients in pairs), strict=True)]
            alone._update_learned(i, pairs[0][0], mean)
        assert_close(
            torch.stack([actual[0][f"images/{c}"] for c in range(3)]) - start, alone.images.detach() - start, 1e-3
        )
        assert float(actual[0]["rate"]) == pytest.approx(float(alone.student_lr.detach()), rel=1e-4)


RUN = {f"distill__{method}__{key}": value for method in ("mtt", "tesla") for key, value in SMALL.items()}


@pytest.mark.parametrize("method", ["mtt", "tesla"])
def test_the_whole_run_trains_experts_distils_and_evaluates_by_what_was_learned(make_run, tmp_path, method):
    run = make_run(tmp_path / "fresh", distill__method=method, runtime__rule="loss", **RUN)
    run.stages("ingest", "score", "select", "distill", "evaluate")
    synthetic = synthetic_set.load(run.dir)
    assert synthetic.card["runtime"]["rule"] == "not applicable"
    assert synthetic.protocol.lr == pytest.approx(synthetic.card["student_lr"]["learned"])
    assert synthetic.protocol.lr == float(synthetic.extras["student_lr"])
    assert "trajectory matching has no real batch" in run.text
    (folder,) = (run.dir / "networks").iterdir()
    places = SimpleNamespace(networks=folder)
    assert distill.missing_networks(run.config, places) == []
    assert replace(synthetic.protocol, lr=0.01, labels="hard") == TrainingProtocol(1000, "none")

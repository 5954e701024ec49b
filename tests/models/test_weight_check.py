"""Pretrained weights that do not fit the data are an error with the reason; early and untrained networks pass."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.models.weight_check import check_on_sample

NAMES = [str(k) for k in range(12)]
IN_TEXT_ORDER = sorted(NAMES)


def outputs(true_classes, classes, accuracy=0.95, confidence=8.0, seed=0):
    """Logits of a network that takes this share of samples for their class, and the others for any class."""
    chance = np.random.default_rng(seed)
    right = chance.random(len(true_classes)) < accuracy
    taken = np.where(right, true_classes, chance.integers(0, classes, len(true_classes)))
    logits = torch.from_numpy(chance.normal(0, 0.3, (len(taken), classes))).float()
    return logits + confidence * F.one_hot(torch.from_numpy(taken), classes)


def sample(classes, count=240, seed=1):
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def test_weights_that_know_the_data_pass_with_their_numbers():
    labels = sample(12)
    line = check_on_sample("w", outputs(labels, 12), torch.from_numpy(labels), NAMES).line()
    assert re.fullmatch(
        r"on 240 training samples the mean loss is 0\.\d\d \(guessing: 2\.48\) and 9\d% are right \(guessing: 8%\)",
        line,
    )


def test_folders_in_text_order_against_weights_in_the_order_of_numbers_are_named():
    labels = sample(12)
    true_classes = np.array([int(IN_TEXT_ORDER[label]) for label in labels])
    logits = outputs(true_classes, 12)
    with pytest.raises(UserError) as error:
        check_on_sample("score.weights = 'w.pt'", logits, torch.from_numpy(labels), IN_TEXT_ORDER)
    text = str(error.value)
    loss = float(F.cross_entropy(logits, torch.from_numpy(labels)))
    assert text.startswith(
        f"score.weights = 'w.pt' is worse than guessing: on 240 training samples the mean loss is {loss:.2f} ("
    )
    assert "(guessing: 2.48) and 1" in text
    assert "% would be right, so the weights have another order of the classes" in text
    label, other = re.search(r"the class '(\d+)' \(label \d+\) get the output (\d+)", text).groups()
    assert label == other  # the weights number the class by its value
    assert "numbers in text order (0, 1, 10, 11, ...)" in text
    assert "data.class_names" in text
    assert text.endswith("set score.check_weights=false")


def test_a_few_classes_out_of_order_are_noticed():
    """One class is sorted before three others, so that four of ten have another number."""
    labels = sample(10)
    moved = np.array([3, 0, 1, 2, 4, 5, 6, 7, 8, 9])
    with pytest.raises(UserError, match=r"another order of the classes: many samples of the class 'c\d'"):
        check_on_sample("w", outputs(moved[labels], 10), torch.from_numpy(labels), [f"c{k}" for k in range(10)])


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_confident_nonsense_is_an_error(classes):
    labels = sample(classes, 256)
    logits = outputs(labels, classes, accuracy=0.0, confidence=12)
    with pytest.raises(UserError, match=r"worse than guessing.*another normalisation, size or resize"):
        check_on_sample("w", logits, torch.from_numpy(labels), [f"c{k}" for k in range(classes)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("classes", "accuracy", "confidence"),
    [
        (2, 0.0, 0.0), (10, 0.0, 0.0), (1000, 0.0, 0.0),  # untrained
        (10, 0.05, 1.5), (100, 0.0, 2.0), (10, 0.0, 2.0),  # barely trained: a little worse than guessing
        (2, 0.6, 8.0), (10, 0.4, 12.0), (100, 0.4, 14.0),  # overconfident, with a loss far above that of guessing
        (10, 0.95, 8.0), (2, 0.9, 6.0),
    ],
)  # fmt: skip
def test_early_untrained_and_overconfident_networks_pass(classes, accuracy, confidence, seed):
    labels = sample(classes, 256, seed)
    logits = outputs(labels, classes, accuracy, confidence, seed)
    check_on_sample("w", logits, torch.from_numpy(labels), [f"c{k}" for k in range(classes)])


@pytest.mark.parametrize("name", ["convnet", "convnet_bn", "mlp", "resnet18", "resnet18_bn"])
def test_random_weights_of_our_networks_pass(name):
    labels = sample(10, 40)
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = NetworkSpec(name, (3, 16, 16), 10, 16).build(0).eval()(images)
    check_on_sample("w", logits, torch.from_numpy(labels), [f"c{k}" for k in range(10)])


def test_a_handful_of_samples_decides_nothing():
    for count in (1, 2, 19):
        labels = torch.arange(count) % 4
        check_on_sample("w", F.one_hot((labels + 1) % 4, 4) * 5.0 * (labels[:, None] + 1), labels, list("abcd"))


def test_a_sample_of_the_data_is_even_seeded_and_in_random_order(digits_run):
    data = PreparedDataset(digits_run.dir / "prepared")
    pixels, labels = data.sample("train", 30, seed=0)
    assert np.bincount(labels).tolist() == [10, 10, 10]
    assert np.array_equal(pixels, data.sample("train", 30, seed=0)[0])
    assert not np.array_equal(pixels, data.sample("train", 30, seed=1)[0])
    assert labels.tolist() != sorted(labels)
    stored, of_stored = data.load("train")
    places = [int(np.flatnonzero((stored == image).all((1, 2, 3)))[0]) for image in pixels]
    assert labels.tolist() == of_stored[places].tolist()
    assert len(set(places)) > 25
    assert len(data.sample("train", 2, seed=0)[1]) == 2
    assert len(data.sample("train", 10**6, seed=0)[1]) == sum(data.counts("train"))


@pytest.fixture(scope="module")
def trained(digits_run):
    """State dict and specification of a network that is trained well on the digits of the tiny run, with their classes."""
    data = PreparedDataset(digits_run.dir / "prepared")
    spec = NetworkSpec("convnet_bn", data.shape, len(data.class_names), 8)
    pixels, labels = (torch.from_numpy(values) for values in data.load("train"))
    images, network = normalization_of(data).apply(pixels), spec.build(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    assert float((network.eval()(images).argmax(1) == labels).float().mean()) > 0.95
    return network.state_dict(), spec, data.class_names


def confident(state):
    """The same network with a sharper last layer."""
    return {key: value * 3 if key.startswith("classifier") else value for key, value in state.items()}


def test_the_score_stage_stops_before_it_scores_and_can_be_told_to_go_on(trained, make_run, tmp_path):
    state, _, names = trained
    torch.save(confident(state), tmp_path / "w.pt")
    settings = {"score__weights": str(tmp_path / "w.pt"), "score__network": "convnet_bn", "score__width": 8}
    good = make_run(tmp_path / "good", **settings).stages("ingest", "score")
    assert re.search(
        r"score\.weights = \S*w\.pt: on \d+ training samples the mean loss is 0\.\d\d \(guessing: 1\.10\)", good.text
    )
    turned = [names[1], names[2], names[0]]
    bad = make_run(tmp_path / "bad", **settings, data__classes=turned).stages("ingest")
    with pytest.raises(UserError, match=r"w\.pt' is worse than guessing: .*another order of the classes"):
        bad.stages("score")
    assert not list(bad.dir.rglob("chunk-*"))
    forced = make_run(tmp_path / "bad", **settings, data__classes=turned, score__check_weights=False).stages("score")
    assert "score: finished" in forced.text


def test_a_pretrained_teacher_is_checked_at_both_stages_that_need_it(trained, make_run, tmp_path):
    state, _, names = trained
    safetensors_io.save(tmp_path / "teacher.safetensors", confident(state))
    rded = {
        "teacher_network": "convnet_bn",
        "teacher_weights": str(tmp_path / "teacher.safetensors"),
        "label_epochs": 2,
    }
    settings = {"distill__method": "rded", "distill__width": 8, "distill__rded": rded, "runtime__rule": "none"}
    bad = make_run(tmp_path / "bad", **settings, data__classes=[names[1], names[2], names[0]]).stages("ingest")
    message = r"distill\.rded\.teacher_weights = '.*teacher\.safetensors' is worse than guessing"
    with pytest.raises(UserError, match=message):
        bad.stages("score")
    unchecked = {**settings, "data__classes": [names[1], names[2], names[0]], "score__check_weights": False}
    make_run(tmp_path / "bad", **unchecked).stages("score", "select")
    with pytest.raises(UserError, match=message):
        bad.stages("distill")
    good = make_run(tmp_path / "good", **settings).stages("ingest", "score", "select", "distill")
    assert good.text.count("teacher_weights: on ") == 2

"""The report's words: the answer follows from the numbers, clips are not called images."""

from __future__ import annotations

import re

import pytest

from distill_at_scale.pipeline.report import text as wording


def row(name, mean, std, n=5, network="convnet"):
    return {"set": name, "network": network, "n": n, "mean": mean, "std": std, "mean_top5": mean, "std_top5": std}


def says(ours, real):
    answer = wording.answer([row("distilled", *ours), row("random_real", *real)])
    return answer["verdict"], f"{answer['word']}: {answer['text']}".replace("\u00a0", " ")


def test_sentence_yes():
    verdict, text = says((0.834, 0.006), (0.686, 0.028))
    assert (verdict, text) == (
        "yes",
        "Yes: 83.4 ± 0.6 % against 68.6 ± 2.8 % top-1 (n = 5), +14.8 points (95 % interval +11.4 to +18.2)",
    )


def test_sentence_no():
    verdict, text = says((0.5, 0.01), (0.6, 0.01, 3))
    assert (verdict, text) == (
        "no",
        "No: 50.0 ± 1.0 % against 60.0 ± 1.0 % top-1 (n = 5 and 3), −10.0 points (95 % interval −12.0 to −8.0)",
    )


@pytest.mark.parametrize("ours", [0.60, 0.63, 0.57])
def test_sentence_indistinguishable(ours):
    verdict, text = says((ours, 0.03), (0.6, 0.04))
    assert verdict == "unclear"
    assert text.startswith("Not distinguishable: ")
    low, high = re.search(r"95 % interval (\S+) to (\S+)\)$", text).groups()
    assert low.startswith("−")
    assert high.startswith("+")


def test_the_interval_decides():
    def verdict(*samples):
        ours, real = (row(name, *sample) for name, sample in zip(("distilled", "random_real"), samples, strict=True))
        return wording.answer([ours, real])["verdict"]

    assert verdict((0.66, 0.03), (0.6, 0.04)) == "yes"
    assert verdict((0.64, 0.03), (0.6, 0.04)) == "unclear"
    assert verdict((0.66, 0.03, 2), (0.6, 0.04, 2)) == "unclear"  # two networks say less than five


def test_what_pruning_changed_is_said_with_interval_and_time():
    summary = [row("distilled", 0.60, 0.01), row("unpruned", 0.50, 0.01), row("random_keep", 0.595, 0.01),
               row("random_real", 0.4, 0.01), row("distilled", 0.1, 0.01, network="vgg11"),
               row("unpruned", 0.9, 0.01, network="vgg11")]  # fmt: skip
    controls = {"unpruned": {"seconds": 40.0}, "random_keep": {"seconds": 10.0}}
    first, second = (line.replace("\u00a0", " ") for line in wording.pruning(summary, 10.0, controls))
    assert first == (
        "Pruning changed top-1 by +10.0 points (95 % interval +8.5 to +11.5); the distillation took 10.0 s instead of 40.0 s."
    )
    assert second.startswith(
        "The choice of the kept samples, instead of a random one, changed top-1 by +0.5 points (95 %"
    )
    assert second.endswith("which is not distinguishable from no change.")
    assert wording.pruning(summary, 10.0, {}) == []


@pytest.mark.parametrize(("ours", "word"), [(0.7, "Yes"), (0.5, "No"), (0.6, "No difference")])
def test_single_seed_says_so(ours, word):
    _, text = says((ours, None, 1), (0.6, None, 1))
    assert text.startswith(f"{word}, on a single seed: {100 * ours:.1f} % against 60.0 % top-1 (n = 1)")
    assert "chance cannot be ruled out" in text


def test_several_networks_are_all_named():
    sets = [row("distilled", 0.8, 0.01), row("random_real", 0.6, 0.01),
            row("distilled", 0.5, 0.01, network="vgg11"), row("random_real", 0.6, 0.01, network="vgg11")]  # fmt: skip
    answer = wording.answer(sets)
    assert "(n = 5, convnet)" in answer["text"]
    assert answer["others"] == "Over 2 networks, the distilled set is better with convnet; worse with vgg11."


def test_a_network_that_sees_one_frame_gives_no_verdict_next_to_others():
    control = [
        row("distilled", 0.2, 0.01, network="frame:convnet"),
        row("random_real", 0.3, 0.01, network="frame:convnet"),
    ]
    motion = [row("distilled", 0.8, 0.01, network="convnet3d"), row("random_real", 0.6, 0.01, network="convnet3d")]
    answer = wording.answer(control + motion)
    assert (answer["verdict"], answer["others"]) == ("yes", "")
    assert wording.answer(control)["verdict"] == "no"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 32, 32), "Do 6 synthetic images (2 per class), distilled from 10 % of the training set, train a better network "
                      "than 5 random real images?"),
        ((8, 3, 64, 64), "Do 6 synthetic clips of 8 frames (2 per class), distilled from 10 % of the training set, train a "
                         "better network than 5 random real clips?"),
    ],
)  # fmt: skip
def test_the_question_names_what_was_distilled(shape, expected):
    assert wording.question(wording.words(shape), 6, 2, [5, 1, 9], 0.1).replace(wording.NBSP, " ") == expected


CARD = {"protocol": {"labels": "hard"}, "runtime": {"rule": "none"}}


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ({"formation": 2}, "Each holds 2 × 2 training images"),
        ({"protocol": {"crop": [0.125, 0.5]}}, f"random crops of 12.5{wording.NBSP}% to 50{wording.NBSP}% of each."),
        ({"protocol": {"labels": "soft"}}, "soft labels were learned"),
        ({"soft_labels": {"epochs": 300, "bytes_per_image": 6000.0}, "teacher": {"origin": "trained here"}},
         "gave a soft label to each of their views in 300 epochs; the labels take 6,000 bytes per image"),
        ({"student_lr": {"learned": 0.0982}}, "0.0982, was learned"),
        ({"runtime": {"rule": "not applicable", "reason": "no batch"}}, "not applicable: no batch."),
        ({"runtime": {"rule": "ite", "drop": 0.3}}, "left out a share that was not measured of the real batches"),
    ],
)  # fmt: skip
def test_special_facts_of_a_method_are_reported(more, lines):
    (fact,) = wording.method_facts(CARD | more, "images")
    assert lines in fact
    assert wording.method_facts(CARD, "images") == []


def test_the_share_that_runtime_pruning_dropped_is_the_measured_one():
    (fact,) = wording.method_facts(CARD | {"runtime": {"rule": "loss", "drop": 0.3}}, "images", 0.25)
    assert fact.replace("\u00a0", " ") == (
        "Runtime pruning by rule loss left out 25 % (measured) of the real batches; configured: 30 %."
    )


def test_a_small_test_split_allows_no_verdict():
    sets = [row("distilled", 1.0, 0.0, 5), row("random_real", 0.5, 0.0, 5)]
    assert wording.answer(sets, 600)["word"] == "Yes"
    few = wording.answer(sets, 2)
    assert few["word"] == "Too few tested samples"
    assert few["verdict"] == "unclear"
    assert "the test split has only 2 samples, and each is 50 points of top-1" in few["text"]
    assert "the held-out part of the training split has only 2 samples" in wording.answer(sets, 2, "held_out")["text"]

"""The report's words: the answer follows from the numbers, clips are not called images."""

from __future__ import annotations

import pytest

from distill_at_scale.pipeline.report import text as wording


def row(name, mean, std, n=5, network="convnet"):
    return {"set": name, "network": network, "n": n, "mean": mean, "std": std, "mean_top5": mean, "std_top5": std}


def says(ours, real):
    answer = wording.answer([row("distilled", *ours), row("random_real", *real)])
    return answer["verdict"], f"{answer['word']}: {answer['text']}".replace("\u00a0", " ")


def test_sentence_yes():
    verdict, text = says((0.834, 0.006), (0.686, 0.028))
    assert (verdict, text) == ("yes", "Yes: 83.4 ± 0.6 % against 68.6 ± 2.8 % top-1 (n = 5), 14.8 points more")


def test_sentence_no():
    verdict, text = says((0.5, 0.01), (0.6, 0.01, 3))
    assert (verdict, text) == ("no", "No: 50.0 ± 1.0 % against 60.0 ± 1.0 % top-1 (n = 5 and 3), 10.0 points less")


@pytest.mark.parametrize("ours", [0.60, 0.63, 0.57])
def test_sentence_indistinguishable(ours):
    verdict, text = says((ours, 0.03), (0.6, 0.04))
    assert verdict == "unclear"
    assert text.startswith("Not distinguishable: ")
    assert text.endswith("points is within the combined deviation of 5.0")


def test_combined_deviation_is_the_border():
    assert wording.verdict(row("distilled", 0.66, 0.03), row("random_real", 0.6, 0.04)) == "yes"
    assert wording.verdict(row("distilled", 0.64, 0.03), row("random_real", 0.6, 0.04)) == "unclear"


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
        ({"protocol": {"labels": "soft"}}, "soft labels were learned"),
        ({"soft_labels": {"epochs": 300, "bytes_per_image": 6000.0}, "teacher": {"origin": "trained here"}},
         "gave a soft label to each of their views in 300 epochs; the labels take 6,000 bytes per image"),
        ({"student_lr": {"learned": 0.0982}}, "0.0982, was learned"),
        ({"runtime": {"rule": "not applicable", "reason": "no batch"}}, "not applicable: no batch."),
        ({"runtime": {"rule": "ite", "drop": 0.3}}, "by rule ite dropped 30"),
    ],
)  # fmt: skip
def test_special_facts_of_a_method_are_reported(more, lines):
    (fact,) = wording.method_facts(CARD | more, "images")
    assert lines in fact
    assert wording.method_facts(CARD, "images") == []

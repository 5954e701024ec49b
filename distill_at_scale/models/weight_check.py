"""Whether pretrained weights know the data: they are tested on a sample of it before the long work starts.

Weights whose classes are in another order, or that were trained with another normalisation or size, load without an error and
score everything wrongly. `check_on_sample` decides by two rules, which early checkpoints and untrained networks pass:

- Confidently wrong: the mean loss is above ln C + 1 for C classes, by two standard errors, and the accuracy is near that of
  guessing, below 1/C + 0.15 (1 - 1/C). An untrained or barely trained network is not confident: its loss is near ln C. A
  trained but overconfident network may have such a loss, but its accuracy is higher.
- Another order of classes: the mean loss is above ln C, and giving each output another class raises the accuracy by 0.2 or
  more. The new classes come from one half of the sample and are tested on the other half, so chance does not raise it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.core.errors import UserError

SAMPLES, FEWEST = 256, 20  # of the data, in all; fewer than FEWEST decide nothing
MARGIN, NEAR_GUESSING, REORDERED = 1.0, 0.15, 0.2  # see above
KEY = "score.check_weights"


@dataclass(frozen=True)
class WeightCheck:
    """How weights do on a sample of the data: mean cross-entropy and accuracy, and `guess`, those of guessing."""

    samples: int
    loss: float
    accuracy: float
    guess: tuple[float, float]

    def line(self) -> str:
        loss, accuracy = self.guess
        return (
            f"on {self.samples} training samples the mean loss is {self.loss:.2f} (guessing: {loss:.2f}) and "
            f"{self.accuracy:.0%} are right (guessing: {accuracy:.0%})"
        )


def check_on_sample(key: str, logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> WeightCheck:
    """Compare the logits [n, C] of a sample with its labels int64 [n]; the rows are in a random order.

    Args:
        key: the configuration key with its value, for messages.

    Raises:
        UserError: the weights are clearly worse than guessing; with the numbers and the likely reason.
    """
    classes, losses = len(class_names), F.cross_entropy(logits.float(), labels, reduction="none")
    predicted = logits.argmax(1)
    guess = (math.log(classes), 1 / classes)
    result = WeightCheck(len(labels), float(losses.mean()), float((predicted == labels).float().mean()), guess)
    if len(labels) < FEWEST:
        return result
    least = result.loss - 2 * float(losses.std()) / math.sqrt(len(labels))
    near_guessing = result.accuracy < guess[1] + NEAR_GUESSING * (1 - guess[1])
    reordered = _accuracy_with_other_classes(predicted, labels, classes)
    if least > guess[0] and reordered - result.accuracy >= REORDERED:
        label, other = _most_frequent_mistake(predicted, labels, classes)
        reason = (
            f"With other classes for its outputs {reordered:.0%} would be right, so the weights have another order of the "
            f"classes: many samples of the class {class_names[label]!r} (label {label}) get the output {other}, which the data "
            f"call {class_names[other]!r}.{_text_order(class_names)} List the classes in the weights' order in data.class_names"
        )
    elif least > guess[0] + MARGIN and near_guessing:
        reason = (
            f"Perhaps the weights have another order of the classes.{_text_order(class_names)} List them in the weights' order "
            "in data.class_names. Or they were trained with another normalisation, size or resize; give their "
            "data.size, data.channels and data.resize"
        )
    else:
        return result
    raise UserError(f"{key} is worse than guessing: {result.line()}. {reason}. To use them anyway, set {KEY}=false")


def _accuracy_with_other_classes(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """The accuracy on one half of the sample if each output means its most frequent class of the other half."""
    first, second = slice(0, None, 2), slice(1, None, 2)
    right = 0
    for fit, use in ((first, second), (second, first)):
        pairs = predicted[fit], labels[fit]
        counts = torch.zeros(classes, classes).index_put_(pairs, torch.tensor(1.0), accumulate=True)
        meaning = torch.where(counts.sum(1) > 0, counts.argmax(1), -1)
        right += int((meaning[predicted[use]] == labels[use]).sum())
    return right / len(labels)


def _most_frequent_mistake(predicted: Tensor, labels: Tensor, classes: int) -> tuple[int, int]:
    """The label and the other output that occur together most often."""
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    place = int(counts.fill_diagonal_(0).argmax())
    return place // classes, place % classes


def _text_order(class_names: Sequence[str]) -> str:
    """A remark if the classes are whole numbers that are not sorted by value."""
    if not all(name.isdecimal() for name in class_names) or [*class_names] == sorted(class_names, key=int):
        return ""
    return f" The class names are numbers in text order ({', '.join(class_names[:4])}, ...)."

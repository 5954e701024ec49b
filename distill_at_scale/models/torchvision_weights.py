"""The weights that torchvision publishes: name, file, network, classes, normalisation. Nothing is downloaded."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGENET = 1000  # classes
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Published:
    """Weights that torchvision publishes; `network` is torchvision's name for it."""

    network: str
    file: str
    url: str
    categories: list[str]
    normalization: tuple[tuple[float, ...], tuple[float, ...]]


def published(name: str) -> Published | None:
    """Look weights up by name (ResNet18_Weights.IMAGENET1K_V1) or file name (resnet18-f37072fd.pth)."""
    for network, names, weights in catalogue():
        if name in names:
            normalization = (tuple(weights.transforms().mean), tuple(weights.transforms().std))
            return Published(network, names[1], weights.url, weights.meta["categories"] or [], normalization)
    return None


def catalogue() -> list[tuple[str, tuple[str, str], Any]]:
    """(network, (name, file), entry) of all weights that torchvision publishes to classify images or videos."""
    from torchvision import models  # imported here: it takes seconds in every process

    networks = [*models.list_models(module=models), *models.list_models(module=models.video)]
    enums = [(network, models.get_model_weights(network)) for network in networks]
    entries = [(network, f"{enum.__name__}.{key}", enum[key]) for network, enum in enums for key in enum.__members__]
    return [(network, (name, weights.url.rpartition("/")[2]), weights) for network, name, weights in entries]


def similar(name: str) -> str:
    """The end of the message for a name that is neither a file nor published."""
    if "_Weights" not in name and not re.search(r"-[0-9a-f]{8}\.pth$", name):
        return "; give the path of a .safetensors, .pt or .pth file, or torchvision's name of published weights"
    close = difflib.get_close_matches(name, [known for _, names, _ in catalogue() for known in names], n=1)
    return f", and torchvision publishes none of that name{f'; did you mean {close[0]}?' if close else ''}"


def fits(names: list[str], categories: list[str]) -> bool:
    """Whether the data's classes are the categories, or ImageNet's 1000 WordNet ids in order."""
    if names == categories:
        return True
    ids = sorted(set(names)) == names and all(WORDNET_ID.fullmatch(name) for name in names)
    return len(categories) == IMAGENET and ids


def explain(file: Path, names: list[str], categories: list[str]) -> str:
    """The message for classes that do not `fit` published weights: the first class that differs, and the next action."""
    first_wrong = next((i for i, name in enumerate(names) if name != categories[i]), 0)
    if len(categories) != IMAGENET:
        return (
            f"{file} expects {len(categories)} classes in the order of torchvision's list; the data's class {first_wrong} is "
            f"{names[first_wrong]!r} where {categories[first_wrong]!r} should be; name them in that order in the file "
            "data.class_names, if the labels follow it"
        )
    in_order = [bool(WORDNET_ID.fullmatch(b)) and b > a for a, b in zip(["", *names], names, strict=False)]
    if in_order[0]:
        first_wrong, expected = in_order.index(False), "the next id in order"
    else:
        expected = repr(categories[first_wrong])
    return (
        f"{file} expects ImageNet's 1000 classes in the order of their WordNet ids; the data's class {first_wrong} is "
        f"{names[first_wrong]!r} where {expected} should be; name the ids (n...) in that order in the file data.class_names, "
        "if the labels follow it"
    )

"""The weights that torchvision publishes, as it describes them itself: name, file, network, classes, normalisation.

They are known offline; nothing is downloaded. `models/pretrained.py` looks for the files in torch's own folder.
"""

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
    """What torchvision says about weights that it publishes; `network` is its name for the network."""

    network: str
    file: str
    url: str
    categories: list[str]
    normalization: tuple[tuple[float, ...], tuple[float, ...]]


def published(name: str) -> Published | None:
    """Weights by torchvision's name for them (ResNet18_Weights.IMAGENET1K_V1) or for their file (resnet18-f37072fd.pth)."""
    for network, names, weights in everything():
        if name in names:
            expected = (tuple(weights.transforms().mean), tuple(weights.transforms().std))
            return Published(network, names[1], weights.url, weights.meta["categories"] or [], expected)
    return None


def everything() -> list[tuple[str, tuple[str, str], Any]]:
    """(network, (name, file), entry) of everything that torchvision publishes to classify images or videos."""
    from torchvision import models  # here, because importing it takes seconds in every process

    networks = [*models.list_models(module=models), *models.list_models(module=models.video)]
    enums = [(network, models.get_model_weights(network)) for network in networks]
    entries = [(network, f"{enum.__name__}.{key}", enum[key]) for network, enum in enums for key in enum.__members__]
    return [(network, (name, weights.url.rpartition("/")[2]), weights) for network, name, weights in entries]


def similar(name: str) -> str:
    if "_Weights" not in name and not re.search(r"-[0-9a-f]{8}\.pth$", name):
        return "; give the path of a .safetensors, .pt or .pth file, or torchvision's name of published weights"
    close = difflib.get_close_matches(name, [known for _, names, _ in everything() for known in names], n=1)
    return f", and torchvision publishes none of that name{f'; did you mean {close[0]}?' if close else ''}"


def fits(names: list[str], categories: list[str]) -> bool:
    """The categories as torchvision lists them, or ImageNet's ids in order."""
    if names == categories:
        return True
    ids = sorted(set(names)) == names and all(WORDNET_ID.fullmatch(name) for name in names)
    return len(categories) == IMAGENET and ids


def _not_published(file: Path, names: list[str], categories: list[str]) -> str:
    i = next(i for i, name in enumerate(names) if name != categories[i])
    return (
        f"{file} expects {len(categories)} classes in the order of torchvision's list; the data's class {i} is {names[i]!r} "
        f"where {categories[i]!r} should be; name them in that order in the file data.class_names, if the labels follow it"
    )


def _not_imagenet(file: Path, names: list[str], categories: list[str]) -> str:
    pairs = zip(["", *names], names, strict=False)
    ids = [bool(WORDNET_ID.fullmatch(name)) and name > before for before, name in pairs]
    i = ids.index(False) if ids[0] else next(i for i, name in enumerate(names) if name != categories[i])
    return (
        f"{file} expects ImageNet's 1000 classes in the order of their WordNet ids; the data's class {i} is {names[i]!r} "
        f"where {'the next id in order' if ids[0] else repr(categories[i])} should be; name the ids (n...) in that order "
        "in the file data.class_names, if the labels follow it"
    )


def explain(file: Path, names: list[str], categories: list[str]) -> str:
    """Why the data's classes are not those of published weights, and what to do."""
    return (_not_imagenet if len(categories) == IMAGENET else _not_published)(file, names, categories)

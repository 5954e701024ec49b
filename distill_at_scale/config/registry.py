"""Resolves a name in a configuration to an object.

A name is a key of one of the package's tables (sources, criteria, methods, networks) or `package.module:Object` from the
user's own code; there is no other plug-in system.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_at_scale.config.explain import suggest
from distill_at_scale.core.errors import UserError

if TYPE_CHECKING:
    from distill_at_scale.config.load import Config

FRAME = "frame:"  # prefix of the name of a network that sees the middle frame of a clip only
# words that people use for an entry of a table that has another name
ALIASES = {
    "folder": "imagefolder", "image_folder": "imagefolder", "images": "imagefolder", "directory": "imagefolder",
    "huggingface": "parquet", "hf": "parquet", "datasets": "parquet", "arrow": "parquet",
    "wds": "webdataset", "tar": "webdataset", "shards": "webdataset",
    "video": "videofolder", "videos": "videofolder", "clips": "videofolder", "mp4": "videofolder",
    "audio": "audiofolder", "sound": "audiofolder", "sounds": "audiofolder", "wav": "audiofolder",
    "npy": "tensors", "numpy": "tensors", "arrays": "tensors", "imagenet1k": "imagenet", "ilsvrc": "imagenet",
    "ssv2": "something_v2", "k400": "kinetics", "kinetics400": "kinetics", "mnist": "torchvision",
    "cifar": "torchvision", "cifar10": "torchvision", "cifar100": "torchvision",
    "gradient_matching": "dc", "distribution_matching": "dm", "trajectory_matching": "mtt",
    "cross_entropy": "loss", "gradnorm": "grand", "confidence": "margin", "cnn": "convnet", "resnet": "resnet18",
}  # fmt: skip

# the names of the tables, repeated here so that a wrong one is an error before torch is loaded
BUILT_IN = {
    "source": (
        "digits", "parquet", "imagefolder", "imagenet", "imagenet_tar", "tiny_imagenet", "torchvision", "webdataset",
        "moving_digits", "videofolder", "audiofolder", "kinetics", "kinetics_tar", "ucf101", "hmdb51", "something_v2",
        "tensors",
    ),
    "method": ("dc", "dsa", "dm", "idc", "mtt", "tesla", "sre2l", "rded", "pca", "coreset"),
    "network": (
        "mlp", "convnet", "convnet_bn", "alexnet", "vgg11", "resnet18", "resnet18_bn", "resnet50", "resnet50_bn",
        "convnet3d", "r3d_18", "r3d_18_bn", "r2plus1d_18", "r2plus1d_18_bn",
    ),
}  # fmt: skip


def check_built_in(config: Config) -> None:
    """Raise UserError for an unknown source, method or network; names with a colon are checked where they are resolved."""
    networks = [("score.network", config.score.network), ("distill.network", config.distill.network)]
    networks += [("evaluate.networks", name) for name in config.evaluate.networks]
    names = [("data.source", config.data.source, "source"), ("distill.method", config.distill.method, "method")]
    names += [(key, name.removeprefix(FRAME), "network") for key, name in networks]
    for key, name, table in names:
        if ":" not in name:
            resolve(key, name, dict.fromkeys(BUILT_IN[table]))


def resolve(key: str, name: str, table: Mapping[str, Any], needs: tuple[str, ...] = ()) -> Any:
    """The object called `name`.

    Args:
        key: the configuration key, for messages.
        needs: attributes that the object must have.

    Raises:
        UserError: the name is unknown, its module does not import, or the object lacks an attribute.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        alias = ALIASES.get(name.lower().replace("-", "_"))
        advice = f"did you mean {alias}?" if alias in table else suggest(name, table)
        raise UserError(f"{key} = {name!r} is unknown; {advice} (or package.module:Object)")
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{key} = {name!r} cannot be imported; write package.module:Object, without a path or .py")
    try:
        resolved = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, SystemExit) as error:
        raise UserError(f"{key} = {name!r} cannot be imported: {error}") from None
    if missing := [need for need in needs if not hasattr(resolved, need)]:
        raise UserError(f"{key} = {name!r} does not keep the contract: it lacks {', '.join(missing)}")
    return resolved

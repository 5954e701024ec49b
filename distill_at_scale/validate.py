"""What can be known to be wrong before a run: names that mean nothing, and networks or weights that do not fit the data.

Left out: looking at every sample for damage.
"""

from __future__ import annotations

import torch

from distill_at_scale import distill
from distill_at_scale.augment import Augmentation
from distill_at_scale.config import Config
from distill_at_scale.data import ingest
from distill_at_scale.data.shards import Prepared
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.errors import UserError
from distill_at_scale.networks import NetworkSpec, builder, mixes_samples
from distill_at_scale.pruning import static
from distill_at_scale.registry import resolve
from distill_at_scale.scoring import weights
from distill_at_scale.scoring.scorer import criteria_of


def check_names(config: Config) -> None:
    """Resolve every name in the configuration before anything is computed.

    Raises UserError for the first that is unknown or does not keep its contract.
    """
    resolve("data.source", config.data.source, SOURCES, ingest.CONTRACT)
    criteria = {**dict.fromkeys(config.score.criteria), static.RANDOM: None}
    criteria_of(config.score.criteria)
    resolve("select.criterion", config.criterion, criteria) if ":" not in config.criterion else None
    builder("score.network", config.score.network)
    builder("distill.network", config.distill.network)
    for name in config.evaluate.networks:
        builder("evaluate.networks", name)
    Augmentation(distill.backend_class(config).protocol(config)["augment"])


def check_networks(config: Config, prepared: Prepared) -> None:
    """Build every network of the run once, for the data's shape, send one image through it, and load given weights.

    Raises UserError for one that does not fit, before anything is trained.
    """
    for key, name, width, depth in _wanted(config):
        _check_network(key, NetworkSpec(name, prepared.shape, len(prepared.class_names), width, depth))
    source_class_names = prepared.meta.get("source_class_names", prepared.class_names)
    weights.check(config, prepared.shape, prepared.class_names, source_class_names)


def _wanted(config: Config) -> list[tuple[str, str, int, int | None]]:
    """(configuration key, name, width, depth) of every network of the run."""
    score, made = config.score, config.distill
    wanted = [
        ("score.network", score.network, score.width, score.depth),
        ("distill.network", made.network, made.width, made.depth),
    ]
    wanted += [("evaluate.networks", name, made.width, made.depth) for name in config.evaluate.networks]
    return wanted


@torch.no_grad()
def _check_network(key: str, spec: NetworkSpec) -> None:
    try:
        network = spec.build(0)
        if key == "distill.network" and mixes_samples(network):
            raise UserError(
                f"{key} = {spec.name!r} has batch norm, under which the samples of a batch are not independent, as "
                "matching needs; take a network with instance norm (convnet, resnet18)"
            )
        network.eval()(torch.zeros(1, *spec.shape))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} = {spec.name!r} cannot take images of shape {spec.shape}: {error}") from None

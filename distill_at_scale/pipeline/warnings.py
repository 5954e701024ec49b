"""Warnings at the start of a command: keys that have no effect, and data on which the result says little.

A key is reported only if it was set. A file may hold the sections of methods that are not chosen; on the command line such
a key is probably a mistake, and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from distill_at_scale.config.experiments import STUDIES
from distill_at_scale.config.fields import explicit_keys, flatten
from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ORDER_KEYS
from distill_at_scale.core import command_line
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest.chunks import stores_jpeg
from distill_at_scale.data.ingest.sample_types import holds_tensors
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.contract import Method
from distill_at_scale.distillation.methods.shared.real_images import RealImagesMethod
from distill_at_scale.distillation.summary import few_tested
from distill_at_scale.pruning.criteria.factory import MONTE_CARLO, build_criteria
from distill_at_scale.pruning.proxies import train as proxies
from distill_at_scale.pruning.selection import quotas
from distill_at_scale.pruning.selection.held_out import HeldOut

CLIP_KEYS = ("sampling", "stride", "decoder", "seek", "short")
IMAGE_KEYS = ("size", "resize", "channels", "store", "quality", "max_pixels")
TEACHER_KEYS = ("epochs", "batch", "lr", "momentum", "weight_decay", "augment", "infobatch")
CLUSTER_KEYS = ("gpus_per_worker", "grows", "actors", "max_failures", "object_store_mb")
KEYS_OF_SOURCES = {  # keys that only some sources read
    "path": {*SOURCES} - {"digits"},
    "annotations": {"kinetics", "kinetics_tar", "ucf101", "hmdb51", "something_v2"},
    "fold": {"ucf101", "hmdb51"},
    "val_labels": {"imagenet", "imagenet_tar"},
    "synsets": {"imagenet", "imagenet_tar"},
    "image_column": {"parquet"},
    "label_column": {"parquet", "tensors", "webdataset"},
    "value_column": {"tensors"},
    **{key: {"audiofolder"} for key in ("label_pattern", "test_pattern", "rate", "seconds", "bands")},
}
MAX_NAMED = 3  # classes in a warning


@dataclass(frozen=True)
class NoEffect:
    """Keys of one section that have no effect under a condition."""

    section: str
    keys: Sequence[str]  # or sections
    unless: str  # the dotted key that decides it; where a sweep or a study varies it, nothing is reported
    condition: Callable[[Config], bool]
    why: str  # the end of "... has no effect: ..."; may name keys as {section.key}


def _criteria(config: Config) -> set[str]:
    return set(config.score.criteria)


def _lacks(*criteria: str) -> Callable[[Config], bool]:
    """Whether none of the criteria is computed; code of your own may read any key."""
    return lambda c: not _criteria(c) & set(criteria) and not any(":" in name for name in _criteria(c))


def _of_source(key: str) -> NoEffect:
    readers = KEYS_OF_SOURCES[key]
    why = f"data.source is {{data.source}}; {', '.join(sorted(readers))} read it"
    why = "data.source is {data.source}, which has its own data" if key == "path" else why
    return NoEffect("data", [key], "data.source", lambda c: c.data.source in {*SOURCES} - readers, why)


def _of_teacher(method: str) -> NoEffect:
    keys = [f"teacher_{key}" for key in TEACHER_KEYS]
    trained = f"distill.{method}.teacher_weights gives a trained teacher"
    return NoEffect(
        f"distill.{method}", keys, f"distill.{method}.teacher_weights",
        lambda c: c.distill.method == method and getattr(c.distill, method).teacher_weights is not None, trained,
    )  # fmt: skip


def _of_order(key: str) -> NoEffect:
    readers = [order for order, keys in ORDER_KEYS.items() if key in keys]
    why = f"select.order is {{select.order}}, not {' or '.join(readers)}"
    return NoEffect("select", [key], "select.order", lambda c: key in c.select.idle_keys, why)


def _of_study(study: str) -> NoEffect:
    why = f"studies.run does not name {study}"
    return NoEffect("studies", [study], "studies.run", lambda c: study not in c.studies.run, why)


NO_EFFECT = (
    NoEffect("runtime", ("drop", "tail", "probes", "decay", "refresh"), "runtime.rule", lambda c: c.runtime.rule == "none",
             "runtime.rule is none, so no sample of a batch is dropped; set runtime.rule=loss"),
    NoEffect("runtime", ("probes", "decay"), "runtime.rule", lambda c: c.runtime.rule == "loss",
             "runtime.rule is loss; only the rule ite reads it"),
    NoEffect("runtime", ("tail",), "runtime.rule",
             lambda c: c.runtime.rule == "loss" and not engine.method_class(c).both_tails,
             "runtime.rule is loss; only the rule ite and the method dm read it"),
    NoEffect("runtime", ("rule", "drop", "tail", "probes", "decay", "refresh"), "distill.method",
             lambda c: c.runtime.rule != "none" and not engine.prunes(c),
             "distill.method is {distill.method}, which has no real batches to prune; set runtime.rule=none"),
    *map(_of_source, KEYS_OF_SOURCES),
    NoEffect("data", CLIP_KEYS, "data.frames", lambda c: c.data.frames is None and not c.data.source.count(":"),
             "data.frames is not set, so samples are images"),
    NoEffect("data", ("max_seconds", "time_limit"), "data.frames",
             lambda c: c.data.frames is None and c.data.source != "audiofolder" and not c.data.source.count(":"),
             "data.frames is not set, so samples are images"),
    NoEffect("data", ("stride",), "data.sampling", lambda c: bool(c.data.frames) and c.data.sampling != "dense",
             "data.sampling is {data.sampling}; only dense reads it"),
    NoEffect("data", ("quality",), "data.store", lambda c: not holds_tensors(c.data) and not stores_jpeg(c.data),
             "pixels are stored raw; set data.store=jpeg"),
    NoEffect("data", IMAGE_KEYS, "data.source", lambda c: holds_tensors(c.data),
             "the samples of data.source={data.source} are arrays, which are stored as they are"),
    NoEffect("data", ("imbalance",), "data.transform", lambda c: c.data.transform != "long_tail",
             "data.transform is {data.transform}; only long_tail reads it"),
    NoEffect("data", ("copies",), "data.transform", lambda c: c.data.transform != "near_duplicates",
             "data.transform is {data.transform}; only near_duplicates reads it"),
    NoEffect("data", ("variance_classes",), "data.transform",
             lambda c: c.data.transform not in ("low_variance", "high_variance"),
             "data.transform is {data.transform}; only low_variance and high_variance read it"),
    NoEffect("score", ("preset", *proxies.KEYS, "workers"), "score.weights", lambda c: c.score.weights is not None,
             "score.weights gives trained networks, so no proxies are trained"),
    NoEffect("score", ("preset", *proxies.KEYS, "workers", "weights"), "score.criterion",
             lambda c: c.score.weights is None and not build_criteria(c.score),
             "no criterion of score.criterion needs a proxy network"),
    NoEffect("score", ("early",), "score.criterion", _lacks("loss_early", "el2n", "grand"),
             "score.criterion has none of loss_early, el2n and grand"),
    NoEffect("score", ("late",), "score.criterion", _lacks("loss_converged", "el2n_late"),
             "score.criterion has neither loss_converged nor el2n_late"),
    NoEffect("score", ("features",), "score.criterion", _lacks("density", "herding", "k_center", "clusters"),
             "score.criterion has none of density, herding, k_center and clusters"),
    NoEffect("score", ("clusters",), "score.criterion", _lacks("clusters"), "score.criterion has no clusters"),
    NoEffect("score", ("cad_windows", "cad_length"), "score.criterion", _lacks("cad"), "score.criterion has no cad"),
    NoEffect("score", ("neighbours",), "score.criterion", _lacks("density"), "score.criterion has no density"),
    NoEffect("score", ("monte_carlo",), "score.criterion", lambda c: MONTE_CARLO not in _criteria(c),
             "score.criterion has no monte_carlo"),
    NoEffect("score.monte_carlo", ("steps",), "score.monte_carlo.learn",
             lambda c: MONTE_CARLO in _criteria(c) and c.score.monte_carlo.learn == "train",
             "score.monte_carlo.learn is train; only dc distils the subsets"),
    NoEffect("select", ("keep", "auto"), "select.per_class", lambda c: c.select.per_class is not None,
             "select.per_class decides how many samples are kept"),
    NoEffect("select", ("auto",), "select.keep", lambda c: c.select.per_class is None and c.select.keep != "auto",
             "select.keep is {select.keep}, not auto"),
    *map(_of_order, ("stratum_start", "easiest", "strata", "window")),
    NoEffect("select", ("refresh_pool",), "select.refresh", lambda c: not c.select.refresh,
             "select.refresh is not set, so the kept samples stay"),
    NoEffect("distill", ("options",), "distill.method", lambda c: c.distill.method in METHODS,
             "only a method of your own reads it; {distill.method} has the section distill.{distill.method}"),
    NoEffect("distill", ("steps", "evaluate_every", "checkpoint_every"), "distill.method",
             lambda c: issubclass(METHODS.get(c.distill.method, Method), RealImagesMethod),
             "distill.method is {distill.method}, which optimises nothing, so its set does not depend on steps"),
    *map(_of_teacher, ("sre2l", "rded")),
    NoEffect("distill.tesla", ("label_lr", "label_init"), "distill.tesla.learn_labels",
             lambda c: c.distill.method == "tesla" and not c.distill.tesla.learn_labels,
             "distill.tesla.learn_labels is false"),
    NoEffect("evaluate", ("bound_epochs", "bound_infobatch"), "evaluate.bounds",
             lambda c: not c.evaluate.bounds and not command_line.compares(),
             "evaluate.bounds is empty, so no upper bound is trained"),
    NoEffect("run", ("scratch", "retry_seconds"), "run.dir", lambda c: "://" not in c.run.dir,
             "run.dir is on this machine, not on an object store"),
    NoEffect("cluster", CLUSTER_KEYS, "cluster.address", lambda c: c.cluster.address == "none",
             "cluster.address is none, so all work runs in this process"),
    NoEffect("sweep", ("samples",), "sweep.search", lambda c: c.sweep.search == "grid",
             "sweep.search is grid, which tries all combinations"),
    NoEffect("sweep", ("grace", "reduction"), "sweep.search", lambda c: c.sweep.search != "asha",
             "sweep.search is {sweep.search}; only asha stops trials early"),
    *map(_of_study, STUDIES),
)  # fmt: skip


def of_keys(config: Config) -> list[str]:
    """A sentence for each reason for which keys that were set have no effect."""
    explicit, reported, lines = explicit_keys(config), set[str](), []
    varied = [*flatten(config.sweep.space), *(key for keys in config.studies.across.sets.values() for key in keys)]
    values = flatten(config)
    for row in NO_EFFECT:
        names = [f"{row.section}.{key}" for key in row.keys]
        keys = [key for key in explicit if any(f"{key}.".startswith(f"{name}.") for name in names)]
        keys = [key for key in keys if key not in reported]
        if not keys or any(f"{name}.".startswith(f"{row.unless}.") for name in varied) or not row.condition(config):
            continue
        reported |= set(keys)
        why = row.why
        for name in (name for name in values if f"{{{name}}}" in why):
            why = why.replace(f"{{{name}}}", str(values[name]))
        listed = " and ".join([", ".join(keys[:-1]), keys[-1]][len(keys) == 1 :])
        lines.append(f"{listed} {'has' if len(keys) == 1 else 'have'} no effect: {why}")
    return lines


def of_overrides(config: Config, overrides: Sequence[str]) -> list[str]:
    """A sentence for each override of a method that is not the chosen one."""
    chosen, varied = config.distill.method, flatten(config.sweep.space)
    used = {chosen} | ({"dc"} if MONTE_CARLO in _criteria(config) and config.score.monte_carlo.learn == "dc" else set())
    lines = []
    for key in (text.partition("=")[0].strip() for text in overrides):
        method = key.split(".")[1] if key.startswith("distill.") and key.count(".") > 1 else ""
        if method in METHODS and method not in used and "distill.method" not in varied:
            lines.append(f"{key} has no effect: distill.method is {chosen}; set distill.method={method} to use it")
    return lines


def of_data(config: Config, class_names: Sequence[str], counts: Sequence[int], tested: int) -> Iterator[str]:
    """Sentences on the data: nothing or little to test on, and classes of which selection keeps no more samples than are
    distilled.

    Args:
        counts: training samples per class.
        tested: samples of the test split, 0 without one.
    """
    if (split := config.evaluate.split) == "held_out":
        tested = sum(map(HeldOut(config.select.held_out, config.min_per_class).number, counts))
    if tested and (note := few_tested(tested, split)):
        yield note
    elif not tested and split == "test":
        yield "there is no test split, so nothing will be evaluated; data.holdout=0.2 makes one"
    kept, ipc = quotas.expected(config.select, config.min_per_class, list(counts)), config.distill.ipc
    few = [name for name, number in zip(class_names, kept, strict=True) if number <= ipc]
    if few and config.select.scope == "class":
        more = f" and {len(few) - MAX_NAMED} more" if len(few) > MAX_NAMED else ""
        names = ", ".join(map(repr, few[:MAX_NAMED])) + more
        yield (
            f"of {len(few)} of {len(kept)} classes ({names}) at most distill.ipc = {ipc} samples are kept, so the distilled "
            "samples can be no more than these real ones; raise select.keep, or lower distill.ipc"
        )


def warn(config: Config, display: Display, overrides: Sequence[str] = ()) -> None:
    """Say at the start of a command which keys have no effect."""
    for line in [*of_keys(config), *of_overrides(config, overrides)]:
        display.say(f"warning: {line}")

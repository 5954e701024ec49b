"""Ready-made weights for scoring and teachers: read, fitted to the network and checked against the data's classes.

A name is a safetensors file, a state dict of torch (loaded without running pickled code), a checkpoint of one of our own
proxies, or weights that torchvision publishes, whose file must be in torch's hub folder. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import file_digest
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.models.spec import OF_CLIPS, TORCHVISION, NetworkSpec, torchvision_classifiers
from distill_at_scale.models.torchvision_weights import Published, explain, fits, similar
from distill_at_scale.models.torchvision_weights import published as find_published

State = dict[str, Tensor]
Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel
MAX_EXPANSION = 16  # bytes of weights per byte of file: tensors may share storage, and a pickle can repeat one value
ZIP_MAGIC = b"PK\3\4"  # first bytes of a file of torch.save; older ones are bare pickles
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts save the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "weight.")  # of DataParallel, torch.compile, Lightning and our proxies


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights that fit their network.

    Attributes:
        state: float32 tensors by the network's own names, for a network of `outputs` classes.
        classes: columns of the logits that are the data's classes, in the data's order; None: all columns, in order.
        normalization: (mean, std) per channel on the scale 0..1 that the weights expect; None: the data's own.
        sha256: of the file.
    """

    state: State
    outputs: int
    classes: list[int] | None
    normalization: Moments | None
    sha256: str


def load(name: str, spec: NetworkSpec, class_names: list[str], source_class_names: list[str]) -> PretrainedWeights:
    """Read weights, a file or torchvision's name, and fit them to a network with the data's number of classes.

    The data's classes, in the order of their labels, may be a subset of those of the source. Raises UserError if the file is
    missing, damaged, not plain tensors or not finite, or is of another network or other classes.
    """
    file, published = _find(name)
    state, metadata = _read(file)
    trained_on, own_normalization = _class_names(file, metadata), _normalization(file, metadata, spec.shape[-3])
    state = _rename(state, spec.skeleton().state_dict())
    outputs = _outputs(state, spec)
    fits_data = outputs in (len(class_names), len(source_class_names))
    wider = trained_on or imagenet_ids()  # the data may have some of the classes that the weights know
    if not fits_data and not (len(wider) == outputs and set(class_names) <= set(wider)):
        source = "" if len(source_class_names) == len(class_names) else f" (of {len(source_class_names)} in its source)"
        imagenet = ", or name the data's classes by ImageNet's WordNet ids" if outputs == len(imagenet_ids()) else ""
        raise UserError(
            f"{file} has outputs for {outputs} classes, the data has {len(class_names)}{source}; take weights that were "
            f"trained on these classes{imagenet}"
        )
    fitted = _fit(file, state, replace(spec, classes=outputs), published)
    order = wider
    if fits_data:
        order = _class_order(file, trained_on, published, outputs, class_names, source_class_names)
    columns = None
    if order != class_names:
        column_of = {name: column for column, name in enumerate(order)}
        if unknown := [name for name in class_names if name not in column_of]:
            raise UserError(f"{file} knows no class {unknown[0]!r}; take it out of data.classes, or take other weights")
        columns = [column_of[name] for name in class_names]
    normalization = published.normalization if published else own_normalization
    return PretrainedWeights(fitted, outputs, columns, normalization, file_digest(file)["sha256"])


@lru_cache(maxsize=1)
def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet-1K's classes, in the order of the labels."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text(encoding="ascii").split()


def digests(names: Sequence[str]) -> dict[str, str]:
    """A digest per name: the content of its file and, for published weights, torchvision's network and normalisation."""
    result = {}
    for name in names:
        file, published = _find(name)
        expects = [published.network, published.normalization] if published else None
        result[name] = digest([file_digest(file)["sha256"], expects])
    return result


def check(config: Config, shape: Sequence[int], class_names: list[str], source_class_names: list[str]) -> None:
    """Load the weights of `score.weights` once; raises UserError for the first that cannot be used."""
    score = config.score
    spec = NetworkSpec(score.network, tuple(shape), len(class_names), score.width, score.depth)
    for name in score.weight_names:
        load(name, spec, class_names, source_class_names)


def _find(name: str) -> tuple[Path, Published | None]:
    """The file of the weights called `name`, and torchvision's entry if it publishes them."""
    path = Path(name).expanduser()
    published = find_published(path.name) if path.suffix == ".pth" or "_Weights." in name else None
    if path.is_file():
        return path, published
    if published is None or name != path.name:
        raise UserError(f"score.weights = {name!r}: there is no such file{similar(path.name)}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if not file.is_file():
        raise UserError(
            f"score.weights = {name!r} is not on this machine; put torchvision's file {published.file} at {file} "
            f"(it is published as {published.url}; nothing is downloaded here)"
        )
    return file, published


def _read(file: Path) -> tuple[State, Mapping[str, str]]:
    """The tensors of a file, and its metadata."""
    try:
        size = file.stat().st_size
        state, metadata = _read_safetensors(file) if file.suffix == ".safetensors" else (_read_pickle(file), {})
    except OSError as error:
        raise UserError(f"cannot read the weights {file}: {error.strerror or error}. Is the path right?") from None
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > MAX_EXPANSION * size:
        raise UserError(
            f"{file} claims {claimed:,} bytes of weights and has {size:,}; save it again, or get it elsewhere"
        )
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise UserError(f"{file}: {key} has values that are not finite; these weights cannot score anything")
    return state, metadata


def _read_safetensors(file: Path) -> tuple[State, Mapping[str, str]]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # from safetensors, or from torch for an impossible shape
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is not a complete safetensors file ({reason}); copy or save it again") from None


def _class_names(file: Path, metadata: Mapping[str, str]) -> list[str] | None:
    try:
        names = json.loads(metadata.get("class_names", "null"))
    except (ValueError, RecursionError):
        names = metadata["class_names"]
    if not (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))):
        raise UserError(f"{file}: the metadata class_names must be a JSON list of names, and is {str(names)[:80]!r}")
    return names


def _normalization(file: Path, metadata: Mapping[str, str], channels: int) -> Moments | None:
    """Mean and deviation per channel, from 0 to 1: each a number or a fraction, or a JSON list of one per channel."""
    if "mean" not in metadata and "std" not in metadata:
        return None

    def numbers(key: str) -> tuple[float, ...]:
        text = metadata.get(key, "")
        try:
            entries = json.loads(text) if text.lstrip().startswith("[") else [text] * channels
            values = tuple(float(Fraction(str(entry))) for entry in entries)
        except (ValueError, ZeroDivisionError, RecursionError):
            values = ()
        if len(values) != channels or not all(0 <= value <= 1 for value in values) or (key == "std" and 0 in values):
            raise UserError(
                f"{file}: the metadata {key} must be a number from 0 to 1 or a JSON list of {channels}, one per channel, and "
                f"is {text[:80]!r}; correct it, or take both mean and std out to use the data's own normalisation"
            )
        return values

    return numbers("mean"), numbers("std")


def _read_pickle(file: Path) -> State:
    refused = f"{file} cannot be loaded safely as a state dict"
    with open(file, "rb") as handle:
        is_archive = handle.read(4) == ZIP_MAGIC
    if is_archive:
        # torch.save never compresses its archives: a compressed one is a zip bomb, or not torch's
        try:
            with zipfile.ZipFile(file) as archive:
                compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        except Exception as error:  # damaged names and sizes raise nearly anything
            raise UserError(f"{refused}: it is damaged ({error}); save it again") from None
        if compressed:
            raise UserError(f"{file} is a compressed zip archive, which torch does not write; save the weights again")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {code[1]}" if code else "it is damaged, or more than tensors"
        raise UserError(
            f"{refused}: {reason}; save the weights as safetensors where you trust the file: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from None
    while isinstance(saved, Mapping) and (keys := [k for k in STATE_DICT_KEYS if isinstance(saved.get(k), Mapping)]):
        saved = saved[keys[0]]
    tensors = {k: v for k, v in saved.items() if isinstance(v, Tensor)} if isinstance(saved, Mapping) else {}
    if not tensors:
        raise UserError(f"{file} holds no state dict; save it with torch.save(model.state_dict(), ...) or safetensors")
    return {str(key): value for key, value in tensors.items()}


def _rename(state: State, expected: Collection[str]) -> State:
    """The tensors under the names of our network, for prefixes and layouts that are common."""
    state = {key: value for key, value in state.items() if not re.fullmatch(r"momentum\.\d+", key)}
    while not state.keys() & set(expected):
        shared = [p for p in PREFIXES if state and all(key.startswith(p) for key in state)]
        if not shared:
            break
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    # our ResNet and VideoResNet wrap torchvision's
    if any(f"net.{key}" in expected and key in state for key in ("conv1.weight", "stem.0.weight")):
        state = {f"classifier{k[2:]}" if k.startswith("fc.") else f"net.{k}": v for k, v in state.items()}
    # the files of torchvision's DenseNets are older than the names of their layers
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value for key, value in state.items()}


def _outputs(state: State, spec: NetworkSpec) -> int:
    """The number of classes of the weights: the size of the first tensor that grows with the number of classes."""
    one_more = replace(spec, classes=spec.classes + 1).skeleton().state_dict()
    for key, value in spec.skeleton().state_dict().items():
        if value.shape != one_more.get(key, value).shape and key in state and state[key].dim():
            return len(state[key])
    return spec.classes  # weights of another network, which _fit refuses


def _fit(file: Path, state: State, spec: NetworkSpec, published: Published | None) -> State:
    """The network's state dict with these tensors; raises UserError with the first names that do not fit."""
    network = spec.skeleton()
    if not (wrong := _misfits(network, state)):
        return network.state_dict()
    hint = ""
    if published:
        name = published.network
        ours = f"{TORCHVISION}{name}" if name in torchvision_classifiers() else None
        hint = f" (torchvision published them for {f'{name}_bn' if f'{name}_bn' in OF_CLIPS else ours})"
    raise UserError(
        f"{file} does not fit score.network = {spec.name!r} for {'clips' if spec.clips else 'images'} of shape "
        f"{spec.shape}: {'; '.join(wrong)}. Set score.network, width, depth and data.size to "
        f"what the weights were trained with{hint}"
    )


def _misfits(network: nn.Module, state: State) -> list[str]:
    """Load the tensors into the network, each in the network's dtype; returns what does not fit."""
    wanted = network.state_dict()

    def fits_slot(key: str) -> bool:
        ours, theirs = wanted[key], state[key]
        return ours.shape == theirs.shape and (theirs.is_floating_point() or not ours.is_floating_point())

    def first(keys: Sequence[str]) -> str:
        return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

    def described(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    odd = [key for key in wanted if key in state and not fits_slot(key)]
    cast: Any = OrderedDict((k, v.to(wanted[k].dtype) if k in wanted else v) for k, v in state.items() if k not in odd)
    if cast.keys() == wanted.keys():
        # without its metadata, torchvision takes the names for those of an older version
        cast._metadata = getattr(wanted, "_metadata", None)
    try:
        missing, unexpected = network.load_state_dict(cast, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:  # of a network with its own load_state_dict
        return [str(error)]
    wrong = [f"{key} is {described(state[key])} where {described(wanted[key])} is expected" for key in odd[:1]]
    if missing := [key for key in missing if key not in odd]:
        wrong.append(f"it lacks {first(missing)}")
    return wrong + ([f"it has {first(unexpected)}, which the network has not"] if unexpected else [])


def _class_order(
    file: Path, trained_on: list[str] | None, published: Published | None, outputs: int,
    class_names: list[str], source_class_names: list[str],
) -> list[str]:  # fmt: skip
    """The class of each column of the logits; raises UserError if they are known to be other classes than the data's."""
    candidates = [names for names in (class_names, source_class_names) if len(names) == outputs]
    if trained_on is not None:
        if trained_on in candidates:
            return trained_on
        if len(trained_on) != outputs:
            raise UserError(
                f"{file} names {len(trained_on)} classes in its metadata and has {outputs} outputs; save it again"
            )
        i = next(i for i in range(outputs) if trained_on[i] != candidates[0][i])
        raise UserError(
            f"{file} was trained on other classes, or on another order of them: its class {i} is {trained_on[i]!r}, the "
            f"data's is {candidates[0][i]!r}; list the classes in the weights' order in data.classes, or take other weights"
        )
    if published and outputs == len(published.categories):
        fitting = [names for names in candidates if fits(names, published.categories)]
        if not fitting:
            raise UserError(explain(file, candidates[-1], published.categories))
        return fitting[0]
    return candidates[0]

"""Ready-made checkpoints for scoring, instead of trained proxies: read, fitted to the network, checked against the classes.

`score.weights` names a safetensors file, a state dict of torch (read without running anything that is pickled in it), a
checkpoint of one of our own proxies, or weights that torchvision publishes, by their name or the name of their file,
which are looked for in torch's own folder. What does not fit is refused before anything is scored.

Left out: downloading anything.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import file_digest
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.models.spec import OF_CLIPS, TORCHVISION, NetworkSpec, is_of_torchvision
from distill_at_scale.models.torchvision_weights import Published, explain, fits, similar
from distill_at_scale.models.torchvision_weights import published as find_published

State = dict[str, Tensor]
MOST_EXPANDED = 16  # times the file: weights may share their bytes, and a pickle may repeat one number without end
ARCHIVE = b"PK\3\4"  # how a file of torch.save begins; older ones are bare pickles
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "weight.")  # of DataParallel, torch.compile, Lightning and our proxies


@dataclass(frozen=True)
class Given:
    """A ready-made checkpoint that fits its network.

    `state` holds float32 tensors by the network's own names, for a network of `outputs` classes; `classes` the columns
    of its logits that are the data's classes, in the data's order, or None for all of them as they are;
    `normalization` the (mean, std) per channel on the scale 0..1 that the weights expect, None for the data's own.
    """

    state: State
    outputs: int
    classes: list[int] | None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None
    sha256: str


def load(name: str, spec: NetworkSpec, class_names: list[str], source_class_names: list[str]) -> Given:
    """The weights called `name` for the network of `spec`, whose `classes` and `class_names` are the data's.

    `source_class_names` are all classes of the source, of which the data may be a subset, in the labels' order.

    Raises UserError for a file that is missing, damaged, no plain tensors, not finite, of another network or classes.
    """
    file, published = _find(name)
    state, trained_on = _read(file)
    state = _renamed(state, spec.skeleton().state_dict())
    outputs = _outputs(state, spec)
    if outputs not in (len(class_names), len(source_class_names)):
        raise UserError(_wrong_count(file, outputs, class_names, source_class_names, published))
    fitted = _fit(file, state, replace(spec, classes=outputs), published)
    order = _class_order(file, trained_on, published, outputs, class_names, source_class_names)
    columns = None if order == class_names else _columns(file, order, class_names)
    return Given(fitted, outputs, columns, published.normalization if published else None, file_digest(file)["sha256"])


def digests(names: Sequence[str]) -> dict[str, str]:
    """What scores depend on, wherever the files lie: content and, where the name tells it, what torchvision expects of them."""
    found = {name: _find(name) for name in names}
    told = {name: [p.network, p.normalization] if p else None for name, (_, p) in found.items()}
    return {name: digest([file_digest(path)["sha256"], told[name]]) for name, (path, _) in found.items()}


def check(config: Config, shape: Sequence[int], class_names: list[str], source_class_names: list[str]) -> None:
    """Load every checkpoint of `score.weights` once; raises the UserError of the first that cannot be used."""
    score = config.score
    spec = NetworkSpec(score.network, tuple(shape), len(class_names), score.width, score.depth)
    for name in score.weight_names:
        load(name, spec, class_names, source_class_names)


def _find(name: str) -> tuple[Path, Published | None]:
    """Where the weights called `name` lie, and what torchvision says about them if it publishes them."""
    path = Path(name).expanduser()
    published = find_published(path.name) if path.suffix == ".pth" or "_Weights." in name else None
    if path.is_file():
        return path, published
    if published is None or name != path.name:
        raise UserError(f"score.weights = {name!r}: there is no such file{similar(path.name)}")
    place = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if not place.is_file():
        raise UserError(
            f"score.weights = {name!r} is not on this machine; put torchvision's file {published.file} at {place} "
            f"(it is published as {published.url}; nothing is downloaded here)"
        )
    return place, published


def _read(file: Path) -> tuple[State, list[str] | None]:
    """The tensors of a file, and the names of the classes that it was trained on, where it says so."""
    try:
        size = file.stat().st_size
        state, names = _read_safetensors(file) if file.suffix == ".safetensors" else (_read_pickle(file), None)
    except OSError as error:
        raise UserError(f"cannot read the weights {file}: {error.strerror or error}. Is the path right?") from None
    if (held := sum(value.numel() * value.element_size() for value in state.values())) > MOST_EXPANDED * size:
        raise UserError(f"{file} claims {held:,} bytes of weights and has {size:,}; save it again, or get it elsewhere")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise UserError(f"{file}: {key} has values that are not finite; these weights cannot score anything")
    return state, names


def _read_safetensors(file: Path) -> tuple[State, list[str] | None]:
    try:
        with safe_open(file, framework="pt") as handle:
            facts, state = handle.metadata() or {}, {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # of the library, or of torch for a shape that cannot be
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is no whole safetensors file ({reason}); copy or save it again") from None
    try:
        names = json.loads(facts.get("class_names", "null"))
    except (ValueError, RecursionError):
        names = facts["class_names"]
    if not (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))):
        raise UserError(f"{file}: the metadata class_names must be a JSON list of names, and is {str(names)[:80]!r}")
    return state, names


def _read_pickle(file: Path) -> State:
    _refuse_packed(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        wants = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants to run {wants[1]}" if wants else "it is damaged, or more than tensors"
        raise UserError(
            f"{file} cannot be loaded safely as a state dict: {why}; save the weights as safetensors where you trust "
            "the file: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from None
    while isinstance(found, Mapping) and (inner := [w for w in WRAPPERS if isinstance(found.get(w), Mapping)]):
        found = found[inner[0]]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise UserError(f"{file} holds no state dict; save it with torch.save(model.state_dict(), ...) or safetensors")
    return {str(key): value for key, value in tensors.items()}


def _refuse_packed(file: Path) -> None:
    """torch never packs its archives, so one that is packed is a bomb, or nothing of torch's."""
    with open(file, "rb") as handle:
        if handle.read(4) != ARCHIVE:
            return
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception as error:  # damaged names and sizes raise nearly anything
        raise UserError(
            f"{file} cannot be loaded safely as a state dict: it is damaged ({error}); save it again"
        ) from None
    if packed:
        raise UserError(f"{file} is a packed zip archive, which torch does not write; save the weights again")


def _renamed(state: State, expected: Collection[str]) -> State:
    """The tensors by the names of the network, as far as known habits of naming lead there."""
    state = {key: value for key, value in state.items() if not re.fullmatch(r"momentum\.\d+", key)}
    while not state.keys() & set(expected):
        shared = [p for p in PREFIXES if state and all(key.startswith(p) for key in state)]
        if not shared:
            break
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    wrapped = [key for key in ("conv1.weight", "stem.0.weight") if f"net.{key}" in expected and key in state]
    if wrapped:  # our ResNet or VideoResNet around torchvision's
        state = {f"classifier{k[2:]}" if k.startswith("fc.") else f"net.{k}": v for k, v in state.items()}
    # torchvision's own DenseNets lie in files that are older than the names of their layers
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value for key, value in state.items()}


def _outputs(state: State, spec: NetworkSpec) -> int:
    """How many classes the weights tell apart: the size of what grows with the number of classes."""
    one_more = replace(spec, classes=spec.classes + 1).skeleton().state_dict()
    for key, value in spec.skeleton().state_dict().items():
        if value.shape != one_more.get(key, value).shape and key in state and state[key].dim():
            return len(state[key])
    return spec.classes  # another network: _fit says so


def _fit(file: Path, state: State, spec: NetworkSpec, published: Published | None) -> State:
    """The network's state dict with these tensors; raises UserError with the first names that do not fit."""
    network = spec.skeleton()
    if wrong := _misfits(network, state):
        ours = _ours(published.network) if published else None
        hint = f" (torchvision published them for {ours})" if ours else ""
        raise UserError(
            f"{file} does not fit score.network = {spec.name!r} for {'clips' if spec.clips else 'images'} of shape "
            f"{spec.shape}: {'; '.join(wrong)}. Set score.network, width, depth and data.size to "
            f"what the weights were trained with{hint}"
        )
    return network.state_dict()


def _misfits(network: nn.Module, state: State) -> list[str]:
    """Put the tensors into the network; returns what is wrong with them."""
    kept = network.state_dict()
    odd = [k for k, v in kept.items() if k in state and (state[k].shape != v.shape or _no_float(state[k], v))]
    cast: Any = OrderedDict((k, v.to(kept[k].dtype) if k in kept else v) for k, v in state.items() if k not in odd)
    if cast.keys() == kept.keys():
        cast._metadata = getattr(kept, "_metadata", None)  # else torchvision takes the names for an older version's
    try:
        missing, unexpected = network.load_state_dict(cast, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:  # of a network with rules of its own
        return [str(error)]
    wrong = [f"{key} is {_kind(state[key])} where {_kind(kept[key])} is expected" for key in odd[:1]]
    wrong += [f"it lacks {_first(lacking)}"] if (lacking := [key for key in missing if key not in odd]) else []
    return wrong + ([f"it has {_first(unexpected)}, which the network has not"] if unexpected else [])


def _ours(network: str) -> str | None:
    """Our name for one of torchvision's networks; None for one that classifies videos and is not among ours."""
    if f"{network}_bn" in OF_CLIPS:
        return f"{network}_bn"
    return f"{TORCHVISION}{network}" if is_of_torchvision(network) else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _no_float(found: Tensor, wanted: Tensor) -> bool:
    return wanted.is_floating_point() and not found.is_floating_point()


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _class_order(
    file: Path, trained_on: list[str] | None, published: Published | None, outputs: int,
    class_names: list[str], source_class_names: list[str],
) -> list[str]:  # fmt: skip
    """The classes of the logits' columns; raises UserError where they are known not to be the data's."""
    candidates = [names for names in (class_names, source_class_names) if len(names) == outputs]
    if trained_on is not None:
        if trained_on not in candidates:
            raise UserError(_wrong_order(file, trained_on, outputs, candidates[0]))
        return trained_on
    if published and outputs == len(published.categories):
        fitting = [names for names in candidates if fits(names, published.categories)]
        if not fitting:
            raise UserError(explain(file, candidates[-1], published.categories))
        return fitting[0]
    return candidates[0]


def _columns(file: Path, order: list[str], class_names: list[str]) -> list[int]:
    place = {name: column for column, name in enumerate(order)}
    if unknown := [name for name in class_names if name not in place]:
        raise UserError(f"{file} knows no class {unknown[0]!r}; take it out of data.classes, or take other weights")
    return [place[name] for name in class_names]


def _wrong_order(file: Path, trained_on: list[str], outputs: int, names: list[str]) -> str:
    if len(trained_on) != outputs:
        return f"{file} names {len(trained_on)} classes in its metadata and has {outputs} outputs; save it again"
    i = next(i for i in range(outputs) if trained_on[i] != names[i])
    return (
        f"{file} was trained on other classes, or on another order of them: its class {i} is {trained_on[i]!r}, the "
        f"data's is {names[i]!r}; list the classes in the weights' order in data.classes, or take other weights"
    )


def _wrong_count(file: Path, outputs: int, names: list[str], source: list[str], published: Published | None) -> str:
    whole = "" if len(source) == len(names) else f" (of {len(source)} in its source)"
    action = "take weights that were trained on these classes"
    subset = ", or list all of ImageNet's 1000 in the file data.class_names and your subset in data.classes"
    return f"{file} has outputs for {outputs} classes, the data has {len(names)}{whole}; {action}{subset if published else ''}"

"""One strict schema for a whole run: defaults <- YAML file <- dotted overrides.

Every key has a type and a range; an unknown key or a wrong value stops the run before anything is computed and says
what is allowed. Names of interchangeable parts (a source, a criterion, a backend, a network) are plain strings here
and are resolved in `registry.py`, so that this module depends on nothing else in the package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill_at_scale.errors import UserError

LARGEST_RATE = 3e38  # what a 32-bit float holds
CLIPS_AT_ONCE = 64  # in a chunk
SIAMESE = "color_crop_cutout_flip_scale_rotate"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    dir: str = "runs/run"
    seed: int = Field(0, ge=0)
    reuse: str | None = None  # another run's folder: its stages of the same fingerprint are taken over, not recomputed


class DataSection(Section):
    source: str = "digits"
    path: str | None = None
    size: int = Field(32, ge=4, le=1024)
    resize: Literal["square", "crop"] = "square"
    channels: Literal[1, 3] = 3
    store: Literal["auto", "raw", "jpeg"] = (
        "auto"  # how prepared pixels are kept; auto: raw up to 128 pixels, then JPEG
    )
    quality: int = Field(90, ge=50, le=100)  # of store: jpeg
    holdout: float | None = Field(None, gt=0, lt=1)  # a seeded, class-wise test split, where the source has none
    classes: list[str] | str | None = None  # a subset, in this order: names, a known subset (imagenette) or a text file
    class_names: str | None = None  # text file: every class of the source, one a line, in the order of the labels
    val_labels: str | None = None  # ImageNet's flat val: its list of labels; default: found by its usual names
    synsets: str | None = None  # what class numbers of that list mean; default: found by its usual names
    image_column: str = "image"
    label_column: str = "label"
    max_pixels: int = Field(
        100_000_000, ge=1, le=170_000_000
    )  # an image that claims more is rejected unopened (decompression bomb)
    chunk: int = Field(1024, ge=1)  # samples per unit of ingest and scoring work; of clips 64 unless it is given
    train_split: Literal["train", "val", "test"] = (
        "train"  # val or test: the split that is else for testing is distilled
    )
    # clips (data.frames set); the rest of the section holds for them too
    frames: int | None = Field(None, ge=2, le=256)  # of a clip; null: the data are images
    sampling: Literal["uniform", "segment", "dense"] = (
        "uniform"  # uniform: middles of equal segments; segment: random within them; dense: every stride-th from a random start
    )
    stride: int = Field(4, ge=1)  # of sampling: dense, in frames of the video
    decoder: Literal["auto", "decord", "pyav"] = "auto"  # auto: decord where it is installed and right, else PyAV
    seek: Literal["exact", "fast"] = (
        "exact"  # fast: the same frames without FFmpeg's loop filter, 43 dB from exact; PyAV only
    )
    short: Literal["repeat", "reject"] = "repeat"  # clips with fewer frames: repeat the last one (listed), or leave out
    time_limit: float = Field(
        60.0, gt=0, le=86_400
    )  # seconds for one clip; then its decoder is killed and the clip rejected
    max_seconds: float = Field(600.0, gt=0)  # of a video; longer ones are rejected
    max_bytes: int = Field(2**28, ge=1)  # of a sample's file; larger ones are rejected unread
    annotations: str | None = (
        None  # list(s) of labels: a file, or a folder of them; default: found by their usual names
    )
    fold: int = Field(1, ge=1, le=3)  # of the official splits of UCF-101 and HMDB-51

    @model_validator(mode="before")
    @classmethod
    def _chunk_of_clips(cls, values: Any) -> Any:
        """A clip takes some hundred times as long to decode as an image."""
        if isinstance(values, dict) and values.get("frames") is not None:
            return {"chunk": CLIPS_AT_ONCE, **values}
        return values


class ScoreSection(Section):
    criterion: str | list[str] = "loss"
    trials: int = Field(5, ge=1)
    epochs: int = Field(5, ge=1)
    weights: str | list[str] | None = (
        None  # ready-made checkpoints instead of trained ones: files, or torchvision's names
    )
    share: float = Field(1.0, gt=0, le=1)  # of the training split that proxies are trained on, class by class
    workers: int = Field(1, ge=1)  # data-parallel workers per proxy; 1: the trials side by side
    shards: int = Field(8, ge=1, le=1024)  # logical shards of a proxy's batches, whatever the number of workers
    network: str = "convnet"
    width: int = Field(128, ge=1)
    depth: int | None = Field(None, ge=1, le=8)
    batch: int = Field(256, ge=1)
    lr: float = Field(0.01, gt=0, le=LARGEST_RATE)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    compile: Literal["auto", "always", "never"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs

    @property
    def criteria(self) -> list[str]:
        return [self.criterion] if isinstance(self.criterion, str) else list(self.criterion)

    @property
    def given_weights(self) -> list[str]:
        """The ready-made checkpoints; empty where proxies are trained."""
        return [self.weights] if isinstance(self.weights, str) else list(self.weights or [])

    @property
    def checkpoints(self) -> tuple[int, int]:
        """Trials and epochs behind every score; a ready-made checkpoint is a trial of one epoch."""
        return (len(self.given_weights), 1) if self.weights is not None else (self.trials, self.epochs)

    @field_validator("criterion")
    @classmethod
    def _no_repeats(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one criterion, and each once")
        return value

    @field_validator("weights")
    @classmethod
    def _some_weights(cls, value: str | list[str] | None) -> str | list[str] | None:
        names = [value] if isinstance(value, str) else value
        if names is not None and (not names or not all(names) or len(set(names)) != len(names)):
            raise ValueError("name at least one file, and each once")
        return value


class SelectSection(Section):
    criterion: str | None = None  # default: the first of score.criterion; "random" is the seeded control
    keep: float = Field(1.0, gt=0, le=1)
    per_class: int | None = Field(None, ge=1)  # a count, instead of keep
    scope: Literal["class", "global"] = "class"
    order: Literal["useful", "useless", "low", "high", "stratum"] = "useful"
    stratum_start: float = Field(0.0, ge=0, lt=1)  # order: stratum keeps the ranks from here on, by usefulness
    min_per_class: int | None = Field(None, ge=0)  # default max(1, distill.ipc)
    seed: int | None = Field(None, ge=0)  # of the random control; default run.seed


class MatchingSection(Section):
    """Gradient matching (METHOD.md section 4, DC)."""

    image_lr: float = Field(0.1, gt=0, le=LARGEST_RATE)
    image_momentum: float = Field(0.5, ge=0, lt=1)
    network_lr: float = Field(0.01, gt=0, le=LARGEST_RATE)
    outer: int | None = Field(None, ge=1)  # default by images per class: 1, 10, 50
    inner: int | None = Field(None, ge=1)  # default by images per class: 1, 50, 10
    real_batch: int = Field(256, ge=1)  # per class; at most what is kept of the class
    network_batch: int = Field(256, ge=1)
    init: Literal["noise", "real"] = "noise"
    augment: str = "none"


class SiameseSection(MatchingSection):
    init: Literal["noise", "real"] = "real"
    augment: str = SIAMESE


class DistributionSection(Section):
    """Distribution matching (METHOD.md section 4, DM)."""

    image_lr: float | None = Field(None, gt=0, le=LARGEST_RATE)  # default 1, and 10 from 100 images per class on
    image_momentum: float = Field(0.5, ge=0, lt=1)
    real_batch: int = Field(256, ge=1)
    init: Literal["noise", "real"] = "real"
    augment: str = SIAMESE


class DistillSection(Section):
    method: str = "dc"
    ipc: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)  # default: the method's own
    workers: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0)  # default run.seed; another one repeats the distillation from the same scores
    network: str = "convnet"
    width: int = Field(128, ge=1)
    depth: int | None = Field(None, ge=1, le=8)
    evaluate_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(50, ge=1)
    dc: MatchingSection = MatchingSection()
    dsa: SiameseSection = SiameseSection()
    dm: DistributionSection = DistributionSection()
    options: dict[str, Any] = {}  # for a method of your own (package.module:Object)


class RuntimeSection(Section):
    rule: Literal["none", "loss"] = "none"
    drop: float = Field(0.3, ge=0, lt=1)
    refresh: int = Field(
        10, ge=1
    )  # a batch is looked at in full every so many steps; in between remembered values decide


class EvaluateSection(Section):
    networks: list[str] = Field(["convnet"], min_length=1)
    seeds: int = Field(5, ge=1)
    epochs: int | None = Field(None, ge=1)  # default: 300, and 1000 with augmentation
    batch: int = Field(256, ge=1)
    lr: float = Field(0.01, gt=0, le=LARGEST_RATE)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    bounds: list[Literal["kept", "full"]] = []  # upper bounds: train on what was kept, and on everything
    bound_epochs: int = Field(30, ge=1)

    @field_validator("networks", "bounds")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each may be named once")
        return value


class ClusterSection(Section):
    address: str | None = None  # null: start Ray here; "none": every stage in this process; else a running cluster
    gpus_per_worker: float = Field(0, ge=0)
    actors: int | None = Field(None, ge=1)  # default: as many as the cluster's cores (or GPUs) allow
    max_failures: int = Field(3, ge=0)
    object_store_mb: int | None = Field(None, ge=80)


class Config(Section):
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    score: ScoreSection = ScoreSection()
    select: SelectSection = SelectSection()
    distill: DistillSection = DistillSection()
    runtime: RuntimeSection = RuntimeSection()
    evaluate: EvaluateSection = EvaluateSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _stratum_fits(self) -> Config:
        if (
            self.select.order == "stratum"
            and not self.select.per_class
            and self.select.stratum_start + self.select.keep > 1 + 1e-9
        ):
            raise ValueError(
                f"select.stratum_start + select.keep is {self.select.stratum_start + self.select.keep:g}; "
                "a stratum must end at or before 1"
            )
        return self

    @property
    def criterion(self) -> str:
        """The criterion that decides the selection."""
        return self.select.criterion or self.score.criteria[0]

    @property
    def select_seed(self) -> int:
        return self.run.seed if self.select.seed is None else self.select.seed

    @property
    def distill_seed(self) -> int:
        return self.run.seed if self.distill.seed is None else self.distill.seed

    @property
    def min_per_class(self) -> int:
        return max(1, self.distill.ipc) if self.select.min_per_class is None else self.select.min_per_class


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and validate.

    Raises UserError that names the key, its origin and what is allowed.
    """
    values = _read_yaml(Path(path))
    origin = {}
    for text in overrides:
        key, value = _parse_override(text)
        _set(values, key.split("."), value, text)
        origin[key] = "the command line"
    return validate(values, origin, str(path))


def validate(values: dict[str, Any], origin: dict[str, str] | None = None, file: str = "the configuration") -> Config:
    """Build a Config from nested plain values; every problem is reported at once, in one UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, origin or {}, file) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def flatten(section: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values of a (nested) section."""
    items = section.model_dump() if isinstance(section, BaseModel) else section
    flat: dict[str, Any] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + ".") if isinstance(value, dict) and value else {name: value})
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, else the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}. Is the path right?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a configuration is a YAML file in UTF-8") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold sections (run, data, score, ...), not a {type(values).__name__}")
    return {key: {} if value is None else value for key, value in (values or {}).items()}


def _parse_override(text: str) -> tuple[str, Any]:
    key, sep, value = text.partition("=")
    if not sep or not key or "." not in key:
        raise UserError(f"cannot read the override {text!r}; write section.key=value, for example select.keep=0.1")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"cannot read the value in the override {text!r}") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"the override {text!r} goes below {key}, which is not a section")
    values[keys[-1]] = value


def _explain(problem: Any, origin: dict[str, str], file: str) -> str:
    key, known = _key_of(problem["loc"]), _known_keys(Config)
    given = [
        place for name, place in origin.items() if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")
    ]
    where = given[0] if given and key else file
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key} (in {where}); {nearest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not key:
        return f"{where}: {message}"
    if key in ("score.criterion", "score.weights", "data.classes") and "valid" in message:
        message = "it should be a name or a list of names"
    return f"{key} = {problem['input']!r} (in {where}) is not allowed: {message}"


def _key_of(place: tuple[str | int, ...]) -> str:
    """The dotted key of a problem's place; pydantic adds the names of tried types, which are left out."""
    return ".".join(str(part) for part in place if str(part) not in ("str", "list[str]"))


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys

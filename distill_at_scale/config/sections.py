"""The sections of a configuration but those of the methods (method_sections.py): every key with its type, range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_LR = 3e38  # what a 32-bit float holds
CLIPS_PER_CHUNK = 64  # in a chunk


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    dir: str = "runs/run"
    seed: int = Field(0, ge=0)
    scratch: str | None = (
        None  # of a run.dir on object storage: where each machine keeps its copy; default: the temporary folder
    )
    retry_seconds: float = Field(300.0, ge=0)  # so long is an object storage waited for that refuses
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
    chunk: int = Field(
        1024, ge=1, le=2**20
    )  # samples per unit of ingest and scoring work; of clips 64 unless it is given
    value_column: str = "values"  # of source: tensors, a column of arrays of one shape
    whiten: Literal["none", "zca"] = (
        "none"  # zca: what distillation and evaluation see, not the scores; small images only
    )
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
    # a training split made harder on purpose, to see how selection bears it; the test split stays as it is
    transform: Literal["none", "long_tail", "near_duplicates", "low_variance", "high_variance"] = "none"
    imbalance: float = Field(10.0, gt=1)  # of long_tail: the largest class to the smallest
    copies: int = Field(5, ge=2, le=100)  # of near_duplicates: so many of every sample, all but the first jittered
    variance_classes: int | None = Field(None, ge=2)  # of low_variance and high_variance; default: half of the classes

    @model_validator(mode="before")
    @classmethod
    def _chunk_of_clips(cls, values: Any) -> Any:
        """A clip takes some hundred times as long to decode as an image."""
        if isinstance(values, dict) and values.get("frames") is not None:
            return {"chunk": CLIPS_PER_CHUNK, **values}
        return values


class MonteCarloSection(Section):
    """Criterion monte_carlo: many small random subsets; a sample's utility is the mean accuracy of its class over those that
    held it (METHOD.md section 2)."""

    subsets: int = Field(1000, ge=2)
    per_class: int = Field(10, ge=1)  # samples of a class in a subset
    learn: Literal["train", "dc"] = (
        "train"  # on a subset: train a network, or distil it first by DC at one image per class
    )
    steps: int = Field(20, ge=1)  # of learn: dc
    epochs: int = Field(30, ge=1)  # of training a network on the subset (or on what it was distilled into)
    networks: int = Field(1, ge=1)  # trained per subset
    lr: float = Field(0.05, gt=0, le=MAX_LR)  # of that training: SGD with momentum 0.9
    width: int = Field(32, ge=1)
    validation: int = Field(
        100, ge=1
    )  # samples per class, drawn from outside the subset, that its accuracies are measured on
    at_once: int = Field(8, ge=1)  # subsets in a task; a finished one is not done again


class ScoreSection(Section):
    criterion: str | list[str] = "loss"
    early: int = Field(5, ge=1)  # epochs from the first that loss_early, el2n and grand count
    late: int = Field(5, ge=1)  # epochs up to the last that loss_converged counts
    features: int = Field(
        128, ge=2
    )  # dimensions that a network's features are projected to, for density and the selectors
    neighbours: int = Field(10, ge=1)  # of criterion density
    imported: dict[
        str, str
    ] = {}  # scores made elsewhere, by name: JSON by position, .npy, .npz, CSV or Parquet by sample_id
    imported_useful: dict[str, Literal["low", "high"]] = {}  # which end of imported scores is useful; default low
    monte_carlo: MonteCarloSection = MonteCarloSection()
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
    lr: float = Field(0.01, gt=0, le=MAX_LR)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    compile: Literal["auto", "always", "never"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs

    @property
    def criteria(self) -> list[str]:
        return [self.criterion] if isinstance(self.criterion, str) else list(self.criterion)

    @property
    def weight_names(self) -> list[str]:
        """The ready-made checkpoints; empty where proxies are trained."""
        return [self.weights] if isinstance(self.weights, str) else list(self.weights or [])

    @property
    def checkpoint_counts(self) -> tuple[int, int]:
        """Trials and epochs behind every score; a ready-made checkpoint is a trial of one epoch."""
        return (len(self.weight_names), 1) if self.weights is not None else (self.trials, self.epochs)

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


class AutoSection(Section):
    """select.keep: auto finds the smallest sufficient rate by bisection, with short distillations."""

    seeds: int = Field(2, ge=2)
    steps: int | None = Field(None, ge=1)  # of a distillation; default: a quarter of those of the run
    evaluations: int = Field(1, ge=1)  # networks per distillation
    tolerance: float = Field(1.0, gt=0)  # in standard deviations of the unpruned runs
    lowest: float = Field(0.001, gt=0, lt=1)  # rates below are not tried
    points: int = Field(6, ge=2)  # rates that are tried at most


class SelectSection(Section):
    # default: the first of score.criterion; "random" is the seeded control; {loss: 0.7, el2n: 0.3} weighs ranks
    criterion: str | dict[str, float] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    auto: AutoSection = AutoSection()
    per_class: int | None = Field(None, ge=1)  # a count, instead of keep
    scope: Literal["class", "global", "adaptive"] = (
        "class"  # adaptive: more of the classes whose scores spread (Neyman)
    )
    order: Literal["useful", "useless", "low", "high", "stratum"] = "useful"
    stratum_start: float = Field(0.0, ge=0, lt=1)  # order: stratum keeps the ranks from here on, by usefulness
    min_per_class: int | None = Field(None, ge=0)  # default max(1, distill.ipc)
    seed: int | None = Field(None, ge=0)  # of the random control; default run.seed

    @property
    def rate(self) -> float:
        """The share to keep, once it is a number."""
        assert not isinstance(self.keep, str), "select.keep: auto is decided before"
        return self.keep


class RuntimeSection(Section):
    rule: Literal["none", "loss", "ite"] = "none"
    drop: float = Field(0.3, ge=0, lt=1)
    tail: float = Field(0.5, ge=0, le=1)  # rule ite: the part of what is dropped that has the largest effect
    probes: int = Field(16, ge=1, le=1024)  # rule ite: directions in which a sample's effect is measured
    decay: float = Field(0.9, ge=0, lt=1)  # rule ite: memory of the running variance behind the thresholds
    refresh: int = Field(
        10, ge=1
    )  # a batch is looked at in full every so many steps; in between remembered values decide


class EvaluateSection(Section):
    networks: list[str] = Field(["convnet"], min_length=1)
    seeds: int = Field(5, ge=1)
    # how a network is trained; null: as the set expects (its card's protocol)
    epochs: int | None = Field(None, ge=1)
    batch: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0, le=MAX_LR)
    momentum: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    control: Literal["random_real", "none"] = "random_real"
    bounds: list[Literal["kept", "full"]] = []  # upper bounds: train on what was kept, and on everything
    bound_epochs: int = Field(30, ge=1)

    @field_validator("networks", "bounds")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each may be named once")
        return value


class MlflowSection(Section):
    tracking_uri: str | None = None  # a server or a store; null: MLFLOW_TRACKING_URI, else MLflow's own default
    experiment: str = "distill_at_scale"


class WandbSection(Section):
    project: str = "distill_at_scale"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackSection(Section):
    """Trackers beside TensorBoard, which every run has; credentials come from the environment, never from here."""

    mlflow: MlflowSection | None = None
    wandb: WandbSection | None = None


class ClusterSection(Section):
    address: str | None = None  # null: start Ray here; "none": every stage in this process; else a running cluster
    gpus_per_worker: float = Field(0, ge=0)
    grows: bool = False  # an autoscaler adds nodes when work waits: what finds no room yet is no error
    actors: int | None = Field(None, ge=1)  # default: as many as the cluster's cores (or GPUs) allow
    max_failures: int = Field(3, ge=0)
    object_store_mb: int | None = Field(None, ge=80)
    price: float | None = Field(None, gt=0)  # of a worker's machine per hour, for `plan`

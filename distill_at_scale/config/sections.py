"""The sections of a configuration except those of methods, sweeps and studies: every key, its type, range and default."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill_at_scale.config.fields import Section, execution_key, later_key, location_key, shorthand_key

MAX_LR = 3e38  # the largest 32-bit float
CLIPS_PER_CHUNK = 64
# score.preset -> the keys of `score` that it sets; measured in jobs/benchmarks/README.md, "How little scoring is enough?"
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"trials": 1, "epochs": 1, "share": 0.5, "width": 32, "lr": 0.028},
}


class RunSection(Section):
    """The run folder and the seed."""

    dir: str = execution_key("runs/run", description="run folder: a path, or a URI such as s3://bucket/runs/x")
    seed: int = Field(0, ge=0, description="seed of every random draw of the run")
    scratch: str | None = execution_key(
        None,
        description="where each machine keeps its copy of a run.dir on an object store; null: the temporary folder",
    )
    retry_seconds: float = execution_key(300.0, ge=0, description="seconds to keep retrying a failing object store")
    reuse: str | None = execution_key(
        None,
        description="another run folder; stages with the same fingerprint are copied from it instead of recomputed",
    )
    redo: Literal["ingest", "score", "select", "distill", "evaluate", "report"] | None = execution_key(
        None,
        description="from this stage on, output that is damaged or of another configuration is moved to replaced/ and "
        "computed again; null: it is an error",
    )

    @field_validator("dir", "scratch")
    @classmethod
    def _writable_names(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or value != value.encode(errors="ignore").decode()):
            raise ValueError("it holds a null character or bytes that are not UTF-8; name another folder")
        return value


class DataSection(Section):
    """The data set, and how ingest turns it into prepared samples."""

    source: str = Field("digits", description="layout of the data: a source's name or package.module:Object")
    path: str | None = location_key(None, description="root of the data: a folder or a URI (s3://, gs://)")
    size: int = Field(32, ge=4, le=1024, description="side of a prepared image or frame, in pixels")
    resize: Literal["square", "crop"] = Field(
        "square", description="square: stretch to size x size; crop: resize the short side, then crop the centre"
    )
    channels: Literal[1, 3] = Field(3, description="1: grey; 3: RGB")
    store: Literal["auto", "raw", "jpeg"] = Field(
        "auto", description="how prepared pixels are stored; auto: raw up to 128 pixels, JPEG above"
    )
    quality: int = Field(90, ge=50, le=100, description="JPEG quality of stored pixels")
    holdout: float | None = Field(
        None, gt=0, lt=1, description="share of each class to split off as a seeded test split, for sources without one"
    )
    classes: list[str] | str | None = Field(
        None, description="subset of the classes, in this order: names, a known subset (imagenette) or a text file"
    )
    class_names: str | None = location_key(
        None, description="text file with all class names of the source, one per line, in label order"
    )
    val_labels: str | None = location_key(
        None, description="label list of ImageNet's flat val folder; null: look for the usual file names"
    )
    synsets: str | None = location_key(
        None,
        description="file that maps the class numbers of val_labels to synsets; null: look for the usual file names",
    )
    image_column: str = Field("image", description="image column of Parquet sources")
    label_column: str = Field("label", description="label column of Parquet sources")
    max_pixels: int = Field(
        100_000_000, ge=1, le=170_000_000, description="reject images with more pixels before decoding"
    )
    chunk: int = Field(1024, ge=1, le=2**20, description=f"samples per unit of work; {CLIPS_PER_CHUNK} for clips")
    value_column: str = later_key("values", description="column with the arrays of source: tensors")
    label_pattern: str | None = later_key(
        None,
        description="audiofolder: regular expression whose group named label finds the class in a file's path; null: class "
        "folders",
    )
    test_pattern: str | None = later_key(
        None,
        description="audiofolder with label_pattern: files whose path this regular expression finds are the test split",
    )
    rate: int = later_key(16_000, ge=4_000, le=96_000, description="audiofolder: samples per second after resampling")
    seconds: float = later_key(
        1.0,
        ge=0.1,
        le=60,
        description="audiofolder: length used; longer sounds are cut, shorter ones padded with silence",
    )
    bands: int = later_key(64, ge=4, le=128, description="audiofolder: mel bands of the spectrograms")
    whiten: Literal["none", "zca"] = later_key(
        "none",
        description="zca: whiten what distillation and evaluation read (small images only); scores are unaffected",
    )
    train_split: Literal["train", "val", "test"] = later_key("train", description="split to distil")
    frames: int | None = Field(None, ge=2, le=256, description="frames per clip; null: samples are images")
    sampling: Literal["uniform", "segment", "dense"] = Field(
        "uniform",
        description="frames of a clip. uniform: middles of equal segments; segment: a random frame of each segment; "
        "dense: every stride-th frame from a random start",
    )
    stride: int = Field(4, ge=1, description="frames between two sampled ones (sampling: dense)")
    decoder: Literal["auto", "decord", "pyav"] = Field(
        "auto", description="video decoder; auto: decord where it is installed and correct, else PyAV"
    )
    seek: Literal["exact", "fast"] = Field(
        "exact", description="fast: skip the loop filter, same frames with small errors (43 dB); PyAV only"
    )
    short: Literal["repeat", "reject"] = Field("repeat", description="too few frames: repeat the last one, or reject")
    time_limit: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="seconds to decode one clip or sound; then it is rejected and its decoder killed",
    )
    max_seconds: float = Field(600.0, gt=0, description="reject longer videos and sounds")
    max_bytes: int = later_key(2**28, ge=1, description="reject larger files without reading them")
    annotations: str | None = location_key(
        None, description="label list of a video set, or its folder; null: look for the usual file names"
    )
    fold: int = Field(1, ge=1, le=3, description="official split of UCF-101 and HMDB-51")
    transform: Literal["none", "long_tail", "near_duplicates", "low_variance", "high_variance"] = later_key(
        "none", description="make the training split harder, to study selection; the test split stays the same"
    )
    imbalance: float = later_key(10.0, gt=1, description="size ratio of the largest to the smallest class (long_tail)")
    copies: int = later_key(5, ge=2, le=100, description="copies per sample, all but one jittered (near_duplicates)")
    variance_classes: int | None = later_key(
        None, ge=2, description="classes to keep (low_variance, high_variance); null: half of them"
    )

    options: dict[str, Any] = later_key({}, description="options of your own source (package.module:Object)")

    @field_validator("label_pattern", "test_pattern")
    @classmethod
    def _regular_expressions(cls, value: str | None, info: ValidationInfo) -> str | None:
        try:
            groups = re.compile(value or "").groupindex
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if value is not None and info.field_name == "label_pattern" and "label" not in groups:
            raise ValueError(r"name the part that is the class, for example '(?P<label>\d+)_'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fewer_clips_per_chunk(cls, values: Any) -> Any:
        """A clip takes about a hundred times as long to decode as an image."""
        if isinstance(values, dict) and values.get("frames") is not None:
            return {"chunk": CLIPS_PER_CHUNK, **values}
        return values


class MonteCarloSection(Section):
    """Criterion monte_carlo: a sample's utility is the mean accuracy of its class over the random subsets that contain it."""

    subsets: int = Field(1000, ge=2, description="random subsets")
    per_class: int = Field(10, ge=1, description="samples per class in a subset")
    learn: Literal["train", "dc"] = Field(
        "train", description="train: train a network on the subset; dc: first distil it by DC to one image per class"
    )
    steps: int = Field(20, ge=1, description="distillation steps per subset (learn: dc)")
    epochs: int = Field(30, ge=1, description="epochs of training a network on the subset or its distillation")
    networks: int = Field(1, ge=1, description="networks trained per subset")
    lr: float = Field(0.05, gt=0, le=MAX_LR, description="learning rate of training on a subset (SGD, momentum 0.9)")
    width: int = Field(32, ge=1, description="channels of the networks trained on subsets")
    validation: int = Field(100, ge=1, description="samples per class outside the subset, to measure accuracy on")
    at_once: int = execution_key(8, ge=1, description="subsets per task; finished subsets are not repeated")


class ScoreSection(Section):
    """Proxy networks and the criteria that score every training sample with them."""

    preset: Literal["fast"] | None = shorthand_key(
        None,
        description="sets trials, epochs, share, width and lr, unless they are given beside it or after it; fast: one narrow "
        "proxy, trained once on half of about 50,000 samples",
    )
    criterion: str | list[str] = Field("loss", description="criteria to compute: a name or a list")
    early: int = later_key(5, ge=1, description="first epochs that loss_early, el2n and grand average")
    late: int = later_key(5, ge=1, description="last epochs that loss_converged averages")
    features: int = later_key(128, ge=2, description="dimensions of projected features (density, herding, k_center)")
    neighbours: int = later_key(10, ge=1, description="nearest neighbours (criterion: density)")
    imported: dict[str, str] = location_key(
        {},
        description="scores computed elsewhere, name: file (by position: JSON, .npy, .npz; by sample_id: CSV, Parquet)",
    )
    imported_useful: dict[str, Literal["low", "high"]] = later_key(
        {}, description="useful end of each imported score; default low"
    )
    monte_carlo: MonteCarloSection = MonteCarloSection()
    trials: int = Field(5, ge=1, description="proxy networks to train, each with its own initialisation")
    epochs: int = Field(5, ge=1, description="epochs per proxy; a checkpoint is scored after each")
    weights: str | list[str] | None = location_key(
        None, description="pretrained checkpoints instead of proxies: files or torchvision's weight names"
    )
    check_weights: bool = execution_key(
        True,
        description="stop if pretrained weights (also of a teacher) do worse than guessing on a sample of the data",
    )
    share: float = Field(1.0, gt=0, le=1, description="share of each class that proxies are trained on")
    workers: int = execution_key(1, ge=1, description="data-parallel workers per proxy; 1: trials run side by side")
    shards: int = Field(
        8,
        ge=1,
        le=1024,
        description="logical shards that proxy batches come from; independent of the number of workers",
    )
    network: str = Field("convnet", description="proxy network: a name or package.module:Object")
    width: int = Field(128, ge=1, description="channels of the proxy network")
    depth: int | None = Field(None, ge=1, le=8, description="blocks of the proxy network; null: by image size")
    batch: int = Field(256, ge=1, description="batch size of proxy training")
    lr: float = Field(0.01, gt=0, le=MAX_LR, description="learning rate of proxy training (SGD)")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of proxy training")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of proxy training")
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="use torch.compile; auto: if it saves more time than it takes"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision of proxies and scoring; auto: bf16 on GPUs and, in compiled code, on CPUs with bf16 units; "
        "else fp32",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """The keys of the preset become keys of the configuration; those that are given win."""
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values

    @property
    def criteria(self) -> list[str]:
        return [self.criterion] if isinstance(self.criterion, str) else list(self.criterion)

    @property
    def weight_names(self) -> list[str]:
        """The pretrained checkpoints; empty if proxies are trained."""
        return [self.weights] if isinstance(self.weights, str) else list(self.weights or [])

    @property
    def checkpoint_counts(self) -> tuple[int, int]:
        """Trials, and epochs per trial, behind every score; a pretrained checkpoint is a trial of one epoch."""
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
    """select.keep: auto bisects for the smallest sufficient keep rate, with short distillations."""

    seeds: int = Field(2, ge=2, description="distillations per keep rate")
    steps: int | None = Field(None, ge=1, description="steps per distillation; null: a quarter of the run's")
    evaluations: int = Field(1, ge=1, description="evaluation networks per distillation")
    tolerance: float = Field(1.0, gt=0, description="accepted drop of accuracy, in std of the unpruned runs")
    lowest: float = Field(0.001, gt=0, lt=1, description="lowest keep rate to try")
    points: int = Field(6, ge=2, description="largest number of keep rates to try")


class SelectSection(Section):
    """Static pruning: which training samples are kept for distillation."""

    criterion: str | dict[str, float] | None = Field(
        None,
        description="criterion to rank by; random: seeded control; {loss: 0.7, el2n: 0.3}: weighted ranks; "
        "null: the first of score.criterion",
    )
    keep: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        1.0, description="keep rate (0 to 1]; auto: search for the smallest sufficient one"
    )
    auto: AutoSection = execution_key(AutoSection(), description="the search of keep: auto; its outcome is select.keep")
    per_class: int | None = Field(None, ge=1, description="samples to keep per class, instead of keep")
    scope: Literal["class", "global", "adaptive"] = Field(
        "class", description="class: rank within classes; global: over all; adaptive: Neyman allocation to classes"
    )
    order: Literal["useful", "useless", "low", "high", "stratum"] = Field(
        "useful", description="which end of the ranking to keep; stratum: a window that starts at stratum_start"
    )
    stratum_start: float = Field(
        0.0, ge=0, lt=1, description="start of the kept window, a share of the ranks (order: stratum)"
    )
    min_per_class: int | None = Field(
        None, ge=0, description="keep at least this many samples per class; null: max(1, distill.ipc)"
    )
    seed: int | None = Field(None, ge=0, description="seed of the random control; null: run.seed")
    refresh: int | None = later_key(
        None,
        earlier=0,
        in_ids=False,
        ge=0,
        description="steps between renewals of the kept samples: as many of each class, chosen by their loss under the "
        "network of the distillation (dc, dsa, idc) or their distance to the class mean (dm); null or 0: never",
    )
    refresh_pool: float = later_key(
        0.2,
        in_ids=False,
        gt=0,
        le=1,
        description="share of each class that is drawn for a renewal, to compete with the kept samples",
    )

    @property
    def rate(self) -> float:
        """The keep rate, once `auto` is resolved."""
        assert not isinstance(self.keep, str), "select.keep: auto is not resolved yet"
        return self.keep


class RuntimeSection(Section):
    """Runtime pruning: which samples of a real batch are dropped during distillation."""

    rule: Literal["none", "loss", "ite"] = Field(
        "none",
        description="loss: drop the largest losses (dm: both tails of the distance to the real mean); ite: drop extreme "
        "individual treatment effects; dm gains no accuracy from a rule: a smaller real_batch is as good",
    )
    drop: float = Field(0.3, ge=0, lt=1, description="share of each class's real batch to drop")
    tail: float = Field(
        0.5, ge=0, le=1, description="share of the dropped samples with the largest values (ite; dm: loss too)"
    )
    probes: int = Field(16, ge=1, le=1024, description="directions in which a sample's effect is measured (ite)")
    decay: float = Field(0.9, ge=0, lt=1, description="decay of the running variance behind the thresholds (ite)")
    refresh: int = Field(10, ge=1, description="steps between full measurements; cached values decide in between")


class EvaluateSection(Section):
    """Networks trained on the synthetic set and its controls, and tested on the test split."""

    networks: list[str] = Field(["convnet"], min_length=1, description="networks to train and test")
    seeds: int = Field(5, ge=1, description="networks of each kind to train per set")
    epochs: int | None = Field(None, ge=1, description="epochs; null: as the method's protocol says")
    batch: int | None = Field(None, ge=1, description="batch size; null: as the method's protocol says")
    lr: float | None = Field(None, gt=0, le=MAX_LR, description="learning rate; null: as the method's protocol says")
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum; null: as the method's protocol says")
    weight_decay: float | None = Field(None, ge=0, description="weight decay; null: as the method's protocol says")
    control: Literal["random_real", "none"] = later_key(
        "random_real", description="random_real: also train on as many random real samples"
    )
    controls: list[Literal["unpruned", "random_keep"]] = later_key(
        [],
        description="also repeat the distillation: unpruned: from all samples, without runtime pruning; random_keep: "
        "from as many samples per class, kept at random",
    )
    bounds: list[Literal["kept", "full"]] = Field(
        [], description="upper bounds: also train on the kept samples, on the full split"
    )
    bound_epochs: int = Field(30, ge=1, description="epochs of the upper bounds")
    precision: Literal["auto", "fp32", "bf16"] = later_key(
        "auto",
        earlier="fp32",
        description="precision of training and testing networks; auto: bf16 on GPUs and on CPUs with "
        "bf16 units, else fp32",
    )

    @field_validator("networks", "controls", "bounds")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each may be named once")
        return value


class MlflowSection(Section):
    """MLflow."""

    tracking_uri: str | None = Field(None, description="server or store; null: MLFLOW_TRACKING_URI or MLflow's default")
    experiment: str = Field("distill_at_scale", description="experiment to log to")


class WandbSection(Section):
    """Weights & Biases."""

    project: str = Field("distill_at_scale", description="project to log to")
    entity: str | None = Field(None, description="user or team; null: the account's default")
    mode: Literal["online", "offline"] = Field("online", description="offline: write to disk only")


class TrackSection(Section):
    """Experiment trackers, in addition to TensorBoard; credentials come from the environment, never from here."""

    mlflow: MlflowSection | None = Field(None, description="log to MLflow; null: do not")
    wandb: WandbSection | None = Field(None, description="log to Weights & Biases; null: do not")


class ClusterSection(Section):
    """Where and how Ray runs the work."""

    address: str | None = Field(
        None,
        description="null: start Ray on this machine; none: no Ray, all in this process; else a cluster's HOST:PORT",
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs per worker, also a fraction; 0: CPUs only")
    grows: bool = Field(
        False, description="true: an autoscaler adds nodes, so wait for resources that the cluster lacks"
    )
    actors: int | None = Field(None, ge=1, description="actors of ingest and scoring; null: as many as fit")
    max_failures: int = Field(3, ge=0, description="how often lost work is repeated before the run fails")
    object_store_mb: int | None = Field(
        None, ge=80, description="MiB of Ray's object store; null: 20 % of memory, up to 2,048"
    )
    price: float | None = Field(None, gt=0, description="price of one worker machine per hour, for `plan`")

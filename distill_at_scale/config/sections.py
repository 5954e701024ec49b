"""The sections `data`, `score` and `select`: every key, its type, range and default."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill_at_scale.config.fields import Section, execution_key, later_key, location_key, shorthand_key
from distill_at_scale.config.search import AutoSection

MAX_LR = 3e38  # the largest 32-bit float
CLIPS_PER_CHUNK = 64
# score.preset -> the keys of `score` that it sets; measured in jobs/benchmarks/README.md, "How little scoring is enough?"
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"trials": 1, "epochs": 1, "share": 0.5, "width": 32, "lr": 0.028},
    # K = 300 * ipc * classes / samples epochs (arXiv 2604.18811): 0.6 for CIFAR-10 at 10 images per class
    "cad": {
        "criterion": "cad", "epochs": 0.6, "checkpoints_per_epoch": 10, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4
    },
}  # fmt: skip
Order = Literal["useful", "useless", "low", "high", "stratum", "coverage", "clusters", "easy_random", "window"]
DRAWN = ("coverage", "clusters", "easy_random", "window")  # orders that draw from a part of each class
# select.order -> the keys that only some orders read, this one among them
ORDER_KEYS: dict[str, tuple[str, ...]] = {
    "stratum": ("stratum_start",),
    "coverage": ("easiest", "strata"),
    "clusters": ("easiest",),
    "easy_random": ("easiest",),
    "window": ("window",),
}


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

    preset: Literal["fast", "cad"] | None = shorthand_key(
        None,
        description="sets several keys of score, unless they are given beside it or after it; fast: one narrow proxy, trained "
        "once on half of about 50,000 samples (trials, epochs, share, width, lr); cad: the criterion cad for CIFAR-10 at 10 "
        "images per class (criterion, epochs, checkpoints_per_epoch, lr, momentum, weight_decay)",
    )
    criterion: str | list[str] = Field("loss", description="criteria to compute: a name or a list")
    early: int = later_key(5, ge=1, description="first epochs that loss_early, el2n and grand average")
    late: int = later_key(5, ge=1, description="last epochs that loss_converged and el2n_late average")
    cad_windows: int = later_key(
        2, in_ids=False, ge=1, description="windows of checkpoints whose deviations cad averages"
    )
    cad_length: int | None = later_key(
        None,
        in_ids=False,
        ge=2,
        description="checkpoints in a window of cad; null: all of a proxy's checkpoints minus cad_windows",
    )
    features: int = later_key(
        128, ge=2, description="dimensions of projected features (density, herding, k_center, clusters)"
    )
    clusters: int = later_key(20, in_ids=False, ge=1, description="clusters of each class (criterion: clusters)")
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
    epochs: float = Field(
        5,
        gt=0,
        description="epochs per proxy, with checkpoints_per_epoch also a fraction; a checkpoint is scored after each",
    )
    checkpoints_per_epoch: int = later_key(
        1,
        in_ids=False,
        ge=1,
        description="equal parts of an epoch, with a checkpoint after each; criteria then count checkpoints as epochs",
    )
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
    infobatch: float = later_key(
        0.0,
        in_ids=False,
        ge=0,
        lt=1,
        description="proxies: probability to leave a sample of below-mean loss out of an epoch (InfoBatch); 0: off",
    )
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
        """Trials, and checkpoints per trial, behind every score; a pretrained checkpoint is a trial of its own."""
        if self.weights is not None:
            return len(self.weight_names), 1
        return self.trials, round(self.epochs * self.checkpoints_per_epoch)

    @field_validator("epochs")
    @classmethod
    def _whole_number(cls, value: float) -> float:
        return int(value) if value == int(value) else value

    @model_validator(mode="after")
    def _ends_at_a_checkpoint(self) -> ScoreSection:
        parts = self.epochs * self.checkpoints_per_epoch
        if abs(parts - round(parts)) > 1e-6 or round(parts) < 1:
            raise ValueError(
                f"score.epochs = {self.epochs:g} ends between two checkpoints, of which each epoch has "
                f"{self.checkpoints_per_epoch}; set score.checkpoints_per_epoch so that their product is a whole number"
            )
        if self.infobatch and self.checkpoints_per_epoch > 1:
            raise ValueError(
                "score.infobatch chooses the samples of whole epochs; set score.checkpoints_per_epoch to 1, or score.infobatch "
                "to 0"
            )
        return self

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
    """Static pruning: which training samples are kept for distillation."""

    criterion: str | dict[str, float] | None = Field(
        None,
        description="criterion to rank by; random: seeded control; {loss: 0.7, el2n: 0.3}: weighted ranks; "
        "null: the first of score.criterion",
    )
    keep: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        1.0,
        description="keep rate (0 to 1]; auto: search for a selection (criterion, order, keep); select: auto is short for it",
    )
    auto: AutoSection = execution_key(
        AutoSection(), description="the search of keep: auto; its outcome are criterion, order and keep"
    )
    per_class: int | None = Field(None, ge=1, description="samples to keep per class, instead of keep")
    scope: Literal["class", "global", "adaptive"] = Field(
        "class", description="class: rank within classes; global: over all; adaptive: Neyman allocation to classes"
    )
    order: Order = Field(
        "useful",
        description="which samples to keep first. useful, useless, low, high: from an end of the ranking; stratum: from "
        "stratum_start on; window: drawn at random from some ranks; and of a class's easiest share, easy_random: drawn at "
        "random; coverage: equal numbers from strata of the score; clusters: the most useful of each cluster (needs the "
        "criterion clusters)",
    )
    stratum_start: float = Field(
        0.0, ge=0, lt=1, description="start of the kept window, a share of the ranks (order: stratum)"
    )
    easiest: float = later_key(
        0.8,
        in_ids=False,
        gt=0,
        le=1,
        description="share of each class, the most useful, to draw from (coverage, clusters, easy_random)",
    )
    strata: int = later_key(50, in_ids=False, ge=1, description="strata of equal width in the score (order: coverage)")
    window: list[float] = later_key(
        [0.0, 0.5],
        in_ids=False,
        description="start and end of the ranks to draw from, as shares; 0: most useful (order: window)",
    )
    min_per_class: int | None = Field(
        None, ge=0, description="keep at least this many samples per class; null: max(1, distill.ipc)"
    )
    seed: int | None = Field(None, ge=0, description="seed of random selections; null: run.seed")
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
    held_out: float = later_key(
        0.0,
        in_ids=False,
        ge=0,
        lt=1,
        description="share of each class that is never kept, drawn with run.seed, for evaluate.split: held_out",
    )

    @field_validator("window")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
            raise ValueError("give two shares of the ranks, the smaller first, for example [0.1, 0.5]")
        return value

    @property
    def idle_keys(self) -> set[str]:
        """The keys that other orders read, and this one does not."""
        return {key for keys in ORDER_KEYS.values() for key in keys} - {*ORDER_KEYS.get(self.order, ())}

    @property
    def rate(self) -> float:
        """The keep rate, once `auto` is resolved."""
        assert not isinstance(self.keep, str), "select.keep: auto is not resolved yet"
        return self.keep

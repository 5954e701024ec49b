"""The sections of sweeps, studies and comparisons: every key, its type, range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from distill_at_scale.config.fields import Section
from distill_at_scale.config.methods import TeacherSection

Study = Literal["critical_ratio", "stratified", "drop", "interaction", "stability", "across"]
STUDIES: tuple[Study, ...] = get_args(Study)
Control = Literal["unpruned", "random"]
Labels = Literal["hard", "soft", "views"]
Baseline = Literal["random", "herding", "k_center", "easiest", "cad", "pca"]


class SweepSection(Section):
    """Ray Tune over any keys of the configuration; all trials share ingest and scores."""

    space: dict[str, Any] = Field(
        {},
        description="values by dotted key: a list, or {uniform: [low, high]}, {loguniform: [low, high]}, "
        "{randint: [low, high]}",
    )
    search: Literal["grid", "random", "asha"] = Field("grid", description="how to pick configurations from the space")
    samples: int = Field(20, ge=1, description="configurations to draw (random, asha)")
    seeds: int = Field(1, ge=1, description="distillations per configuration")
    concurrent: int | None = Field(None, ge=1, description="trials at a time; null: as many as the cluster holds")
    controls: list[Control] = Field(["unpruned", "random"], description="control runs to add")
    grace: int = Field(1, ge=1, description="evaluations before a trial may be stopped (asha)")
    reduction: int = Field(3, ge=2, description="one in this many trials survives each halving (asha)")


class CriticalRatioSection(Section):
    """Bisect for the smallest keep rate that is not worse than no pruning."""

    tolerance: float = Field(1.0, gt=0, description="accepted drop of accuracy, in std of the unpruned runs")
    lowest: float = Field(0.001, gt=0, lt=1, description="lowest keep rate to try")
    points: int = Field(8, ge=2, description="largest number of keep rates to try")


class StratifiedSection(Section):
    """Whether a criterion can be trusted: distil from each stratum of its scores."""

    strata: int = Field(5, ge=3, le=50, description="strata per class, by score")


class DropSection(Section):
    """The drop test: drop the same share at random, least useful first and most useful first."""

    drop: float = Field(0.1, gt=0, lt=1, description="share to drop")


class InteractionSection(Section):
    """Where pruning breaks, and whether the effects of samples add up."""

    drops: list[float] = Field([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95], min_length=3, description="shares, ascending")
    tolerance: float = Field(
        1.0, gt=0, description="drop of accuracy that counts as broken, in standard deviations of the unpruned runs"
    )


class StabilitySection(Section):
    """How far scores agree between trials, epochs, networks and criteria, and during a distillation."""

    networks: list[str] = Field([], description="other networks that score the same samples")
    steps: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="distillation lengths at which utility is measured; empty: a few from 1 % to all steps of the run",
    )
    reliability: float = Field(0.9, gt=0, lt=1, description="reliability for which the number of trials is estimated")


class AcrossSection(Section):
    """The same keep rates over several data sets."""

    sets: dict[str, dict[str, Any]] = Field(
        {}, description="data sets by name, each with the dotted keys in which it differs from this configuration"
    )
    keep: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.1, 0.3], min_length=1, description="keep rates to try, in addition to 1"
    )


class StudiesSection(Section):
    """Questions about pruning, answered by many short distillations."""

    run: list[Study] = Field(list(STUDIES), description="studies to run, in this order")
    seeds: int = Field(3, ge=2, description="distillations per point")
    evaluations: int = Field(1, ge=1, description="evaluation networks per distillation")
    steps: int | None = Field(None, ge=1, description="steps per distillation; null: distill.steps")
    critical_ratio: CriticalRatioSection = CriticalRatioSection()
    stratified: StratifiedSection = StratifiedSection()
    drop: DropSection = DropSection()
    interaction: InteractionSection = InteractionSection()
    stability: StabilitySection = StabilitySection()
    across: AcrossSection = AcrossSection()

    @field_validator("run")
    @classmethod
    def _no_repeats(cls, value: list[Study]) -> list[Study]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one study, and each once")
        return value


class CompareTeacherSection(TeacherSection):
    """The teacher whose labels all sets get (labels: soft, views); it is trained on the whole training split."""

    teacher_network: str = Field("convnet", description="teacher network")
    teacher_epochs: int = Field(30, ge=1, description="epochs of teacher training")


class CompareSection(Section):
    """Distilled sets, real samples and sets from elsewhere, all trained with the same recipes; the command `compare`."""

    labels: list[Labels] = Field(
        ["hard"],
        min_length=1,
        description="labels to train with. hard: the class; soft: one soft label per image, by the teacher or learned with the "
        "set; views: a soft label of the teacher for each random crop",
    )
    augment: Literal["both", "with", "without"] = Field(
        "both",
        description="train with augmentation, without, or both; views: flips and CutMix; they always have random crops",
    )
    strategy: str | None = Field(
        None,
        description="augmentation for hard and soft labels; null: the first run's, or all families if it has none",
    )
    networks: list[str] = Field([], description="networks to train; empty: evaluate.networks of the first run")
    seeds: int | None = Field(None, ge=1, description="networks of each kind per set; null: evaluate.seeds")
    epochs: int | None = Field(
        None, ge=1, description="epochs of every set; null: evaluate.epochs, or those of the first run's set"
    )
    baselines: list[Baseline] = Field(
        list(get_args(Baseline)),
        description="real training samples to compare with; pca: tiles of those that the run keeps first, as in distill.pca",
    )
    budgets: list[Literal["images", "bytes"]] = Field(
        ["images", "bytes"],
        min_length=1,
        description="sizes of the baselines: as many images per class as a set, or as many as fit into its bytes",
    )
    full_seeds: int = Field(
        1,
        ge=0,
        description="networks trained on the whole training split for evaluate.bound_epochs; 0: no label-robust score",
    )
    external: dict[str, str] = Field(
        {},
        description="sets from elsewhere, name: path of an image folder, .pt file, Hugging Face Parquet or synthetic set",
    )
    dir: str | None = Field(None, description="folder of the results; null: compare/ in the folder of the first run")
    teacher: CompareTeacherSection = CompareTeacherSection()

    @field_validator("labels", "networks", "baselines", "budgets")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each may be named once")
        return value

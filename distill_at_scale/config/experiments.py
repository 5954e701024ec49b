"""The sections of sweeps and studies: every key with its type, range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from distill_at_scale.config.sections import Section

Study = Literal["critical_ratio", "stratified", "drop", "interaction", "stability", "across"]
STUDIES: tuple[Study, ...] = ("critical_ratio", "stratified", "drop", "interaction", "stability", "across")
Control = Literal["unpruned", "random"]


class SweepSection(Section):
    """Ray Tune over any keys of the configuration; ingest and scoring are shared by all trials."""

    # by dotted key: a list of values, or {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]}
    space: dict[str, Any] = Field({})
    search: Literal["grid", "random", "asha"] = "grid"
    samples: int = Field(20, ge=1)  # configurations drawn by random and asha
    seeds: int = Field(1, ge=1)  # distillations of every configuration
    concurrent: int | None = Field(None, ge=1)  # trials at a time; default: as many as the cluster holds
    controls: list[Control] = Field(["unpruned", "random"])
    grace: int = Field(1, ge=1)  # asha: evaluations on the way before a trial may be stopped
    reduction: int = Field(3, ge=2)  # asha: one in so many goes on at every halving


class CriticalRatioSection(Section):
    """Bisection over the keep rate: the smallest that is not worse than the unpruned one."""

    tolerance: float = Field(1.0, gt=0)  # in standard deviations of the unpruned runs
    lowest: float = Field(0.001, gt=0, lt=1)  # keep rates below are not tried
    points: int = Field(8, ge=2)  # rates that are tried at most


class StratifiedSection(Section):
    strata: int = Field(5, ge=3, le=50)  # per class, by score


class DropSection(Section):
    drop: float = Field(0.1, gt=0, lt=1)


class InteractionSection(Section):
    drops: list[float] = Field([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95], min_length=3)  # shares dropped, ascending
    tolerance: float = Field(1.0, gt=0)  # in standard deviations of the unpruned runs: beyond it accuracy is broken


class StabilitySection(Section):
    networks: list[str] = Field([])  # other networks that score the same samples
    # of a distillation: how utility drifts meanwhile; default: a few of the run's, from a hundredth to all
    steps: list[Annotated[int, Field(ge=1)]] = Field([])
    reliability: float = Field(0.9, gt=0, lt=1)  # what the number of trials is wanted for


class AcrossSection(Section):
    """The same keep rates over several data sets."""

    sets: dict[str, dict[str, Any]] = Field({})  # by name: what differs from this configuration, by dotted key
    keep: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.1, 0.3], min_length=1)  # 1 is always tried


class StudiesSection(Section):
    run: list[Study] = Field(list(STUDIES))
    seeds: int = Field(3, ge=2)  # distillations of every point
    evaluations: int = Field(1, ge=1)  # networks per distillation
    steps: int | None = Field(None, ge=1)  # of a distillation; default: distill.steps
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

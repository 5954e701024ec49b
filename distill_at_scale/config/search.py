"""The section `select.auto`: the search for a selection."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from distill_at_scale.config.fields import Section


class AutoSection(Section):
    """select: auto tries selections with short distillations, tested on a held-out part of the training split."""

    portfolio: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="candidates, the most promising first, each a mapping of keys of select, such as {criterion: loss, keep: "
        "0.1}; everything is tried too; null: several keep rates of the known selections",
    )
    minutes: float | None = Field(
        None, gt=0, description="time for the search; null: as long as the steps and repetitions take"
    )
    seeds: int = Field(3, ge=2, description="distillations of each candidate in the last round")
    steps: int | None = Field(
        None,
        ge=1,
        description="steps per distillation in the last round; null: a quarter of the run's, more if minutes allows it",
    )
    evaluations: int = Field(1, ge=1, description="evaluation networks per distillation")
    held_out: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of each class to test candidates on; null: select.held_out, or a fifth, but at most about 10,000 "
        "samples",
    )

    @field_validator("portfolio")
    @classmethod
    def _known_keys(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for candidate in value or []:
            if wrong := sorted(set(candidate) & {"auto", "held_out", "seed"}) or (
                ["keep"] if candidate.get("keep") == "auto" else []
            ):
                raise ValueError(
                    f"the candidate {candidate} sets {wrong[0]}, which does not belong to a selection; leave it out"
                )
            if not isinstance(candidate.get("criterion"), str | dict | None):
                raise ValueError(f"the candidate {candidate} needs a criterion's name, or several names with weights")
        return value

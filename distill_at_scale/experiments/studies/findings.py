"""Findings as JSON and back: plain values only, values that are not finite as null."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_at_scale.core.atomic_files import set_aside, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.studies.base import Finding
from distill_at_scale.pipeline.report.plot_spec import Plot, Series

MADE_WITH = "made_with"  # key of the fingerprint in the file


def write(path: Path, finding: Finding, made_with: str | None = None) -> None:
    """Write a finding and its fingerprint as a JSON file, atomically.

    Raises TypeError for a value that is neither number, text, list nor mapping.
    """
    write_json(path, {**to_json(finding), MADE_WITH: made_with})


def read(path: Path, named: str | None = None, made_with: str | None = None) -> Finding | None:
    """Read the file of `write`; None if it has another fingerprint. Error messages call the file `named`.

    Raises UserError where the file is missing or does not hold a finding.
    """
    named = named or str(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        finding = from_json(values)
        return finding if values.get(MADE_WITH) == made_with else None
    except FileNotFoundError:
        raise UserError(f"{named} is missing; run the study first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{named} is no finding of a study ({error}); {set_aside(path)}") from None


def to_json(finding: Finding) -> dict[str, Any]:
    """Plain nested values of a finding: numpy's numbers as Python's, NaN and infinities as None."""
    return {field.name: plain(getattr(finding, field.name), field.name) for field in dataclasses.fields(Finding)}


def from_json(values: Mapping[str, Any]) -> Finding:
    """A finding from the result of `to_json`; in plots, None becomes NaN again. Ignores other keys.

    Raises KeyError or TypeError where a field is missing.
    """
    known = {field.name: values[field.name] for field in dataclasses.fields(Finding) if field.name in values}
    plots = []
    for plot in values["plots"]:
        series = [Series(**s | {axis: list(map(_number, s[axis])) for axis in ("x", "y")}) for s in plot["series"]]
        lines = {name: tuple((label, _number(at)) for label, at in plot[name]) for name in ("levels", "marks")}
        plots.append(Plot(**{**plot, "series": series, **lines}))
    return Finding(**{**known, "plots": plots})


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def plain(value: Any, where: str = "value") -> Any:
    """A value as JSON holds it; `where` names it in the error."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{where} holds a {type(value).__name__}, which JSON cannot hold")

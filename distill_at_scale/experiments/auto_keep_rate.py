"""select.keep: auto: finds the smallest sufficient keep rate with few short distillations, before the stage select.

    <run.dir>/auto/        the points of the search, on top of the run's own ingest and scores
    <run.dir>/auto.json    rate, curve, confidence, seconds; reused while nothing that it depends on changes

The result is the smallest rate above which every tried rate is sufficient too (`experiments/studies/bisection.py`). Short
distillations stand for long ones, and the test split decides: the rate is a good guess, not a proof.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from distill_at_scale.config.fields import flatten, result_values
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core.atomic_files import set_aside, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.statistics import summary
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.evaluate import require_test_split
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.studies.base import Repetitions, StudyContext
from distill_at_scale.experiments.studies.bisection import Search, SearchResult
from distill_at_scale.experiments.studies.comparison import difference
from distill_at_scale.storage.filesystem import child_address
from distill_at_scale.storage.run_dir import RunDir, address_of
from distill_at_scale.storage.sync import AUTO

OpenPoints = Callable[[Config], AbstractContextManager[PointSet]]
NAME = "auto.json"
QUARTER = 4  # default for select.auto.steps: the run's steps divided by this


def rate(config: Config, open_points: OpenPoints, say: Callable[[str], None]) -> float:
    """The keep rate for a run with finished ingest and scores; from auto.json if that is up to date.

    Raises UserError where there is no test split, and for the first point that fails.
    """
    run = RunDir.of(config.run, say)
    fingerprint = _made_with(config, run)
    if (known := read(run)) and known["made_with"] == fingerprint:
        say(f"auto: keep {known['rate']:.4g} was found before ({run.place(NAME)})")
        return float(known["rate"])
    require_test_split(PreparedDataset(run / "prepared"))
    began = time.perf_counter()
    config = search_config(config)
    section = config.select.auto
    say(f"auto: looking for the smallest sufficient rate, {config.distill.steps} steps a distillation")
    with open_points(config) as points:
        points.take_over(run)
        context = StudyContext(config, points, say)
        result = Search(context, section.tolerance, section.lowest, section.points, section.seeds).run()
        report = _report(context, result)
    report |= {"steps": config.distill.steps, "seconds": round(time.perf_counter() - began, 3)}
    write_json(run / NAME, report | {"made_with": fingerprint})
    if report["near_chance"]:
        say(f"  warning: in the search even the unpruned set is near chance ({report['unpruned']:.1%}), so any rate seems to "
            "suffice; raise select.auto.steps, or give select.keep")  # fmt: skip
    kept = f"{report['kept']} of {report['of']} samples"
    say(f"auto: keep {report['rate']:.4g} ({kept}), confidence {report['confidence']:.0%}")
    return float(report["rate"])


def search_config(config: Config) -> Config:
    """The configuration of the search's points, in a folder of their own."""
    section = config.select.auto
    overrides = {
        "run.dir": child_address(address_of(config.run), AUTO), "run.reuse": None,
        "distill.steps": section.steps or max(1, distill.step_count(config) // QUARTER), "distill.evaluate_every": 0,
        "studies.seeds": section.seeds, "studies.evaluations": section.evaluations, "studies.steps": None,
    }  # fmt: skip
    return with_overrides(config, overrides, "select.keep: auto")


def read(run: RunDir) -> dict[str, Any] | None:
    """auto.json of a run, None if it does not exist.

    Raises UserError where it is damaged.
    """
    try:
        report = json.loads((run / NAME).read_text(encoding="utf-8"))
        return report if report["rate"] and report["made_with"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.place(NAME)} is damaged ({error}); {set_aside(run / NAME)}") from None


def known_rate(config: Config) -> float | None:
    """The rate, if it was found for exactly this configuration."""
    run = RunDir.of(config.run)
    run.fetch()
    if run.record("score") is None or (report := read(run)) is None:
        return None
    return float(report["rate"]) if report["made_with"] == _made_with(config, run) else None


def _made_with(config: Config, run: RunDir) -> str:
    values = flatten(config.select.auto, "select.auto.")
    for name in ("select", "distill", "runtime", "evaluate"):
        values |= result_values(getattr(config, name), f"{name}.", unused=True)
    for key in ("evaluate.seeds", "evaluate.bounds"):  # the search evaluates select.auto.evaluations networks
        del values[key]
    steps = distill.step_count(config)
    return digest({**values, "distill.steps": steps, "seed": config.run.seed, "scores": run.content("score")})


def _report(context: StudyContext, result: SearchResult) -> dict[str, Any]:
    """The search as in auto.json; adaptive rates are compared with the same rate for every class."""
    best = result.unbroken
    curve = [
        {"keep": one.keep, **one.figures, "sufficient": one.sufficient, "confidence": round(one.confidence, 4)}
        for one in result.rates
    ]
    report: dict[str, Any] = {
        "rate": best.keep, "kept": best.kept, "of": best.of, "kept_per_class": list(best.kept_per_class),
        "confidence": round(best.confidence, 4), "unpruned": result.level.mean, "unpruned_std": result.level.std,
        "least": result.level.least, "near_chance": result.near_chance,
        "smallest_sufficient": result.smallest.keep, "curve": curve,
    }  # fmt: skip
    if context.config.select.scope == "adaptive":
        overrides = {"select.scope": "class", "select.per_class": None, "select.keep": best.keep}
        fixed = Repetitions(context.points.run(context.repetitions(overrides, len(best.accuracies)))).accuracies
        gap = difference(best.accuracies, fixed)
        report |= {"adaptive": summary(best.accuracies), "fixed": summary(fixed),
                   "adaptive_less_fixed": {"mean": gap.mean, "half_interval": gap.half}}  # fmt: skip
    return report

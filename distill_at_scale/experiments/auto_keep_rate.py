"""select.keep: auto: the smallest sufficient rate, found with few and short distillations before `select`.

    <run.dir>/auto/        the points that were tried, standing on the run's own ingest and scores
    <run.dir>/auto.json    rate, curve, confidence, seconds; read, not made again, while nothing that it depends on changes

The rate that is taken is the smallest above which every tried one is sufficient too (`experiments/studies/bisection.py`). Short
distillations stand for long ones, and the test split decides: the rate is a good guess, not a proof. Left out: how points
are tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from distill_at_scale.config.load import Config, flatten, with_overrides
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.evaluate import need_test_split
from distill_at_scale.experiments.runners import PointRunner
from distill_at_scale.experiments.studies.base import StudyContext, mean_and_std
from distill_at_scale.experiments.studies.bisection import Found, Search
from distill_at_scale.experiments.studies.comparison import accuracies, difference
from distill_at_scale.storage.filesystem import inside
from distill_at_scale.storage.run_dir import RunDir, address_of
from distill_at_scale.storage.sync import AUTO

MakeRunner = Callable[[Config], AbstractContextManager[PointRunner]]
NAME = "auto.json"
QUARTER = 4  # of the run's steps, where select.auto.steps is not given


def rate(config: Config, make_runner: MakeRunner, say: Callable[[str], None]) -> float:
    """The rate for a configuration whose ingest and scores are finished in its run folder; from auto.json where it is there.

    Raises UserError where there is no test split, and for whatever stops a point.
    """
    run = RunDir.of(config.run, say)
    wanted = _made_with(config, run)
    if (known := read(run)) and known["made_with"] == wanted:
        say(f"auto: keep {known['rate']:.4g} was found before ({run.place(NAME)})")
        return float(known["rate"])
    need_test_split(PreparedDataset(run / "prepared"))
    began = time.perf_counter()
    searched = searching(config)
    say(f"auto: looking for the smallest sufficient rate, {searched.distill.steps} steps a distillation")
    with make_runner(searched) as runner:
        runner.points.take_over(run)
        section = config.select.auto
        context = StudyContext(searched, runner, say)
        found = Search(context, section.tolerance, section.lowest, section.points, section.seeds).run()
        against = _against_fixed(context, found) if config.select.scope == "adaptive" else {}
    report = (
        _report(found) | against | {"steps": searched.distill.steps, "seconds": round(time.perf_counter() - began, 3)}
    )
    write_json(run / NAME, report | {"made_with": wanted})
    if report["near_chance"]:
        say(f"  warning: in the search even the unpruned set is near chance ({report['unpruned']:.1%}), so any rate seems to "
            "suffice; raise select.auto.steps, or give select.keep")  # fmt: skip
    say(
        f"auto: keep {report['rate']:.4g} ({report['kept']} of {report['of']} samples), confidence {report['confidence']:.0%}"
    )
    return float(report["rate"])


def searching(config: Config) -> Config:
    """The configuration under which points are tried, in their own folder."""
    section = config.select.auto
    steps = section.steps or max(1, distill.step_count(config) // QUARTER)
    own = {
        "run.dir": inside(address_of(config.run), AUTO),
        "run.reuse": None,
        "distill.steps": steps,
        "distill.evaluate_every": 0,
        "studies.seeds": section.seeds,
        "studies.evaluations": section.evaluations,
        "studies.steps": None,
    }
    return with_overrides(config, own, "select.keep: auto")


def read(run: RunDir) -> dict[str, Any] | None:
    """auto.json of a run, None where there is none.

    Raises UserError where it is damaged.
    """
    try:
        found = json.loads((run / NAME).read_text())
        return found if found["rate"] and found["made_with"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.place(NAME)} is damaged ({error}); remove it to look for the rate again") from None


def known_rate(config: Config) -> float | None:
    """The rate, where it has been found for exactly this configuration."""
    run = RunDir.of(config.run)
    run.fetch()
    if run.record("score") is None or (known := read(run)) is None:
        return None
    return float(known["rate"]) if known["made_with"] == _made_with(config, run) else None


def _made_with(config: Config, run: RunDir) -> str:
    sections = ("select", "distill", "runtime", "evaluate")
    values = {k: v for section in sections for k, v in flatten(getattr(config, section), f"{section}.").items()}
    left = ("distill.workers", "distill.checkpoint_every", "distill.hold", "distill.evaluate_every", "evaluate.bounds")
    values = {k: v for k, v in values.items() if k not in (*left, "evaluate.seeds")}
    steps = distill.step_count(config)
    return digest({**values, "distill.steps": steps, "seed": config.run.seed, "scores": run.content("score")})


def _report(found: Found) -> dict[str, Any]:
    best = found.unbroken
    curve = []
    for one in found.rates:
        mean, std = mean_and_std(one.accuracies)
        curve.append({"keep": one.keep, "kept": one.kept, "mean": mean, "std": std, "n": len(one.accuracies),
                      "sufficient": one.sufficient, "confidence": round(one.confidence, 4)})  # fmt: skip
    return {
        "rate": best.keep, "kept": best.kept, "of": best.outcomes[0].of,
        "kept_per_class": list(best.outcomes[0].kept_per_class),
        "confidence": round(best.confidence, 4), "unpruned": found.level.mean, "unpruned_std": found.level.std,
        "least": found.level.least, "near_chance": found.near_chance,
        "smallest_sufficient": found.smallest.keep, "curve": curve,
    }  # fmt: skip


def _against_fixed(context: StudyContext, found: Found) -> dict[str, Any]:
    """The same rate with adaptive rates per class and with the same rate for every class."""
    adaptive = found.unbroken
    fixed = {"select.scope": "class", "select.per_class": None, "select.keep": adaptive.keep}
    values = accuracies(context.runner.run(context.points(fixed, len(adaptive.accuracies))))
    gap = difference(adaptive.accuracies, values)
    return {"adaptive": _figures(adaptive.accuracies), "fixed": _figures(values),
            "adaptive_less_fixed": {"mean": gap.mean, "half_interval": gap.half}}  # fmt: skip


def _figures(values: list[float]) -> dict[str, Any]:
    mean, std = mean_and_std(values)
    return {"mean": mean, "std": std, "n": len(values)}

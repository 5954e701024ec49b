"""The studies of `studies.run`, one after the other, and what is left of each.

    <run.dir>/studies/<name>.json        the finding, written as the study ends; its facts are read by other stages
    <run.dir>/studies/studies.parquet    the figures of all studies, one long table
    <run.dir>/studies.html               the page

A finding of the same configuration and scores is read, not made again; within a study finished points are. Left out: how
points are tried (`experiments/points.py`) and how findings look (`page.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import publish, write_json
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.studies import CHECKS, STUDIES, findings, page
from distill_at_scale.experiments.studies.base import Finding, StudyContext
from distill_at_scale.storage.run_dir import RunDir

MADE_WITH = "made_with"
OF_FINDINGS = ("data", "score", "select", "distill", "runtime", "evaluate", "track")
OF_ALL = ("seeds", "evaluations", "steps")  # keys of `studies` that count for every study


def run(config: Config, points: PointSet, say: Callable[[str], None]) -> list[Finding]:
    """All findings, in the order of `studies.run`, and the page of them.

    Raises UserError for a study that is not there or cannot be, before anything starts, and for whatever stops a point.
    """
    if missing := [name for name in config.studies.run if name not in STUDIES]:
        raise UserError(f"studies.run names {missing[0]!r}, which is not there; give some of: {', '.join(STUDIES)}")
    run = RunDir.of(config.run)
    context, every = StudyContext(config, points, say), []
    for name in config.studies.run:
        CHECKS.get(name, lambda _: None)(context)
    scores = RunDir(points.shared({})).content("score")
    for name in config.studies.run:
        every.append(_found(context, name, run, _made_with(config, name, scores)))
    write_table(run / "studies" / "studies.parquet", every)
    page.write(run.path, every, config)
    return every


def _found(context: StudyContext, name: str, run: RunDir, made_with: str) -> Finding:
    path, place = run / "studies" / f"{name}.json", run.place(f"studies/{name}.json")
    if (finding := read(path, place, made_with)) is not None:
        context.say(f"study {name}: already done for this configuration, skipped ({place})")
        return finding
    context.say(f"study {name}: started")
    finding = STUDIES[name](context)
    write_json(path, {**findings.to_json(finding), MADE_WITH: made_with})
    context.say(f"study {name}: {finding.answer}")
    return finding


def read(path: Path, place: str, made_with: str) -> Finding | None:
    """A finding from its file, which users know as `place`; None where there is none, or one made with something else.

    Raises UserError where the file is damaged.
    """
    if not path.exists():
        return None
    finding, facts = findings.read(path, place), json.loads(path.read_text())
    return finding if facts.get(MADE_WITH) == made_with else None


def write_table(path: Path, every: Sequence[Finding]) -> None:
    """One row per figure: study, number of the row, and the columns of all studies; columns of mixed kinds become text."""
    rows = [
        {"study": f.study, "row": number, **findings.plain(row)} for f in every for number, row in enumerate(f.rows)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with publish(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _column(values: list[Any]) -> pa.Array:
    try:
        if any(isinstance(value, float) for value in values):
            values = [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def _made_with(config: Config, name: str, scores: str) -> str:
    """What a finding depends on: the scores, the configuration of points, and the study's own keys."""
    every = result_values(config, locations=True, neutral=True)
    values = {key: value for key, value in every.items() if key.split(".")[0] in OF_FINDINGS}
    shared = {key: getattr(config.studies, key) for key in OF_ALL}
    own = getattr(config.studies, name).model_dump()
    return digest({**values, "data.path": None, "seed": config.run.seed, "scores": scores, "all": shared, "own": own})

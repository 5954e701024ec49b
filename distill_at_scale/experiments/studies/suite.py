"""Runs the studies of `studies.run` and writes their results.

    <run.dir>/studies/<name>.json        the finding, written when its study ends; other stages read its facts
    <run.dir>/studies/studies.parquet    the figures of all studies, one long table
    <run.dir>/studies.html               the page

A finding of the same configuration and scores is read instead of repeated; an interrupted study reuses finished points.
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
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.experiments.studies import CHECKS, STUDIES, findings, page
from distill_at_scale.experiments.studies.base import Finding, StudyContext
from distill_at_scale.storage.run_dir import RunDir

OF_FINDINGS = ("data", "score", "select", "distill", "runtime", "evaluate", "track")
OF_ALL = ("seeds", "evaluations", "steps")  # keys of `studies` that affect all studies


def run(config: Config, points: PointSet, say: Callable[[str], None]) -> list[Finding]:
    """Run all studies in the order of `studies.run`; returns their findings and writes the page.

    Raises UserError, before anything starts, for an unknown or impossible study, and for the first point that fails.
    """
    if unknown := [name for name in config.studies.run if name not in STUDIES]:
        raise UserError(f"studies.run names {unknown[0]!r}, which is not there; give some of: {', '.join(STUDIES)}")
    run, context, results = RunDir.of(config.run), StudyContext(config, points, say), list[Finding]()
    for name in config.studies.run:
        if name in CHECKS:
            CHECKS[name](context)
    scores = RunDir(points.shared({})).content("score")
    for name in config.studies.run:
        path, place = run / "studies" / f"{name}.json", run.place(f"studies/{name}.json")
        made_with = _made_with(config, name, scores)
        if path.exists() and (finding := findings.read(path, place, made_with)) is not None:
            say(f"study {name}: already done for this configuration, skipped ({place})")
        else:
            say(f"study {name}: started")
            finding = STUDIES[name](context)
            findings.write(path, finding, made_with)
            say(f"study {name}: {finding.answer}")
        results.append(finding)
    write_table(run / "studies" / "studies.parquet", results)
    page.write(run.path, results, config)
    return results


def write_table(path: Path, results: Sequence[Finding]) -> None:
    """One row per figure: study, number of the row, and the columns of all studies; columns of mixed types become text."""
    rows = [
        {"study": finding.study, "row": number, **findings.plain(row)}
        for finding in results
        for number, row in enumerate(finding.rows)
    ]
    names = dict.fromkeys(name for row in rows for name in row)
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
    """The fingerprint of a finding: the scores, the configuration of points, and the study's own keys."""
    values = result_values(config, locations=True, neutral=True)
    values = {key: value for key, value in values.items() if key.split(".")[0] in OF_FINDINGS}
    shared = {key: getattr(config.studies, key) for key in OF_ALL}
    own = getattr(config.studies, name).model_dump()
    return digest({**values, "data.path": None, "seed": config.run.seed, "scores": scores, "all": shared, "own": own})

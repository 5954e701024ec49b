"""What a folder holds, for the command `show`: as plain values (`describe`), and as tables on the terminal (`print_folder`).

Folders of sweeps and studies are named with their page. Loads neither torch nor Ray.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import format_seconds, printable
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.summary import TESTED, few_tested
from distill_at_scale.pipeline import run_reader
from distill_at_scale.pipeline.report.text import ONE_DISTILLATION, points
from distill_at_scale.pipeline.run_reader import Result, Run, StageState
from distill_at_scale.storage.run_dir import RunDir

SETTINGS = (  # keys that a summary shows, in lines
    ("data", ("data.source", "data.path", "data.size", "data.frames", "data.classes")),
    ("score", ("score.criterion", "score.trials", "score.epochs", "score.weights")),
    ("select", ("select.keep", "select.per_class", "select.criterion", "select.order")),
    ("distill", ("distill.method", "distill.ipc", "distill.steps", "distill.network")),
    ("runtime", ("runtime.rule", "runtime.drop")),
    ("run", ("run.seed", "run.reuse")),
)
REASONS = 3  # rejected samples that are named


def describe(address: str | Path) -> dict[str, Any]:
    """What a folder holds, as values for JSON.

    Always: kind (run, sweep or study), folder, next (a command or None). Of a run: configuration, data, stages, results, tested
    (the samples of the results), warnings, rejected, report; a part that is not there is None. What cannot be read is explained
    in problems. Of a sweep or study: page, table, points.

    Raises:
        UserError: the folder does not exist, or this package did not write it.
    """
    folder = run_reader.open_folder(address)
    kind = run_reader.kind_of(folder)
    described = {"kind": kind, "folder": folder.named}
    if kind != "run":
        described |= _experiment(folder, kind)
    if run_reader.is_run(folder):
        described |= _run(Run(folder))
    return described


def _run(run: Run) -> dict[str, Any]:
    stages, problems = run.stages, []
    described: dict[str, Any] = {"stages": [_stage(name, state) for name, state in stages.items()]}
    parts = {
        "configuration": _settings,
        "data": _data,
        "results": lambda run: [_result(result) for result in run.results] if stages["evaluate"].done else None,
        "tested": lambda run: run.tested if stages["evaluate"].done else None,
        "warnings": lambda run: run.warnings,
        "rejected": _rejected,
        "next": lambda run: run.command("run") if run.open_stages else _export(run),
    }
    for name, part in parts.items():
        try:
            described[name] = part(run)
        except UserError as error:  # the other parts are shown
            described[name] = None
            problems.append(str(error))
    described["report"] = _place(run, "report.html") if stages["report"].done else None
    return described | {"problems": [*(state.problem for state in stages.values() if state.problem), *problems]}


def _export(run: Run) -> str:
    """The command that writes the finished set in the usual form of its kind."""
    kind = (_data(run) or {"kind": "images"})["kind"]
    option = {"clips": "--videofolder out", "tensors": "--pt out/set.pt"}.get(kind, "--imagefolder out")
    return f"{run.command('export')} {option}"


def _settings(run: Run) -> dict[str, Any]:
    """The keys of SETTINGS."""
    values: dict[str, Any] = run.config.model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
    names = (key for _, keys in SETTINGS for key in keys)
    return {key: flat[key] for key in names if flat.get(key) is not None}


def _data(run: Run) -> dict[str, Any] | None:
    if not run.stages["ingest"].done or not (run.path / "prepared" / "dataset.json").exists():
        return None
    data = PreparedDataset(run.path / "prepared")
    counts = {split: sum(data.counts(split)) for split in data.meta["counts"]}
    return {"kind": data.kind, "shape": list(data.shape), "classes": len(data.class_names), "samples": counts}


def _stage(name: str, state: StageState) -> dict[str, Any]:
    at = state.at.isoformat(timespec="seconds") if state.at else None
    facts = {"state": state.state, "seconds": state.seconds, "at": at, "reused_from": state.reused_from}
    return {"stage": name, **facts, "facts": {key: value for key, value in state.facts.items() if key != "warnings"}}


def _result(result: Result) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "values"}


def _rejected(run: Run) -> dict[str, Any] | None:
    if not run.stages["ingest"].done or not (run.path / "rejected.parquet").exists():
        return None
    listed = [row for row in run.rejected.to_pylist() if not row.get("used", False)]
    first = [{"sample": row["sample_id"], "reason": row["reason"]} for row in listed[:REASONS]]
    return {"count": len(listed), "first": first, "list": _place(run, "rejected.parquet")}


def _experiment(folder: RunDir, kind: str) -> dict[str, Any]:
    study = kind == "study"
    names = ("studies.html", "studies/studies.parquet") if study else ("sweep.html", "sweep.parquet")
    page, table = (folder.place(name) if (folder / name).exists() else None for name in names)
    points = None if folder.remote else len(list(folder.path.glob("points/*/stages/evaluate.json")))
    command = None if page else f"distill-at-scale {kind.replace(' or ', '|')} CONFIG"
    return {"page": page, "table": table, "points": points, "next": command}


def _place(run: Run, name: str) -> str:
    return f"{run.address}/{name}" if "://" in run.address else str((run.path / name).resolve())


def as_json(described: dict[str, Any]) -> str:
    return json.dumps(described, indent=1, ensure_ascii=False)


def print_folder(described: dict[str, Any], console: Console) -> None:
    """Print what `describe` returned."""

    def say(text: str) -> None:
        console.print(printable(text), markup=False, soft_wrap=True)

    say(f"{described['kind']} {described['folder']}")
    if described["kind"] != "run":
        say(f"page: {described['page'] or 'not written yet'}")
        if described["table"]:
            say(f"table: {described['table']}")
        if described["points"]:
            say(f"finished distillations: {described['points']}")
    if "stages" not in described:
        _say_next(described, say)
        return
    for section, text in _lines(described):
        say(f"  {section:<9}{text}")
    console.print(stage_table(described["stages"]))
    if described["results"]:
        _print_results(described["results"], described["tested"], console)
    for line in described["problems"]:
        say(f"problem: {line}")
    for line in described["warnings"] or ():
        say(f"warning: {line}")
    if (rejected := described["rejected"]) and rejected["count"]:
        say(f"rejected samples: {rejected['count']}, listed in {rejected['list']}")
        for row in rejected["first"]:
            say(f"  {row['sample']}: {row['reason']}")
    if described["report"]:
        say(f"report: {described['report']}")
    _say_next(described, say)


def _say_next(described: dict[str, Any], say: Any) -> None:
    if described["next"]:
        say(f"next: {described['next']}")


def _lines(described: dict[str, Any]) -> list[tuple[str, str]]:
    """The configuration and the data in a line per section."""
    values, lines = described["configuration"] or {}, []
    for section, keys in SETTINGS:
        named = [(key.partition(".")[2], values[key]) for key in keys if key in values]
        if section != "runtime" or values.get("runtime.rule") != "none":
            lines.append((section, ", ".join(f"{name} {_text(value)}" for name, value in named)))
    if data := described["data"]:
        counts = ", ".join(f"{count:,} {split}" for split, count in data["samples"].items())
        shape = " × ".join(map(str, data["shape"]))
        text = f"{data['kind']} {shape} of {data['classes']:,} classes: {counts}"
        lines.insert(min(1, len(lines)), ("samples", text))
    return [(section, text) for section, text in lines if text]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " + ".join(f"{part} {name}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def stage_table(stages: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("stage", "state", "time", "when", "remark"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for row in stages:
        took = "" if row["seconds"] is None else format_seconds(row["seconds"])
        when = (row["at"] or "")[:16].replace("T", " ")
        table.add_row(row["stage"], row["state"], took, when, printable(_remark(row)))
    return table


def _remark(row: dict[str, Any]) -> str:
    """The run that a stage was taken from, and its main figures."""
    facts, parts = row["facts"], []
    if row["reused_from"]:
        parts.append(f"from {row['reused_from']}")
    if "samples" in facts:
        rejected = f", {facts['rejected']:,} rejected" if facts.get("rejected") else ""
        parts.append(f"{facts['samples']:,} samples{rejected}")
    if "kept" in facts:
        parts.append(f"kept {facts['kept']:,} of {facts['of']:,}")
    if "images" in facts:
        parts.append(f"{facts['images']:,} synthetic samples, {facts['steps']:,} steps")
    return "; ".join(parts)


def _print_results(results: list[dict[str, Any]], tested: dict[str, Any] | None, console: Console) -> None:
    on = tested or {"split": "test", "samples": 0}  # early versions without prepared data
    console.print(result_table(results, on["split"]))
    console.print(ONE_DISTILLATION, soft_wrap=True)
    if on["samples"] and (note := few_tested(**on)):
        console.print(f"warning: {note}", soft_wrap=True)


def result_table(results: list[dict[str, Any]], split: str) -> Table:
    """The accuracy of each set and network in per cent."""
    table = Table(title=f"top-1 accuracy on {TESTED[split]}, %")
    for column in ("set", "network", "mean ± std", "n", "distilled − this", "95 % interval"):
        table.add_column(column, justify="left" if column in ("set", "network") else "right")
    for row in results:
        std = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
        cells = [] if row["difference"] is None else [points(row["difference"])]
        if row["interval"]:
            cells.append(" to ".join(map(points, row["interval"])))
        table.add_row(row["set"], row["network"], f"{100 * row['mean']:.1f}{std}", str(row["n"]), *cells)
    return table


def show_result(run: RunDir, console: Console) -> None:
    """Print the accuracy of each set and network, and the path of the report: what a run ends with."""
    if (run / "evaluation.json").exists():
        _print_results([_result(result) for result in Run(run).results], Run(run).tested, console)
    if (run / "report.html").exists():
        console.print(f"report: {_place(Run(run), 'report.html')}", markup=False, soft_wrap=True)

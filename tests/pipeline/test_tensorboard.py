"""The event files, read back; a repeated step replaces the earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from distill_at_scale.core.events import Event, instant
from distill_at_scale.pipeline.monitoring.observers import Observers
from distill_at_scale.pipeline.monitoring.tensorboard import FOLDER, TensorBoard


def events_of(folder: Path) -> list[event_pb2.Event]:
    """All events of a run in TensorBoard's sense, in the order in which it reads them."""
    events = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):  # length (8), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(content[place : place + 8], "little")
            events.append(event_pb2.Event.FromString(content[place + 12 : place + 12 + size]))
            place += 16 + size
    return events


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard shows it: a START takes out what has its step or a later one."""
    points: list[tuple[int, float]] = []
    for event in events_of(folder):
        if event.HasField("session_log"):
            assert event.session_log.status == event_pb2.SessionLog.START
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, round(v.simple_value, 4)) for v in event.summary.value if v.tag == tag]
    return points


def log(board: TensorBoard, *lines: dict) -> None:
    for line in lines:
        board(instant("log", "line", line, "distill"))


def test_steps_that_are_done_again_are_in_the_curve_once(tmp_path):
    begin = {"held": "here", "of": 40, "at": 0.0, "workers": []}
    board = TensorBoard(tmp_path)
    log(board, begin | {"step": 0}, *({"step": s, "of": 40, "loss": float(s)} for s in (10, 20, 30)))
    board.close()
    again = TensorBoard(tmp_path)
    log(again, begin | {"step": 10}, *({"step": s, "of": 40, "loss": s + 0.5} for s in (20, 30, 40)))
    log(again, {"step": 40, "of": 40, "top1": 0.75, "top5": 1.0})
    again.close()
    folder = tmp_path / FOLDER / "distill"
    assert curve(folder, "loss") == [(10, 10.0), (20, 20.5), (30, 30.5), (40, 40.5)]
    assert curve(folder, "top1") == [(40, 0.75)]


def test_every_command_reports_the_results(tmp_path):
    row = {"set": "distilled", "network": "convnet", "top1": 0.5, "top5": 0.9}
    for seeds in ((0, 2), (0, 1, 2)):
        board = TensorBoard(tmp_path)
        board(instant("stage", "started", stage="evaluate"))
        for seed in seeds:
            board(instant("result", "network", {**row, "seed": seed}, "evaluate"))
        board.close()
    points = curve(tmp_path / FOLDER / "evaluate", "distilled/convnet/top1")
    assert points == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_stages_have_their_seconds_and_non_finite_values_are_skipped(tmp_path):
    board = TensorBoard(tmp_path)
    board(Event("stage", "finished", 10.0, 12.5, stage="score"))
    log(board, {"step": 1, "of": 2, "loss": float("nan"), "real_share": 0.7})
    board.close()
    assert curve(tmp_path / FOLDER / "stages", "seconds/score") == [(0, 2.5)]
    assert curve(tmp_path / FOLDER / "distill", "loss") == []
    assert curve(tmp_path / FOLDER / "distill", "real_share") == [(1, 0.7)]


def test_a_folder_that_cannot_be_created_ends_nothing(tmp_path):
    (tmp_path / FOLDER).write_text("in the way", encoding="utf-8")
    lines: list[str] = []
    observers = Observers(lines.append, [TensorBoard(tmp_path)])
    observers.emit(instant("stage", "finished", stage="score"))
    observers.emit(instant("stage", "finished", stage="select"))
    observers.close()
    assert len(lines) == 1
    assert lines[0].startswith("  TensorBoard is switched off: ")


@pytest.mark.parametrize("part", ["distill", "evaluate", "stages"])
def test_a_run_leaves_curves(digits_run, part):
    tags = {v.tag for event in events_of(digits_run.dir / FOLDER / part) for v in event.summary.value}
    expected = {
        "distill": {"loss", "step_seconds"},
        "evaluate": {"distilled/convnet/top1", "random_real/convnet/top1"},
        "stages": {f"seconds/{stage}" for stage in ("ingest", "score", "select", "distill", "evaluate")},
    }
    assert expected[part] <= tags

"""The timeline file across kills and several commands, and reading it."""

from __future__ import annotations

import pytest

from distill_at_scale.core.events import Event, instant
from distill_at_scale.pipeline.monitoring.timeline import NAME, Timeline, TimelineEntry, read
from distill_at_scale.pipeline.monitoring.utilization import account


def work(began: float, ended: float, host: str = "a", pid: int = 1, stage: str = "score") -> Event:
    return Event("work", "score", began, ended, host, pid, {"samples": 10}, stage)


def stage(name: str, began: float, ended: float | None = None, of: str = "score") -> Event:
    return Event("stage", name, began, began if ended is None else ended, "d", 9, {}, of)


def test_commands_append_and_are_numbered(tmp_path):
    for _ in range(2):
        timeline = Timeline(tmp_path)
        timeline(work(1, 2))
        timeline(instant("log", "line", {"loss": 1.0}))
        timeline.close()
    entries = read(tmp_path / NAME)
    assert [entry.attempt for entry in entries] == [1, 2]
    assert entries[0].event == work(1, 2)


def test_a_line_cut_by_a_kill_is_skipped_and_harms_no_other(tmp_path):
    timeline = Timeline(tmp_path)
    timeline(work(1, 2))
    timeline.close()
    with open(tmp_path / NAME, "a", encoding="utf-8") as file:
        file.write('{"attempt": 1, "what": "wo')
    again = Timeline(tmp_path)
    again(work(3, 4))
    again.close()
    assert [(entry.attempt, entry.event.began) for entry in read(tmp_path / NAME)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize("line", ["[1]", "null", '{"attempt": 1}', '{"attempt": 1, "odd": 2}', "{", "\x00"])
def test_lines_that_are_not_events_are_skipped(tmp_path, line):
    (tmp_path / NAME).write_text(line + "\n", encoding="utf-8")
    assert read(tmp_path / NAME) == []


def test_a_command_that_found_everything_done_takes_no_time():
    entries = [TimelineEntry(1, stage("skipped", 5)), TimelineEntry(2, stage("skipped", 9))]
    assert account(entries) is None
    assert account([]) is None


def test_the_account_leaves_out_pauses_between_commands():
    entries = [
        *(
            TimelineEntry(1, e)
            for e in (stage("started", 0), Event("wait", "start", 0, 4, "d", 9, {}, "score"), work(5, 10))
        ),
        *(TimelineEntry(2, e) for e in (stage("started", 1000), work(1002, 1006), stage("finished", 1000, 1010))),
    ]
    usage = account(entries)
    assert usage is not None
    assert (usage.seconds, usage.starts, usage.busy, usage.waited) == (20, [0, 10], 9, 4)
    assert [(span.began, span.ended) for span in usage.stages] == [(0, 10), (10, 20)]  # the first one was killed
    assert [(span.began, span.ended) for span in usage.workers[0].spans] == [(5, 10), (12, 16)]


def test_parallel_work_counts_once_and_consecutive_units_are_one_bar():
    entries = [TimelineEntry(1, e) for e in (work(0, 10), work(5, 15, "b", 2), work(10.01, 20), stage("started", 0))]
    usage = account(entries)
    assert usage is not None
    assert usage.busy == pytest.approx(20)
    assert [(w.host, w.pid, len(w.spans)) for w in usage.workers] == [("a", 1, 1), ("b", 2, 1)]


def test_a_run_writes_a_timeline_with_every_stage(digits_run):
    entries = read(digits_run.dir / NAME)
    ended = [entry.event.stage for entry in entries if entry.event.name == "finished"]
    assert ended == ["ingest", "score", "select", "distill", "evaluate"]
    done = {entry.event.name for entry in entries if entry.event.what == "work"}
    assert done == {"decode", "train a proxy", "score", "steps", "evaluate"}
    decoded = sum(e.event.values["samples"] for e in entries if e.event.name == "decode")
    assert decoded == digits_run.pipeline.dir.record("ingest")["samples"]

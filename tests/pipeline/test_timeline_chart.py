"""Worker activity over time: few workers one by one, many of them together, and the sentence."""

from __future__ import annotations

import base64

import pytest

from distill_at_scale.core.events import Event
from distill_at_scale.pipeline.monitoring.timeline import TimelineEntry
from distill_at_scale.pipeline.monitoring.utilization import account
from distill_at_scale.pipeline.report import timeline_chart
from distill_at_scale.pipeline.report.text import NBSP


def entries(hosts: int, each: int, *more: Event, attempt: int = 1) -> list[TimelineEntry]:
    """Every worker decodes from second 20 to 90 of 100."""
    events = [
        Event("stage", "started", 0, 0, "d", 9, {}, "ingest"),
        Event("stage", "finished", 0, 100, "d", 9, {}, "ingest"),
    ]
    events += [Event("wait", "start", 0, 10, "d", 9, {}, "ingest"), *more]
    for host in range(hosts):
        events += [Event("work", "decode", 20, 90, f"node-{host:03d}", pid, {}, "ingest") for pid in range(each)]
    return [TimelineEntry(attempt, event) for event in events]


def svg(uri: str) -> str:
    return base64.b64decode(uri.partition(",")[2]).decode()


@pytest.mark.parametrize(
    ("hosts", "each", "lanes", "first"),
    [
        (1, 2, 2, "node-000 · 0"),
        (10, 20, 10, f"node-000 (20{NBSP}workers)"),
        (64, 8, 22, f"node-000 +2 (24{NBSP}workers)"),
        (200, 1, 23, f"node-000 +8 (9{NBSP}workers)"),
    ],
)
def test_lanes_stay_few(hosts, each, lanes, first):
    usage = account(entries(hosts, each))
    assert usage is not None
    rows = timeline_chart.lanes(usage.workers)
    assert (len(rows), rows[0].name) == (lanes, first)
    assert sum(len(lane.workers) for lane in rows) == hosts * each
    drawn = svg(timeline_chart.chart(usage))
    assert first.replace(NBSP, " ") in drawn.replace(NBSP, " ")
    assert drawn.count("<text") <= timeline_chart.LANES + 30


def test_the_sentence_says_where_the_time_went():
    part = timeline_chart.part(entries(1, 1))
    assert part is not None
    text = part["sentence"].replace(NBSP, " ")
    assert "at least one worker was busy for 70 %" in text
    assert "Ray was starting for 10 %" in text
    assert "for 20 % workers were starting or only the driver worked" in text
    assert "lost" not in text
    assert [name for name, _ in part["legend"]] == ["ingest", "starting Ray"]


def test_losses_and_further_commands_are_reported_and_drawn():
    lost = Event("lost", "workers", 50, 50, "d", 9, {}, "ingest")
    part = timeline_chart.part([*entries(1, 1, lost), *entries(1, 1, lost, attempt=2)])
    assert part is not None
    assert "in 2 commands" in part["sentence"].replace(NBSP, " ")
    assert "Workers were lost 2 times" in part["sentence"]
    assert "another command resumes" in svg(part["chart"]["narrow"])


def test_without_a_timeline_there_is_no_chart():
    assert timeline_chart.part([]) is None


def test_the_same_timeline_gives_the_same_bytes():
    assert timeline_chart.part(entries(3, 20)) == timeline_chart.part(entries(3, 20))

"""Findings as JSON and back, and their page."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from distill_at_scale.config.load import validate
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.studies import findings, page
from distill_at_scale.experiments.studies.base import Finding
from distill_at_scale.pipeline.report.plot_spec import Plot, Series

FINDING = Finding(
    "drop",
    "Drop test",
    "Dropping 10 % at random costs 2.1 points.",
    "The paper says so too.",
    [{"dropped": "random", "mean": np.float32(0.5), "std": math.nan, "n": np.int64(3), "broken": False}],
    [
        Plot(
            "Accuracy",
            "share kept",
            "accuracy",
            [Series("s", (0.1, 0.2), (0.5, math.nan), (0.1, None), "points", "ours"), Series("b", ("x",), (1.0,))],
            [("unpruned", 0.6)],
            [("break", 0.2)],
            True,
        )
    ],
    {"break_drop": None, "agreement": math.inf, "per_class": np.array([1, 2])},
    ["Few seeds."],
)


def written(folder, *finding, **sections):
    path = page.write(folder, finding, validate({"data": {"source": "digits"}, **sections}))
    return path.read_text(encoding="utf-8")


def test_a_finding_is_the_same_after_a_round_trip(tmp_path):
    findings.write(tmp_path / "drop.json", FINDING)
    finding = findings.read(tmp_path / "drop.json")
    assert findings.to_json(finding) == findings.to_json(FINDING)
    plot = finding.plots[0]
    assert math.isnan(plot.series[0].y[1])
    assert plot.series[0].error == [0.1, None]
    assert plot.levels == (("unpruned", 0.6),)
    assert plot.series[0].kind == "points"
    assert finding.facts == {"break_drop": None, "agreement": None, "per_class": [1, 2]}
    assert page.charts.draw(plot) == page.charts.draw(FINDING.plots[0])


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    findings.write(tmp_path / "drop.json", FINDING)
    text = (tmp_path / "drop.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["rows"] == [{"dropped": "random", "mean": 0.5, "std": None, "n": 3, "broken": False}]


def test_a_value_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"facts\.x holds a set"):
        findings.write(tmp_path / "x.json", dataclasses.replace(FINDING, facts={"x": {1}}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"plots": [], "other": 1}'])
def test_a_file_that_is_not_a_finding_is_named(tmp_path, text):
    path = tmp_path / "drop.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"drop\.json is no finding"):
        findings.read(path)


def test_a_missing_finding_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"drop\.json is missing; run the study"):
        findings.read(tmp_path / "drop.json")


def test_the_contents_come_first_with_every_answer(tmp_path):
    other = dataclasses.replace(FINDING, title="Stability", answer="Trials agree.", paper="")
    text = written(tmp_path, FINDING, other)
    contents = re.search(r'<ol class="contents">(.*?)</ol>', text, re.DOTALL).group(1)
    assert FINDING.answer in contents
    assert "Trials agree." in contents
    for anchor in re.findall(r'href="#([^"]+)"', contents):
        assert f'id="{anchor}"' in text
    assert text.count('<p class="paper">The paper') == 1
    assert "Few seeds." in text


def test_the_page_needs_nothing_from_outside_and_escapes_names(tmp_path):
    evil = "<script>x</script>"
    rows = [{evil: evil, "n": 1}]
    text = written(tmp_path, dataclasses.replace(FINDING, title=evil, answer=evil, paper=evil, rows=rows, notes=[evil]))
    assert "<script" not in text
    assert set(re.findall(r'src="([^":]*:)', text)) == {"data:"}


def test_a_long_table_is_closed_and_cut(tmp_path):
    rows = [{"trial": i, "score": i / 7} for i in range(page.MOST_ROWS + 5)]
    text = written(tmp_path, dataclasses.replace(FINDING, rows=rows))
    assert f"<summary>All {len(rows)} rows</summary>" in text
    assert f"The first {page.MOST_ROWS} of {len(rows)} rows" in text
    assert "<summary>All" not in written(tmp_path, dataclasses.replace(FINDING, rows=rows[:5]))


def test_values_are_formatted_for_readers():
    values = [None, True, 1234, -0.12345, 1e5, [0.5, 1], {"a": 1}, list(range(9))]
    expected = ["–", "yes", "1,234", "−0.1235", "100,000", "0.5,\u00a01", '{"a": 1}', "9 values"]
    assert [page.as_text(value) for value in values] == expected


def test_without_findings_the_page_says_so(tmp_path):
    assert "No study has finished yet" in written(tmp_path)

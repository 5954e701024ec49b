"""Charts: the style by role, ticks, labels apart, and what cannot be drawn."""

from __future__ import annotations

import base64
import math
import xml.etree.ElementTree as ElementTree

import pytest

from distill_at_scale.pipeline.report import charts
from distill_at_scale.pipeline.report.plot_spec import Plot, Series


def svg(plot):
    return base64.b64decode(charts.draw(plot).partition(",")[2]).decode()


def texts(plot):
    return [
        "".join(node.itertext()).strip()
        for node in ElementTree.fromstring(svg(plot)).iter()
        if node.tag.endswith("}text")
    ]


def curve(**changes):
    series = [
        Series("loss", [0.01, 0.1, 1.0], [0.2, 0.3, 0.28], [0.01, None, 0.02], role="ours"),
        Series("drawn", [0.01, 0.1, 1.0], [0.1, 0.25, 0.28], role="random"),
    ]
    values = {"title": "t", "x_label": "share kept", "y_label": "top-1 accuracy", "series": series}
    return Plot(**(values | changes))


def test_the_same_plot_gives_the_same_bytes():
    assert charts.draw(curve()) == charts.draw(curve())
    assert charts.draw(curve()) != charts.draw(curve(levels=[("unpruned", 0.29)]))


def test_names_of_series_levels_and_marks_are_all_written():
    result = texts(curve(levels=[("unpruned 29 %", 0.29)], marks=[("recommended", 0.1)]))
    assert {"loss", "drawn", "unpruned 29 %", "recommended", "share kept", "top-1 accuracy"} <= set(result)


def test_a_logarithmic_axis_of_shares_has_plain_ticks_in_per_cent():
    result = texts(curve(log_x=True))
    assert {"1\u00a0%", "10\u00a0%", "100\u00a0%"} <= set(result)
    assert not any("10^" in text or "e-" in text or "−0" in text for text in result)


def test_the_first_of_a_role_has_its_color_and_the_others_differ():
    series = [
        Series(str(i), [0], [0], role=role) for i, role in enumerate(["ours", "ours", "random", "other", "unpruned"])
    ]
    colors = [color for color, _ in charts.styles(series)]
    assert colors[0] == charts.ROLES["ours"]
    assert colors[2] == charts.ROLES["random"]
    assert colors[4] == charts.ROLES["unpruned"]
    assert len(set(colors)) == 5
    assert len({marker for _, marker in charts.styles(series)}) == 5


def test_names_on_x_become_rows_in_their_order():
    plot = curve(series=[Series("s", ["base", "tail <b>"], [0.4, 0.3], None, "bars", "ours")], x_label="")
    result = texts(plot)
    assert result.index("base") < result.index("tail <b>")
    assert "<b>" not in svg(plot)


def test_values_that_are_not_finite_are_left_out():
    broken = [Series("s", [0.0, 0.1, 0.2], [math.nan, 0.5, math.inf], [None, math.nan, 0.1])]
    assert list(charts._values(broken[0], log=False)) == [(0.1, 0.5, 0.0)]
    assert "nan" not in svg(curve(series=broken, log_x=True, levels=[("x", math.nan)])).lower()


@pytest.mark.parametrize("kind", ["line", "points", "bars"])
def test_a_plot_without_values_can_be_drawn(kind):
    assert charts.draw(curve(series=[Series("s", [], [], kind=kind)], log_x=True)).startswith("data:image/svg+xml")
    assert charts.draw(curve(series=[], log_x=True)).startswith("data:image/svg+xml")


def test_a_name_may_hold_what_xml_may_not():
    assert "a\ufffd<&$x$" in texts(curve(series=[Series("a\x00<&$x$", [1.0], [1.0])]))


def test_labels_are_moved_apart_in_their_order():
    result = charts.apart([0.5, 0.1, 0.51], 0.05)
    assert result == pytest.approx([0.5, 0.1, 0.55])


def test_ticks_of_a_logarithmic_axis_are_within_it():
    assert charts.log_ticks(0.9, 11) == [1, 2, 5, 10]
    assert charts.log_ticks(1, 100_000) == [1, 10, 100, 1000, 10_000, 100_000]
    assert charts.log_ticks(0.0004, 1)[0] == 0.001
    assert charts.log_ticks(3, 3.1) == [3, 3.1]


@pytest.mark.parametrize(
    ("label", "values", "expected"),
    [
        ("top-1 accuracy", [0.1, 0.9], True),
        ("top-1 accuracy in %", [0.1, 0.9], False),
        ("top-1 accuracy", [10.0, 90.0], False),
        ("difference in accuracy", [0.1, 0.2], False),
        ("reliability", [0.1, 0.2], False),
        ("share dropped", [], False),
    ],
)
def test_only_shares_without_a_unit_are_shown_in_per_cent(label, values, expected):
    assert charts.is_share(label, values) is expected


def test_a_far_level_is_named_at_the_edge_and_does_not_press_the_series_together():
    assert "↓ random real" in texts(curve(levels=[("random real", -5.0)]))
    assert "random real" in texts(curve(levels=[("random real", 0.15)]))


def test_whiskers_beyond_one_leave_per_cent_on_the_axis():
    for x, kind in (([0.1, 0.5], "line"), (["a", "b"], "bars")):
        one = Series("loss", x, [0.97, 0.99], [0.02, 0.03], kind, "ours")
        assert any("%" in text for text in texts(Plot("t", "x", "top-1 accuracy", [one])))


def test_whole_numbers_have_whole_ticks():
    one = Series("loss", [1, 2, 3, 4, 5], [50.0, 40.0, 40.0, 30.0, 30.0])
    assert not {"1.5", "2.5"} & set(texts(Plot("t", "epoch", "loss", [one])))


def test_bars_of_one_series_each_are_next_to_their_names(monkeypatch):
    places = []
    monkeypatch.setattr(charts, "_row_series", lambda axes, series, color, marker, rows, per_row: places.append(rows))
    charts.draw(Plot("t", "", "top-1", [Series(n, [n], [0.5], None, "bars") for n in "abc"]))
    assert all(rows == {"a": 0, "b": 1, "c": 2} for rows in places)
